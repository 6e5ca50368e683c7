"""Chats: text equal to hand-written strings, loss on the assistant's words only, strangers' templates kept in a box."""

import json

import pytest

from llm_jax.data import tokenizers
from llm_jax.data.chat import as_messages, chats, encode_chat, render
from llm_jax.data.corpora import BadRows, Document
from llm_jax.data.tokenizers import Tokenizer, TokenizerError

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'] | trim + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] + eos_token }}{% else %}{{ raise_exception('Only user and assistant!') }}"
    "{% endif %}{% endfor %}"
)
CHAT = [
    {"role": "user", "content": "Hi <é>"},
    {"role": "assistant", "content": "Héllo 😀\n\nyou"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Bye!"},
]


@pytest.fixture(scope="module")
def backend():
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>")
    return tokenizers.train(["Hello there you user assistant system"] * 4, "bpe", 290, special).backend


@pytest.fixture(scope="module")
def make(backend):
    return lambda template: Tokenizer(backend, backend.token_to_id("<s>"), [0], template)


TEXTS = [
    (CHATML, "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi <é><|im_end|>\n"
     "<|im_start|>assistant\nHéllo 😀\n\nyou<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
     "<|im_start|>assistant\nBye!<|im_end|>\n", "<|im_start|>assistant\n"),
    (LLAMA2, "<s>[INST] Hi <é> [/INST] Héllo 😀\n\nyou<|endoftext|><s>[INST] Bye [/INST] Bye!<|endoftext|>", ""),
    (None, "### user\nHi <é>\n\n### assistant\nHéllo 😀\n\nyou<|endoftext|>\n\n### user\nBye\n\n"
     "### assistant\nBye!<|endoftext|>\n\n", "### assistant\n"),
]  # fmt: skip
SPOKEN = [
    "Héllo 😀\n\nyou<|im_end|>Bye!<|im_end|>",
    " Héllo 😀\n\nyou<|endoftext|> Bye!<|endoftext|>",
    "Héllo 😀\n\nyou<|endoftext|>Bye!<|endoftext|>",
]


@pytest.mark.parametrize("case", range(3), ids=["chatml", "llama2", "plain"])
def test_text_and_loss_mask(case, make):
    template, text, prompt = TEXTS[case]
    tokenizer = make(template)
    assert render(tokenizer, CHAT) == text
    assert render(tokenizer, CHAT, add_generation_prompt=True) == text + prompt
    ids, weights = encode_chat(tokenizer, CHAT)
    decode = lambda wanted: tokenizer.decode([i for i, w in zip(ids, weights, strict=True) if w in wanted], False)
    assert decode((0, 1)) == text
    assert decode((1,)) == SPOKEN[case]  # the end of each turn is learned, what others say is not


def test_what_templates_may_use(make):
    rows = [
        ("{{ messages | tojson }}", json.dumps(CHAT, ensure_ascii=False)),
        ("{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.role }}{% endfor %}", "user"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "4"),
        ("a\n  {% if true %}\nb\n  {% endif %}\nc", "a\nb\nc"),  # blocks take their line along
        ("{{ strftime_now('%%') }}{{ bos_token }}{{ eos_token }}", "%<s><|endoftext|>"),
        ("{{ tools is none }}{{ documents is none }}{{ tools is defined }}", "TrueTrueTrue"),
        ("{{ unk_token is defined }}{{ pad_token is defined }}", "FalseFalse"),
        ("{{ messages[0] | tojson(separators=(',', ':')) }}", '{"role":"user","content":"Hi <é>"}'),
        (
            "{{ messages[0] | tojson(ensure_ascii=True, sort_keys=True) }}",
            '{"content": "Hi <\\u00e9>", "role": "user"}',
        ),
        ("{{ [1] | tojson(True, 2) }}{{ ['é'] | tojson(2) }}", '[\n  1\n]["\\u00e9"]'),
        ("{% for m in messages %}{% generation %}\n{{ m.role }}{% endgeneration %}{% endfor %}", "userassistant" * 2),
        ("{% generation %}{% set x = 1 %}{% endgeneration %}{{ x is defined }}", "False"),
    ]
    for template, want in rows:
        assert render(make(template), CHAT) == want


def test_templates_know_the_special_tokens_by_name(backend):
    named = {"bos_token": "<s>", "pad_token": "<|im_end|>", "image_token": "<image>"}
    template = "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ image_token }}{{ unk_token }}|"
    assert render(Tokenizer(backend, 3, [0], template, named), CHAT) == "<s><|endoftext|><|im_end|><image>|"
    assert render(Tokenizer(backend, None, [], "{{ bos_token is defined }}{{ eos_token }}"), CHAT) == "False"


U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}
PARTS = {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}


def test_templates_get_messages_whole(make):
    rows = [
        ("{{ messages[0].content is defined }}{{ messages[0].tool_calls[0].function.name }}", [CALL], "Falseadd"),
        ("{% for p in messages[0].content %}{{ p.text }}{% endfor %}", [PARTS], "onetwo"),
        ("{{ messages[0].reasoning_content }}{{ messages[0].thinking }}", [{**A, "reasoning": "why"}], "whywhy"),
        ("{{ messages[0].name }}{{ messages[0].other is defined }}", [{**U, "name": "Ann", "other": None}], "AnnFalse"),
        ("{{ tools[0].name }}{{ documents | length }}", [U], "add2"),
    ]
    for template, messages, want in rows:
        assert render(make(template), messages, tools=[{"name": "add"}], documents=[{}, {}]) == want


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ range(10**9) | list }}",
        "{% include '/etc/passwd' %}",
        "{{ raise_exception('no system messages\nhere') }}",
        "{% if %}",
        "{{ undefined.attribute }}",
        "{{ 1 / 0 }}",
    ],
)
def test_a_template_that_escapes_or_fails_is_one_line(template, make):
    with pytest.raises(TokenizerError, match="the chat template failed") as error:
        render(make(template), CHAT)
    assert "\n" not in str(error.value)


def test_a_template_that_rewrites_earlier_turns_is_refused(make):
    with pytest.raises(TokenizerError, match="one after the other"):
        encode_chat(make("{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"), CHAT)


RECORDS = [
    ({"messages": [U, A]}, [U, A]),
    ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, [U, A]),
    ({"conversations": [{"from": "system", "value": "s"}]}, [{"role": "system", "content": "s"}]),
    ({"instruction": "q", "output": "a"}, [U, A]),
    ({"instruction": "q", "input": "", "output": "a"}, [U, A]),
    ({"instruction": "do", "input": "x", "output": "a"}, [{"role": "user", "content": "do\n\nx"}, A]),
    ({"prompt": "q", "completion": "a"}, [U, A]),
    ({"messages": []}, None),
    ({"messages": ["q", A]}, None),
    ({"messages": [U, {"role": "assistant"}]}, None),
    ({"messages": [U, {"role": "assistant", "content": [{"type": "text"}]}]}, None),
    ({"messages": [PARTS, A]}, [PARTS, A]),
    (
        {"messages": [U, CALL, {"role": "tool", "content": "1", "name": "add"}]},
        [U, CALL, {"role": "tool", "content": "1", "name": "add"}],
    ),
    ({"messages": [U, {"role": "assistant", "content": None, "tool_calls": []}]}, None),
    ({"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}, A]}, None),
    ({"messages": [{"role": "user", "content": []}, A]}, None),
    ({"messages": [{"role": 3, "content": "q"}, A]}, None),
    ({"conversations": ["q"]}, None),
    ({"conversations": [{"from": ["human"], "value": "q"}]}, None),
    ({"prompt": "q", "completion": 3}, None),
    ({"messages": json.dumps([U, A])}, [U, A]),  # a table's column
    ({"messages": "q: a"}, None),
    ({"text": "q"}, None),
    ({}, None),
]


@pytest.mark.parametrize("record, want", RECORDS)
def test_record_shapes(record, want):
    assert as_messages(record) == want


def test_bad_rows_are_counted(make, caplog):
    tokenizer, bad = make(CHATML), BadRows()
    rows = [{"messages": [U, A]}, {"messages": [U]}, {"text": "q"}, None, {"prompt": "q", "completion": "a"}]
    found = list(chats(tokenizer)([Document(str(i), "", r) for i, r in enumerate(rows)], bad))
    assert bad.count == 3 and len(found) == 2 and found[0] == found[1] == encode_chat(tokenizer, [U, A])
    assert "no assistant turn" in caplog.text


def test_rows_that_cannot_be_written_are_named(make, caplog):
    """A row that the template refuses is a bad row like any other: it says why, and the other rows are read."""
    picky = "{{ tools | length if tools else '' }}{% for m in messages %}{{ m.content }}"
    picky += "{% if m.content == 'no' %}{{ raise_exception('not this') }}{% endif %}{% endfor %}"
    image = {"role": "user", "content": [{"type": "image", "url": "x"}]}
    rows = [
        ({"messages": [U, A]}, None),
        ({"messages": [{**U, "content": "no"}, A]}, "TemplateError: not this"),
        ({"messages": [image, A]}, "the content of message 1 has a part of type 'image'"),
        ({"messages": [U, {"role": "assistant"}]}, "the content of message 2 is neither text nor"),
        ({"messages": [U, A], "tools": "add"}, "tools is not JSON"),
        ({"messages": [U, A], "tools": {"name": "add"}}, "tools is not a list of objects"),
        ({"messages": []}, "no message"),
        ({"messages": [U, A], "tools": '[{"name": "add"}]', "documents": "[]"}, None),
    ]
    for record, why in rows:
        bad = BadRows()
        caplog.clear()
        found = list(chats(make(picky))([Document("a.jsonl:7", "", record)], bad))
        assert len(found) == (why is None) and bad.count == (why is not None)
        assert why is None or (why in caplog.text and "a.jsonl:7" in caplog.text)
    with_tools, without = (
        make(picky).decode(e.ids)
        for e in chats(make(picky))([Document("a", "", rows[-1][0]), Document("b", "", rows[0][0])], BadRows())
    )
    assert (with_tools, without) == ("1qa", "qa")
    for message in (PARTS, CALL):  # the plain template writes text only, and says so
        with pytest.raises(TokenizerError, match="content in parts and tool calls need"):
            render(make(None), [message])
