"""Folders of every kind: ids with and without the tokenizer's rule, entries and names are those of transformers."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from llm_jax.data import tokenizers

END = "<|endoftext|>"
LINES = [
    "the Capital of France is paris",
    "naïve café 東京 don't",
    "a<extra>b <more> <|endoftext|>x",
    "",
    "  two  blanks ",
]
FAST = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
EXTRA = {"content": "<extra>", "lstrip": True, "rstrip": False, "normalized": False, "single_word": False}
MORE = {**EXTRA, "content": "<more>", "__type": "AddedToken"}


def config(kind="", **more):
    """A `tokenizer_config.json` of a class, or of none in particular."""
    return {"tokenizer_config": {"tokenizer_class": f"{kind}Tokenizer", **more} if kind else {**FAST, **more}}


@pytest.fixture(scope="module")
def trained():
    special = [END, "<s>", "</s>", "<pad>", "<unk>", "<mask>"]
    sizes = {"bpe": 300, "unigram": 60}
    out = {kind: tokenizers.train(LINES * 9, kind, size, special).backend for kind, size in sizes.items()}
    parts = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    out["wordpiece"] = tokenizers.train(LINES * 9, "wordpiece", 90, parts).backend
    llama = out["llama"] = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    llama.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    llama.decoder = decoders.Sequence(steps)
    out["gpt1"] = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    out["gpt1"].pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    learn = dict(vocab_size=120, special_tokens=special, show_progress=False)
    llama.train_from_iterator(LINES * 9, trainers.BpeTrainer(**learn))
    lower = [line.lower() for line in LINES * 9]
    learn["special_tokens"] = special[4:]
    out["gpt1"].train_from_iterator(lower, trainers.BpeTrainer(end_of_word_suffix="</w>", **learn))
    return {kind: backend.to_str() for kind, backend in out.items()}


def adds(begin, end):
    ends = [(token, i) for i, token in enumerate((END, "<s>", "</s>"))]
    return lambda: processors.TemplateProcessing(single=f"{begin} $A {end}".strip(), special_tokens=ends)


def bytes_first():
    return processors.Sequence([processors.ByteLevel(trim_offsets=False), adds("<s>", "")()])


# kind of tokenizer.json, its post-processor, other files
RULES = {
    "nothing adds one": ("bpe", None, config()),
    "flag alone": ("bpe", None, config(add_bos_token=True)),
    "flag off": ("bpe", adds("<s>", ""), config(add_bos_token=False)),
    "rule": ("bpe", adds("<s>", ""), config()),
    "rule of an unnamed entry": ("bpe", adds("<s>", ""), config(bos_token=None)),
    "both ends": ("unigram", adds("<s>", "</s>"), config()),
    "end alone": ("unigram", adds("", "</s>"), config(add_eos_token=True)),
    "bytes, then a rule": ("bpe", bytes_first, config()),
    "GPT-2": ("bpe", None, config("GPT2", add_bos_token=True)),
    "GPT-2 with a rule": ("bpe", adds(END, ""), config("GPT2")),
    "Llama": ("llama", None, config("Llama", add_bos_token=True)),
    "Llama with a rule": ("llama", adds("<s>", ""), config("Llama", add_bos_token=False)),
    "BERT": ("wordpiece", None, config("Bert", strip_accents=True)),
    "nothing beside": ("bpe", adds("<s>", ""), {"config": {"model_type": "llama"}}),
}
BESIDE = {
    "added_tokens.json": {**config(), "added_tokens": {"<more>": 301, "<extra>": 300}},
    "decoder": config(added_tokens_decoder={"301": EXTRA, "300": {**MORE, "special": True}}),
    "decoder before map": {
        **config(added_tokens_decoder={"300": {**EXTRA, "special": True}}),
        "special_tokens_map": {"pad_token": "<more>"},
    },
    "names": config(pad_token="<extra>", unk_token=MORE),
    "list": config(additional_special_tokens=["<extra>", MORE]),
    "newer list": config(extra_special_tokens=["<more>", "<extra>"]),
    "object": config(extra_special_tokens={"image_token": "<more>"}, tool_token="<extra>"),
    "map": {**config(), "special_tokens_map": {"pad_token": "<extra>", "additional_special_tokens": ["<more>"]}},
    "map wins": {**config(pad_token="<pad>"), "special_tokens_map": {"pad_token": EXTRA}},
    "an ordinary entry": config(pad_token="a"),
    "map and file": {
        **config(),
        "special_tokens_map": {"pad_token": "<extra>"},
        "added_tokens": {"<extra>": 300, "<more>": 301},
    },
}
both = {"bos_token": "<s>", "add_bos_token": True, "add_eos_token": True}
ALONE = {
    "GPT-1": ("gpt1", {"config": {"model_type": "openai-gpt"}}),
    "GPT-2": ("bpe", {"config": {"model_type": "gpt2"}}),
    "GPT-2, begin": ("bpe", config("GPT2", add_bos_token=True)),
    "GPT-2, blank": ("bpe", config("GPT2", add_prefix_space=True, **both)),
    "RoBERTa": ("bpe", {"config": {"model_type": "roberta"}}),
    "RoBERTa, more": ("bpe", {**config("Roberta"), "added_tokens": {"<extra>": 300}}),
    "Qwen": ("bpe", config("Qwen2")),
    "BERT": ("wordpiece", {"config": {"model_type": "bert"}}),
    "BERT, cased": ("wordpiece", config("Bert", do_lower_case=False)),
    "BERT, accents": ("wordpiece", config("Bert", strip_accents=False, tokenize_chinese_chars=False)),
    "ELECTRA": ("wordpiece", {"config": {"model_type": "electra"}, "special_tokens_map": {"pad_token": "<extra>"}}),
    "DistilBERT": ("wordpiece", {"config": {"model_type": "distilbert"}}),
}


def check(folder, out):
    """Holds a folder, and what we save of it, to transformers."""
    ours, theirs = tokenizers.load(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.vocab_size == len(theirs)
    assert ours.encode_texts(LINES) == theirs(LINES).input_ids
    bare = theirs(LINES, add_special_tokens=False).input_ids
    assert [ours.encode(text) for text in LINES] == bare
    assert [ours.encode_prompt(text) for text in LINES] == [[*ours.rule.begin, *ids] for ids in bare]
    named = theirs.special_tokens_map
    usual = {} if "eos_token" in named or ours.eos_id is None else {"eos_token": END}  # where the files name no end
    assert ours.special_tokens == named | usual
    for ids in bare:
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    ours.save(out)
    again = AutoTokenizer.from_pretrained(out)
    assert again(LINES).input_ids == tokenizers.load(out).encode_texts(LINES) == ours.encode_texts(LINES)
    assert tokenizers.load(out).special_tokens.items() >= ours.special_tokens.items()


def write(folder, files):
    folder.mkdir()
    for name, values in files.items():
        (folder / f"{name}.json").write_text(json.dumps(values))


@pytest.mark.parametrize("name", RULES)
def test_rules(name, trained, tmp_path):
    kind, processor, files = RULES[name]
    backend = Tokenizer.from_str(trained[kind])
    backend.post_processor = None
    if processor is not None:
        backend.post_processor = processor()
    write(tmp_path / "in", files)
    backend.save(str(tmp_path / "in" / "tokenizer.json"))
    check(tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize("name", BESIDE)
def test_entries_beside_tokenizer_json(name, trained, tmp_path):
    write(tmp_path / "in", BESIDE[name])
    (tmp_path / "in" / "tokenizer.json").write_text(trained["bpe"])
    check(tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize("name", ALONE)
def test_vocabularies_alone(name, trained, tmp_path):
    kind, files = ALONE[name]
    write(tmp_path / "in", files)
    Tokenizer.from_str(trained[kind]).model.save(str(tmp_path / "in"))
    check(tmp_path / "in", tmp_path / "out")


PLACES = [  # generation_config.json, config.json
    (None, {"eos_token_id": 2}),
    (None, {"eos_token_id": [2, 0]}),
    ({"eos_token_id": [0, 5]}, {"eos_token_id": 2}),
    ({"eos_token_id": 5}, {}),
]


@pytest.mark.parametrize("generation, model", PLACES)
def test_whatever_ends_a_generation_of_theirs_ends_ours(generation, model, trained, tmp_path):
    write(tmp_path / "in", {"config": {"model_type": "llama", **model}, **config()})
    if generation is not None:
        (tmp_path / "in" / "generation_config.json").write_text(json.dumps(generation))
    (tmp_path / "in" / "tokenizer.json").write_text(trained["bpe"])
    if generation is None:
        theirs = GenerationConfig.from_model_config(AutoConfig.from_pretrained(tmp_path / "in"))
    else:
        theirs = GenerationConfig.from_pretrained(tmp_path / "in")
    ends = theirs.eos_token_id if isinstance(theirs.eos_token_id, list) else [theirs.eos_token_id]
    assert set(ends) <= set(tokenizers.load(tmp_path / "in").eos_ids)
