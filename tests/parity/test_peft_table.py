"""Adapters of every family and every kind equal peft's, both ways: one row is one adapter.

A row is made by peft, read here, compared, written here, read by peft, compared again, and read here bit by bit.
"""

import dataclasses
import functools
import re

import jax
import numpy as np
import peft
import pytest
import torch
import transformers
from theirs import use_doubles

from llm_jax import interop
from llm_jax.delta import methods
from llm_jax.delta.lora import LayeredLora, Lora, LoraConfig, columns
from llm_jax.delta.methods import DeltaConfig, Ia3Config
from llm_jax.delta.scaled import Biased
from llm_jax.interop.huggingface import peft as peft_format
from llm_jax.nn import paths, weights

pytestmark = pytest.mark.filterwarnings("ignore")

BERT = dict(vocab_size=61, hidden_size=12, num_hidden_layers=3, num_attention_heads=3, intermediate_size=20,
            max_position_embeddings=32)  # fmt: skip
GPT = dict(
    vocab_size=61, n_positions=32, n_embd=12, n_layer=2, n_head=3, bos_token_id=1, eos_token_id=2, pad_token_id=0
)
LLAMA = dict(vocab_size=61, hidden_size=12, intermediate_size=20, num_hidden_layers=3, num_attention_heads=3,
             num_key_value_heads=3, max_position_embeddings=32, pad_token_id=0)  # fmt: skip
T5 = dict(vocab_size=61, d_model=12, d_kv=4, d_ff=20, num_layers=2, num_decoder_layers=3, num_heads=3,
          decoder_start_token_id=0)  # fmt: skip
MARIAN = dict(vocab_size=61, d_model=12, encoder_layers=2, decoder_layers=2, encoder_attention_heads=3,
              decoder_attention_heads=3, encoder_ffn_dim=20, decoder_ffn_dim=20, max_position_embeddings=32,
              pad_token_id=0, decoder_start_token_id=0, eos_token_id=1)  # fmt: skip
DISTIL = dict(vocab_size=61, dim=12, n_layers=2, n_heads=3, hidden_dim=20, max_position_embeddings=32)
XLNET = dict(vocab_size=61, d_model=12, n_layer=2, n_head=3, d_inner=20)
t = transformers
# family -> (class, its config)
MODELS = {
    "gpt2": (t.GPT2LMHeadModel, t.GPT2Config, GPT),
    "gpt2 labels": (t.GPT2ForSequenceClassification, t.GPT2Config, {**GPT, "num_labels": 3}),
    "gpt1": (t.OpenAIGPTLMHeadModel, t.OpenAIGPTConfig, GPT),
    "llama": (t.LlamaForCausalLM, t.LlamaConfig, LLAMA),
    "llama biases": (t.LlamaForCausalLM, t.LlamaConfig, {**LLAMA, "attention_bias": True, "mlp_bias": True}),
    "llama tied": (t.LlamaForCausalLM, t.LlamaConfig, {**LLAMA, "tie_word_embeddings": True}),
    "llama bare": (t.LlamaModel, t.LlamaConfig, LLAMA),
    "llama labels": (t.LlamaForSequenceClassification, t.LlamaConfig, {**LLAMA, "num_labels": 3}),
    "qwen3": (t.Qwen3ForCausalLM, t.Qwen3Config, {**LLAMA, "head_dim": 4}),
    "bert": (t.BertForMaskedLM, t.BertConfig, BERT),
    "bert bare": (t.BertModel, t.BertConfig, BERT),
    "bert labels": (t.BertForSequenceClassification, t.BertConfig, {**BERT, "num_labels": 3}),
    "bert span": (t.BertForQuestionAnswering, t.BertConfig, BERT),
    "roberta": (t.RobertaForSequenceClassification, t.RobertaConfig,
                {**BERT, "num_labels": 3, "pad_token_id": 1, "type_vocab_size": 1}),
    "distilbert": (t.DistilBertForSequenceClassification, t.DistilBertConfig, {**DISTIL, "num_labels": 3}),
    "albert": (t.AlbertForSequenceClassification, t.AlbertConfig,
               {**BERT, "num_hidden_layers": 4, "embedding_size": 8, "num_hidden_groups": 2, "inner_group_num": 2,
                "num_labels": 3}),
    "t5": (t.T5ForConditionalGeneration, t.T5Config, T5),
    "t5 labels": (t.T5ForSequenceClassification, t.T5Config, {**T5, "num_labels": 3}),
    "marian": (t.MarianMTModel, t.MarianConfig, MARIAN),
    "xlnet": (t.XLNetLMHeadModel, t.XLNetConfig, XLNET),
    "xlnet bare": (t.XLNetModel, t.XLNetConfig, XLNET),
    "xlnet labels": (t.XLNetForSequenceClassification, t.XLNetConfig, {**XLNET, "num_labels": 3}),
}  # fmt: skip
LoRA, IA3, Norms, Tokens = peft.LoraConfig, peft.IA3Config, peft.LNTuningConfig, peft.TrainableTokensConfig
SEQ, SPAN = {"task_type": "SEQ_CLS"}, {"task_type": "QUESTION_ANS"}
ROWS = {
    # LoRA on every family
    ("gpt2", "lora"): lambda: LoRA(r=3, lora_alpha=5, target_modules=["c_attn", "c_proj", "c_fc"]),
    ("gpt1", "lora"): lambda: LoRA(r=2, target_modules=["c_attn", "mlp.c_proj"]),
    ("llama", "lora"): lambda: LoRA(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj", "down_proj", "lm_head"]),
    ("qwen3", "lora"): lambda: LoRA(r=2, target_modules="all-linear"),
    ("bert", "lora"): lambda: LoRA(r=2, target_modules=["query", "dense"]),
    ("bert labels", "lora"): lambda: LoRA(r=2, target_modules=["query", "attention.output.dense"], **SEQ),
    ("bert span", "lora"): lambda: LoRA(r=2, target_modules=["query", "key"], **SPAN),
    ("roberta", "lora"): lambda: LoRA(r=2, **SEQ),
    ("distilbert", "lora"): lambda: LoRA(r=2, target_modules=["q_lin", "lin2"], **SEQ),
    ("albert", "lora"): lambda: LoRA(r=2, target_modules=["query", "ffn", "ffn_output"], **SEQ),
    ("t5", "lora"): lambda: LoRA(r=2, target_modules=["q", "wo"]),
    ("t5 labels", "lora"): lambda: LoRA(r=2, modules_to_save=["classification_head"], **SEQ),
    ("marian", "lora"): lambda: LoRA(r=2, target_modules=["q_proj", "fc1", "encoder_attn.out_proj"]),
    ("xlnet", "lora"): lambda: LoRA(r=2, target_modules=["layer_1", "layer_2"]),
    ("xlnet labels", "lora"): lambda: LoRA(r=2, target_modules=["ff.layer_1"], **SEQ,
                                           modules_to_save=["logits_proj", "sequence_summary"]),
    ("gpt2 labels", "lora"): lambda: LoRA(r=2, **SEQ),
    ("llama labels", "lora"): lambda: LoRA(r=2, **SEQ),
    ("llama bare", "lora"): lambda: LoRA(r=2, target_modules=["q_proj"], task_type="FEATURE_EXTRACTION"),
    # scales, ranks, layers
    ("gpt2", "rs"): lambda: LoRA(r=3, lora_alpha=5, use_rslora=True),
    ("llama", "rs"): lambda: LoRA(r=3, lora_alpha=5, use_rslora=True),
    ("llama", "ranks"): lambda: LoRA(r=2, lora_alpha=5, rank_pattern={"layers.1.self_attn.q_proj": 4, "v_proj": 3},
                                     alpha_pattern={"v_proj": 7, "^model.layers.2.self_attn.q_proj": 1}),
    ("gpt2", "ranks"): lambda: LoRA(r=2, rank_pattern={"h.1.attn.c_attn": 4}, alpha_pattern={"h.0.attn.c_attn": 3}),
    ("llama", "layers"): lambda: LoRA(r=2, layers_to_transform=[0, 2], target_modules=["q_proj", "up_proj"]),
    ("t5", "layers"): lambda: LoRA(r=2, layers_to_transform=1, layers_pattern="block", target_modules=["q"]),
    ("gpt2", "expression"): lambda: LoRA(r=2, target_modules=r".*h\.1\.(attn|mlp)\.c_proj",
                                          exclude_modules=["mlp.c_proj"]),
    # DoRA
    ("gpt2", "dora"): lambda: LoRA(r=2, use_dora=True, target_modules=["c_attn", "c_fc"]),
    ("llama", "dora"): lambda: LoRA(r=2, use_dora=True, target_modules=["q_proj", "down_proj", "embed_tokens"]),
    ("llama", "dora layers"): lambda: LoRA(r=2, use_dora=True, layers_to_transform=[1], rank_pattern={"k_proj": 1},
                                           target_modules=["k_proj", "o_proj"]),
    ("bert", "dora"): lambda: LoRA(r=2, use_dora=True, target_modules=["query"]),
    # biases
    ("llama biases", "lora_bias"): lambda: LoRA(r=2, lora_alpha=5, lora_bias=True,
                                                 target_modules=["q_proj", "up_proj"]),
    ("gpt2", "lora_bias"): lambda: LoRA(r=2, lora_bias=True),
    ("bert labels", "bias all"): lambda: LoRA(r=2, bias="all", target_modules=["query"], **SEQ),
    ("bert", "bias all"): lambda: LoRA(r=2, bias="all", target_modules=["query"]),
    ("gpt2", "bias all"): lambda: LoRA(r=2, bias="all"),
    ("xlnet", "bias all"): lambda: LoRA(r=2, bias="all", target_modules=["layer_1"]),
    ("xlnet", "whole attention"): lambda: LoRA(r=2, target_modules=["layer_1"], modules_to_save=["rel_attn"]),
    ("gpt2", "bias lora_only"): lambda: LoRA(r=2, bias="lora_only"),
    ("bert labels", "bias lora_only"): lambda: LoRA(r=2, bias="lora_only", target_modules=["query"], **SEQ),
    # tables
    ("llama", "table"): lambda: LoRA(r=2, target_modules=["q_proj", "embed_tokens"]),
    ("gpt2", "positions"): lambda: LoRA(r=2, target_modules=["wpe"]),
    ("llama tied", "table"): lambda: LoRA(r=2, target_modules=["embed_tokens"], ensure_weight_tying=True),
    ("bert labels", "tables"): lambda: LoRA(r=2, target_modules=["word_embeddings", "token_type_embeddings"], **SEQ),
    ("t5", "buckets"): lambda: LoRA(r=2, target_modules=["relative_attention_bias", "q"]),
    # starts
    ("llama", "pissa"): lambda: LoRA(r=2, lora_alpha=5, init_lora_weights="pissa"),
    ("llama", "olora"): lambda: LoRA(r=2, lora_alpha=5, init_lora_weights="olora", use_rslora=True),
    ("gpt2", "pissa"): lambda: LoRA(r=2, lora_alpha=5, init_lora_weights="pissa"),
    # modules stored whole
    ("bert labels", "pooler"): lambda: LoRA(r=2, target_modules=["query"], modules_to_save=["pooler"], **SEQ),
    ("llama", "norm"): lambda: LoRA(r=2, target_modules=["query", "q_proj"][1:], modules_to_save=["norm"]),
    # IA3
    **{(kind, "ia3"): lambda: IA3() for kind in ("gpt2", "llama", "t5", "llama biases")},
    **{(kind, "ia3"): lambda: IA3(**SEQ) for kind in ("bert labels", "roberta")},
    ("distilbert", "ia3"): lambda: IA3(target_modules=["k_lin", "v_lin", "lin2"], feedforward_modules=["lin2"], **SEQ),
    ("marian", "ia3"): lambda: IA3(target_modules=["k_proj", "fc2"], feedforward_modules=["fc2"]),
    # norms
    ("llama", "norms"): lambda: Norms(),
    ("bert labels", "norms"): lambda: Norms(target_modules=["LayerNorm"], **SEQ),
    ("gpt2", "norms"): lambda: Norms(target_modules=["ln_1", "ln_f"]),
    # tokens
    **{(kind, "tokens"): lambda: Tokens(token_indices=[5, 3])
       for kind in ("gpt2", "llama", "llama tied", "bert bare", "t5", "xlnet bare")},
    **{(kind, "lora tokens"): lambda: LoRA(r=2, trainable_token_indices=[3, 9, 4], target_modules=["q_proj"])
       for kind in ("llama", "llama tied", "marian")},
    ("t5", "lora tokens"): lambda: LoRA(r=2, trainable_token_indices=[3, 9, 4], target_modules=["q"]),
    ("gpt2", "lora tokens"): lambda: LoRA(r=2, trainable_token_indices={"wte": [3, 4], "wpe": [7, 2]}),
}  # fmt: skip
# what peft trains beside the deltas, as our patterns
WHOLE = {
    "bias all": ("bias", "logits_bias"), "norms": ("*norm*/scale", "*norm*/bias"), "norm": ("*norm/scale",),
    "whole attention": ("content_bias",),
}  # fmt: skip
IDS = np.random.default_rng(0).integers(3, 61, (2, 10))


@functools.cache
def base(kind, folder):
    torch.manual_seed(0)
    cls, config, sizes = MODELS[kind]
    model = cls(config(**sizes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(folder)
    return interop.load(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    return lambda kind: root / re.sub(" ", "_", kind)


def inputs_of(kind):
    if kind == "t5 labels":  # reads a row at its end
        return {"input_ids": np.where(np.arange(10) == 9, 1, IDS)}
    more = {"decoder_input_ids": IDS[:, ::-1].copy()} if kind in ("t5", "marian") else {}
    return {"input_ids": IDS, **more}


def their_logits(kind, model):
    with torch.no_grad():
        out = model.eval()(**{k: torch.tensor(v) for k, v in inputs_of(kind).items()})
    if "start_logits" in out:
        return torch.stack([out.start_logits, out.end_logits], -1).numpy()
    return (out.logits if "logits" in out else out.last_hidden_state).numpy()


def our_logits(kind, model, params):
    inputs = inputs_of(kind)
    out = jax.jit(lambda p: model.apply({"params": p}, **inputs))(params)
    return out.logits if out.logits is not None else out.last_hidden_state


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), (_, y) in zip(paths.flatten(a), paths.flatten(b), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=path)


def fresh(kind, folder):
    return MODELS[kind][0].from_pretrained(folder).eval()


def trained(kind, folder, config):
    """Their adapter with noise in all that trains."""
    torch.manual_seed(1)
    model = peft.get_peft_model(fresh(kind, folder), config)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("kind, name", ROWS, ids=lambda x: x.replace(" ", "_"))
def test_both_ways(kind, name, folders, tmp_path):
    loaded, config = base(kind, folders(kind)), ROWS[kind, name]()
    trained(kind, folders(kind), config).save_pretrained(tmp_path / "theirs")
    # peft changes the base of some starts when it loads, so what it loads is what counts
    want = their_logits(kind, peft.PeftModel.from_pretrained(fresh(kind, folders(kind)), tmp_path / "theirs"))
    plain = their_logits(kind, fresh(kind, folders(kind)))
    assert np.abs(want - plain).max() > 1e-3
    params = peft_format.load(tmp_path / "theirs", loaded.model, loaded.params)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    close(our_logits(kind, loaded.model, params), want)
    original = loaded.params if name in ("pissa", "olora") else None
    whole = [p for p in WHOLE.get(name, ()) if any(map(paths.matcher(p), dict(paths.flatten(params))))]
    if name == "bias lora_only":
        whole = tuple(p for p, _ in paths.flatten(params) if re.search(r"(query|key|value)/bias", p))
        whole = whole if kind == "gpt2" else tuple(p for p in whole if "query" in p)
    peft_format.save(tmp_path / "ours", loaded.model, params, str(folders(kind)), whole=whole, original=original)
    again = peft.PeftModel.from_pretrained(fresh(kind, folders(kind)), tmp_path / "ours")
    close(their_logits(kind, again), want)
    back = peft_format.load(tmp_path / "ours", loaded.model, loaded.params)
    if original is None:
        same(back, params)
    else:
        close(our_logits(kind, loaded.model, back), want)


ATTENTION = ("attention.query", "attention.value")
of = lambda **fields: DeltaConfig(lora=LoraConfig(**{"rank": 2, "targets": ATTENTION, **fields}))
# deltas that peft does not make by itself: (ours, parameters that train beside them)
OURS = {
    ("gpt2", "parts"): (of(), ()),
    ("gpt2", "dora parts"): (of(dora=True), ()),
    ("gpt2", "parts by layer"): (of(targets=("attention", "mlp"), ranks=("layers[1].attention.key=3",)), ()),
    ("gpt2", "ia3"): (DeltaConfig(ia3=Ia3Config()), ()),
    ("gpt1", "ia3"): (DeltaConfig(ia3=Ia3Config()), ()),
    ("albert", "layers"): (of(targets=("layers[1,2].mlp", "attention.query")), ()),
    ("xlnet", "ia3"): (DeltaConfig(ia3=Ia3Config(("mlp.up",))), ()),
    ("llama biases", "biases"): (of(targets=("attention",)), ("attention/*/bias",)),
    ("bert labels", "biases and norms"): (of(), ("*bias", "*norm*/scale")),
    ("distilbert", "norms"): (DeltaConfig(norms=True), ("*norm*/scale", "*norm*/bias")),
    ("t5", "norms"): (DeltaConfig(norms=True), ("*norm*/scale",)),
    ("marian", "norms and LoRA"): (of(), ("mlp_norm/scale",)),
    ("llama", "pissa"): (of(start="pissa", alpha=3.0), ()),
    ("gpt2", "olora"): (of(start="olora", targets=("attention",)), ()),
    ("llama", "dora pissa"): (of(start="pissa", dora=True), ()),
    ("llama tied", "rows and table"): (dataclasses.replace(of(), token_rows=(4, 9)), ()),
    ("llama biases", "a bias beside LoRA"): (of(targets=("attention",)), ()),
}  # fmt: skip


@pytest.mark.parametrize("kind, name", OURS, ids=lambda x: x.replace(" ", "_"))
def test_our_deltas_there(kind, name, folders, tmp_path):
    loaded, (config, whole) = base(kind, folders(kind)), OURS[kind, name]
    params = jax.jit(lambda p: methods.attach(p, config, jax.random.key(0)))(loaded.params)
    if name == "a bias beside LoRA":
        params = paths.map_with_path(
            lambda p, w: Biased(w, np.zeros(w.shape[::2], np.float32)) if isinstance(w, Lora) else w, params,
            is_leaf=weights.is_node)  # fmt: skip
    rng, trains = np.random.default_rng(0), paths.matcher((*methods.trainable(params, config), *whole, "*/shift"))
    move = lambda path, x: np.asarray(x + 0.1 * rng.normal(size=x.shape), np.float32) if trains(path) else x
    params = paths.map_with_path(move, params)
    params = jax.tree.map(zero_padding, params, is_leaf=weights.is_node)
    original = loaded.params if "pissa" in name or "olora" in name else None
    peft_format.save(tmp_path, loaded.model, params, str(folders(kind)), whole=whole, original=original)
    theirs = peft.PeftModel.from_pretrained(fresh(kind, folders(kind)), tmp_path)
    want = our_logits(kind, loaded.model, params)
    np.testing.assert_allclose(their_logits(kind, theirs), want, rtol=1e-5, atol=1e-5)


def zero_padding(w):
    if not isinstance(w, LayeredLora):
        return w
    real = columns(w.ranks, w.a.shape[-1])
    return w.replace(a=w.a * real[:, None, :], b=w.b * real[:, :, None], scales=np.where(real.any(1), w.scales, 0))


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_lora_in_doubles(kind, folders, tmp_path, monkeypatch):
    """Families without rotary positions, whose frequencies theirs keeps in float32."""
    base(kind, folders(kind))
    model = peft.get_peft_model(fresh(kind, folders(kind)), ROWS[kind, "lora"]()).double()
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(tmp_path / "theirs")
    plain = {n.replace(".base_layer", ""): x for n, x in model.get_base_model().state_dict().items() if "lora" not in n}
    model.get_base_model().save_pretrained(tmp_path / "base", state_dict=plain)
    cls = MODELS[kind][0]
    with jax.enable_x64(True):
        loaded = interop.load(tmp_path / "base")
        params = peft_format.load(tmp_path / "theirs", loaded.model, loaded.params)
        ours = our_logits(kind, loaded.model, params)
        peft_format.save(tmp_path / "ours", loaded.model, params, str(tmp_path / "base"))
    again = peft.PeftModel.from_pretrained(
        cls.from_pretrained(tmp_path / "base", dtype=torch.float64), tmp_path / "ours", autocast_adapter_dtype=False
    )
    assert {x.dtype for x in again.parameters()} == {torch.float64}
    use_doubles(monkeypatch)
    for theirs in (model, again):
        np.testing.assert_allclose(ours, their_logits(kind, theirs), rtol=1e-10, atol=1e-10)


def test_peft_leaves_out_a_tied_output_layers_bias_beside_trained_rows(folders):
    """Why such rows are refused here: an adapter that changes nothing changes their logits by that bias."""
    base("bert", folders("bert"))
    plain = their_logits("bert", fresh("bert", folders("bert")))
    model = fresh("bert", folders("bert"))
    bias = model.cls.predictions.bias.detach().numpy()
    rows = their_logits("bert", peft.get_peft_model(model, Tokens(token_indices=[3])))
    np.testing.assert_allclose(plain - rows, np.broadcast_to(bias, plain.shape), rtol=1e-4, atol=1e-5)
