"""Chats as transformers' `apply_chat_template` writes them."""

import json

import pytest
from transformers import PreTrainedTokenizerFast

from llm_jax.data import chat, tokenizers

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2]}}}
TALK = [
    {"role": "system", "content": "Sé <kind>"},
    {"role": "user", "content": [{"type": "text", "text": "Hé"}, {"type": "text", "text": "you"}]},
    {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning": "so"},
    {"role": "tool", "name": "add", "content": "3"},
    {"role": "assistant", "content": "Yo", "thinking": "why"},
]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"a": "int"}}}]
TEMPLATES = {
    "names": "{{ bos_token }}{{ eos_token }}{{ unk_token }}{{ pad_token }}{{ image_token }}{{ sep_token is defined }}",
    "tools": "{{ tools is none }}{{ tools is defined }}{{ documents is none }}{{ documents is defined }}{{ tools }}",
    "fields": "{% for m in messages %}{{ m.keys() | list }}{{ m.content is defined }}{{ m.thinking }}{% endfor %}",
    "whole": "{{ messages }}",
    "json": "{{ messages | tojson }}{{ messages | tojson(true) }}{{ tools | tojson(indent=2, separators=(',', ':')) }}",
    "by position": "{{ messages | tojson(false, 4, none, true) }}{{ messages | tojson(2) }}",
    "generation": "{% for m in messages %}\n  {%- generation %}\n  {{ m.role }} {% set x = m.role %}\n"
    "{% endgeneration -%}\n {{ x }}{% endfor %}",
    "loops": "{% for m in messages %}{% if loop.index == 2 %}{% continue %}{% endif %}{{ m.role }}{% endfor %}",
    "namespace": "{% set n = namespace(k=0) %}{% for m in messages %}{% set n.k = n.k + 1 %}{% endfor %}"
    "{{ n.k }}{{ dict(a=1) }}",
    "prompt": "{% if add_generation_prompt %}go{% endif %}",
}  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("place", ["settings", "file", "list"])
def test_text(name, place, tmp_path):
    backend = tokenizers.train(["hello"], "bpe", 300, ("<|endoftext|>", "<s>", "<pad>", "<unk>", "<img>")).backend
    backend.save(str(tmp_path / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "<|endoftext|>", "pad_token": "<pad>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **named, "image_token": "<img>"}
    template = TEMPLATES[name]
    if place == "file":
        (tmp_path / "chat_template.jinja").write_text(template)
    several = [{"name": "default", "template": template}, {"name": "tool_use", "template": "with " + template}]
    settings["chat_template"] = {"settings": template, "file": "older", "list": several}[place]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    theirs, ours = PreTrainedTokenizerFast.from_pretrained(tmp_path), tokenizers.load(tmp_path)
    for more in ({}, {"tools": TOOLS}, {"documents": [{"title": "a", "text": "b"}]}, {"add_generation_prompt": True}):
        want = theirs.apply_chat_template(TALK, tokenize=False, **more)
        assert chat.render(ours, TALK, **more) == want
