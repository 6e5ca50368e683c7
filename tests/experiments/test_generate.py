"""The binary that decodes: what it prints equals a direct computation, of prompts, lines, beams, pairs and chats."""

import dataclasses
import io
import json
import sys

import jax
import numpy as np
import pytest
from binaries import call
from pieces import marian_folder
from tiny_models import ENCODER_DECODERS, noise

from llm_jax import interop
from llm_jax.data import tokenizers
from llm_jax.decoding.beam import BeamConfig, BeamSearch
from llm_jax.decoding.generate import Completion, Generator
from llm_jax.models.t5 import T5Config

TEXT = "abc abd abe, abc abd abe. " * 20


def test_generate(folder, capsys, monkeypatch, tmp_path):
    loaded = interop.load(folder)
    ids = loaded.tokenizer.encode("abc")
    most = loaded.config.context_length - len(ids)
    g = Generator(loaded.model, loaded.params, loaded.tokenizer.eos_ids)
    (want,) = g.generate([ids], most, jax.random.key(0))
    text = loaded.tokenizer.decode(want.tokens)
    arguments = (f"--model={folder}", f"--max_new_tokens={most}")
    call("generate", *arguments, "--prompt=abc", "--json")
    found = json.loads(capsys.readouterr().out)
    assert found == {"text": text, "tokens": want.tokens, "logprobs": want.logprobs, "finish_reason": "length"}
    call("generate", *arguments, "--prompt=abc")
    assert capsys.readouterr().out == f"abc{text}\n"
    (tmp_path / "prompt.txt").write_text("abc")
    call("generate", *arguments, f"--prompt_file={tmp_path / 'prompt.txt'}")
    assert capsys.readouterr().out == f"abc{text}\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"abc")))
    call("generate", *arguments, f"--stop={text[3]}")
    assert capsys.readouterr().out == f"abc{text.partition(text[3])[0]}\n"
    call("generate", f"--model={folder}", "--prompt=abc", "--json")  # as many as fit
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == want.tokens and len(found["tokens"]) == most
    with pytest.raises(ValueError, match="32 tokens fill the context of 32"):
        call("generate", f"--model={folder}", f"--prompt={'abc abd ' * 4}")


@pytest.fixture(scope="module")
def translator(tmp_path_factory):
    """A random T5 and a character tokenizer."""
    path = tmp_path_factory.mktemp("translator")
    tokenizer = tokenizers.train([TEXT, "u"], "char", 1)
    config = T5Config(vocab_size=tokenizer.vocab_size, context_length=32, model_dim=16, num_layers=1, num_heads=2,
                      head_dim=8, hidden_dim=24, num_buckets=8, max_distance=8)  # fmt: skip
    model = config.make()
    interop.save(path, model, noise(model, 0.5), tokenizer)
    return path


def test_an_encoder_decoder_answers_line_by_line(translator, capsys, tmp_path, monkeypatch):
    loaded = interop.load(translator)
    lines = ("abc", "abd\x85abe\u2028", "u")  # line ends to Python, not to a file
    sources = [loaded.tokenizer.encode_source(line) for line in lines]
    search = BeamSearch(loaded.model, loaded.params, loaded.tokenizer.eos_ids, BeamConfig(3, penalty="gnmt"))
    want = [h for row in search.search(sources, 6, 2) for h in row]
    (tmp_path / "in.txt").write_text("\ufeff{}\n{}\n\n{}\r\n".format(*lines), newline="")
    arguments = (f"--model={translator}", f"--prompt_file={tmp_path / 'in.txt'}", "--max_new_tokens=6")
    call("generate", *arguments, "--beams=3", "--num_return=2", "--penalty=gnmt", "--json", "--batch_size=2")
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [f["text"] for f in found[4:6]] == ["", ""]  # two outputs of the empty line
    del found[4:6]
    assert [f["tokens"] for f in found] == [h.tokens for h in want] and len(found) == 6
    np.testing.assert_allclose([f["score"] for f in found], [h.score for h in want], rtol=1e-5)
    call("generate", *arguments)  # greedy
    generator = Generator(loaded.model, loaded.params, loaded.tokenizer.eos_ids)
    greedy = [loaded.tokenizer.decode(c.tokens) for c in generator.generate(sources, 6, jax.random.key(0))]
    assert capsys.readouterr().out == f"{greedy[0]}\n{greedy[1]}\n\n{greedy[2]}\n"
    monkeypatch.setattr(loaded.tokenizer.__class__, "decode", lambda self, ids: "x\ny")
    call("generate", *arguments)
    assert capsys.readouterr().out == "x y\nx y\n\nx y\n"  # what an output holds shifts no line


def test_text_of_flags_and_files_has_one_encoding(folder, tmp_path, capsys):
    (tmp_path / "prompt.txt").write_bytes("abc".encode("utf-16"))
    arguments = (f"--model={folder}", "--max_new_tokens=2")
    call("generate", *arguments, "--prompt=abc")
    want = capsys.readouterr().out
    call("generate", *arguments, f"--prompt_file={tmp_path / 'prompt.txt'}")
    assert capsys.readouterr().out == want
    (tmp_path / "prompt.txt").write_bytes(b"ab\xe9")
    for given in (f"--prompt_file={tmp_path / 'prompt.txt'}", "--prompt=ab\udce9"):
        with pytest.raises(ValueError, match=r"is not UTF-8 \(unexpected end of data at byte 2\): .*--encoding"):
            call("generate", *arguments, given)
        call("generate", *arguments, given, "--encoding=latin-1")
        assert capsys.readouterr().out.startswith("abé")


def test_beams_of_a_decoder(folder, capsys):
    call("generate", f"--model={folder}", "--prompt=abc", "--max_new_tokens=5", "--beams=2")
    loaded = interop.load(folder)
    search = BeamSearch(loaded.model, loaded.params, loaded.tokenizer.eos_ids, BeamConfig(2))
    ((best,),) = search.search([loaded.tokenizer.encode("abc")], 5)
    assert capsys.readouterr().out == f"{loaded.tokenizer.decode(best.tokens)}\n"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--beams=2", "--temperature=0.5"), "--temperature has no effect with --beams=2"),
        (("--num_return=2",), "--num_return has no effect with --beams=1"),
        (("--chat",), "is an encoder-decoder: it takes neither --chat nor --sliding_window"),
    ],
)
def test_flags_without_effect(arguments, words, translator):
    with pytest.raises(ValueError, match=words):
        call("generate", f"--model={translator}", "--prompt=abc", *arguments)


def test_evaluate_a_pair(translator, capsys):
    call("evaluate", f"--model={translator}", "--sentence=abc ||| abd")
    loaded = interop.load(translator)
    source, target = (np.array([loaded.tokenizer.encode_source(t)]) for t in ("abc", "abd"))
    first = np.concatenate([[[0]], target[:, :-1]], axis=1)
    logits = jax.jit(lambda p: loaded.model.apply({"params": p}, source, first).logits)(loaded.params)
    logp = np.asarray(jax.nn.log_softmax(logits))[0, np.arange(4), target[0]].sum()
    assert f"log p = {logp:.3f} (4 tokens" in capsys.readouterr().out
    for flag, words in (
        ("--sentence=abc", "not of the form 'SOURCE ||| TARGET'"),
        ("--next=abc", "is an encoder-decoder: give"),
    ):
        with pytest.raises(ValueError, match=words):
            call("evaluate", f"--model={translator}", flag)


def test_marians_sources_and_targets_reach_the_model_by_their_own_models(tmp_path, capsys, monkeypatch):
    _, vocab = marian_folder(tmp_path / "pieces")
    tokenizer = tokenizers.load(tmp_path / "pieces")
    config = dataclasses.replace(ENCODER_DECODERS["marian"], vocab_size=len(vocab))
    interop.save(tmp_path / "hf", config.make(), noise(config.make(), 0.3), tokenizer)
    loaded = interop.load(tmp_path / "hf")
    interop.save_own(tmp_path / "own", loaded.model, loaded.params, loaded.tokenizer)
    seen = []

    class Recorder:
        """Takes the sources down, and answers each with itself."""

        def __init__(self, model, params, eos_ids, sampling):
            assert eos_ids == (0,)

        def generate(self, batch, *args, **options):
            seen.extend(batch)
            return [Completion(ids, [0.0] * len(ids), "stop") for ids in batch]

    def score(model, params, source, target):
        seen.append((source.tolist(), target.tolist()))
        return np.array([[-1.0, -2.0]])

    monkeypatch.setattr("llm_jax.decoding.generate.Generator", Recorder)
    monkeypatch.setattr("llm_jax.decoding.score.target_logprobs", score)
    text, coded = "the usage of it", ">>fra<< the usage"
    assert tokenizer.encode_source(text) != tokenizer.target.encode_source(text)
    for folder in (tmp_path / "hf", tmp_path / "own"):
        call("generate", f"--model={folder}", f"--prompt={text}\n{coded}")
        assert capsys.readouterr().out == f"{text}\n{coded}\n"
        call("evaluate", f"--model={folder}", f"--sentence={text} ||| {text}")
        assert capsys.readouterr().out.startswith("log p = -3.000 (2 tokens")
    sources = [tokenizer.encode_source(t) for t in (text, coded)]
    assert seen == [*sources, ([sources[0]], [tokenizer.target.encode_source(text)])] * 2


def test_chat_goes_on_turn_by_turn(folder, tmp_path, capsys, monkeypatch):
    """A template of single letters: the second question is asked behind the first answer."""
    loaded = interop.load(folder)
    template = "{% for m in messages %}{{ m['content'] + ',' }}{% endfor %}"
    chatty = tokenizers.Tokenizer(loaded.tokenizer.backend, None, loaded.tokenizer.eos_ids, template)
    interop.save(tmp_path, loaded.model, loaded.params, chatty)
    g = Generator(loaded.model, loaded.params, chatty.eos_ids)
    say = lambda text: chatty.decode(g.generate([chatty.encode(text)], 3, jax.random.key(0))[0].tokens)
    first = say("a,")
    second = say(f"a,{first},b,")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\n\nb\n")))
    call("generate", f"--model={tmp_path}", "--chat", "--max_new_tokens=3")
    assert capsys.readouterr().out == f"{first}\n{second}\n"
