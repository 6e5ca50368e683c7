"""Chats: templates rendered in a sandbox, and which tokens the assistant said.

Source: transformers' `apply_chat_template` (version 5) for what a template finds.
"""

import datetime
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jinja2.ext
import jinja2.sandbox

from llm_jax.data.corpora import BadRows, Document
from llm_jax.data.tokenizers import Tokenizer, TokenizerError
from llm_jax.data.tokens import Encode, EncodedDocument

Message = Mapping[str, Any]

# for models without a template: plain turns, as instruction data sets write them
PLAIN_TEMPLATE = (
    "{% for m in messages %}{% if m['content'] is not string or m['tool_calls'] %}"
    "{{ raise_exception('content in parts and tool calls need a tokenizer with a chat template') }}{% endif %}"
    "{{ '### ' + m['role'] + '\\n' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant\\n' }}{% endif %}"
)
CHATS = ("messages", "conversations")  # fields that tables may keep as JSON text
REASONING = (
    "reasoning_content",
    "thinking",
    "reasoning",
)  # names of one field; templates read the first, or "thinking"


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`: marks what the assistant says, and leaves it as it is."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        """Parses the statements up to `{% endgeneration %}`."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json  # jinja2's own escapes HTML
    environment.globals |= {
        "raise_exception": _refuse,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
    }
    return environment.from_string(template)


def _seen(message: Message) -> dict[str, Any]:
    """A message as templates see it: without fields that are null, its reasoning under every name."""
    fields = {name: value for name, value in message.items() if value is not None}
    thought = next((fields[name] for name in REASONING if name in fields), None)
    return fields if thought is None else {"thinking": thought, **fields, "reasoning_content": thought}


def render(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    add_generation_prompt: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """The text of a chat by the tokenizer's template, or a plain one.

    Templates come from strangers: they run in jinja2's immutable sandbox.

    Args:
      tokenizer: its template and its special tokens by name.
      messages: turns with a `role` and `content`: text, or a list of `{"type": "text", "text"}`; other fields, such as
        tool calls, reach the template as they are.
      add_generation_prompt: end with what begins an assistant's turn.
      tools: JSON schemas of what the assistant may call.
      documents: `{"title", "text"}` that the assistant may use.

    Raises:
      TokenizerError: if the template fails or refuses the messages.
    """
    template = tokenizer.tool_template if tools is not None else None
    try:
        return _compiled(template or tokenizer.chat_template or PLAIN_TEMPLATE).render(
            **tokenizer.special_tokens,
            messages=[_seen(message) for message in messages],
            tools=None if tools is None else list(tools),
            documents=None if documents is None else list(documents),
            add_generation_prompt=add_generation_prompt,
        )
    except Exception as e:  # a stranger's template may raise anything
        raise TokenizerError(f"the chat template failed: {type(e).__name__}: {' '.join(str(e).split())}") from e


def as_messages(record: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """A chat from a JSON row of one of the usual shapes, None for any other.

    `{"messages": [{"role", "content"}]}`, `{"conversations": [{"from", "value"}]}`,
    `{"instruction", "input"?, "output"}`, `{"prompt", "completion"}`. Messages keep their other fields (`tool_calls`).
    """
    try:
        return _messages(record)
    except _NoChat:
        return None


class _NoChat(ValueError):
    """Why a row is not a chat."""


def _messages(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    record = {name: _parsed(value, name) if name in CHATS else value for name, value in record.items()}
    if isinstance(record.get("messages"), list):
        turns = record["messages"]
    elif isinstance(record.get("conversations"), list):
        roles = {"human": "user", "gpt": "assistant"}
        said = [turn if isinstance(turn, dict) else {} for turn in record["conversations"]]
        names = [turn.get("from") for turn in said]
        turns = [
            {"role": roles.get(name, name) if isinstance(name, str) else None, "content": turn.get("value")}
            for name, turn in zip(names, said, strict=True)
        ]
    elif "instruction" in record and "output" in record:
        asked = "\n\n".join(str(record[k]) for k in ("instruction", "input") if record.get(k))
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": record["output"]}]
    elif "prompt" in record and "completion" in record:
        turns = [
            {"role": "user", "content": record["prompt"]},
            {"role": "assistant", "content": record["completion"]},
        ]
    else:
        raise _NoChat("no messages, conversations, instruction/output or prompt/completion")
    if not turns:
        raise _NoChat("no message")
    for number, turn in enumerate(turns, 1):
        _check_turn(turn, f"message {number}")
    return turns


def _check_turn(turn: Any, where: str) -> None:
    """Refuses what no template can write.

    Raises:
      _NoChat: that says why.
    """
    if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
        raise _NoChat(f"{where} is not an object with a role")
    content = turn.get("content")
    if content is None and turn.get("tool_calls"):
        return
    if isinstance(content, list) and content:
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind != "text" or not isinstance(part.get("text"), str):
                raise _NoChat(f"the content of {where} has a part of type {kind!r}; parts hold type='text' and a text")
    elif not isinstance(content, str):
        raise _NoChat(f"the content of {where} is neither text nor a list of parts, and there are no tool_calls")


def _parsed(value: Any, name: str) -> Any:
    """Parses a field that a table stores as JSON text."""
    try:
        return json.loads(value) if isinstance(value, str) and value.strip() else value
    except ValueError as e:
        raise _NoChat(f"{name} is not JSON: {e}") from e


def _objects(record: Mapping[str, Any], name: str) -> list[dict[str, Any]] | None:
    """A field of objects (tools, documents), which tables keep as JSON text; None where it is empty."""
    value = _parsed(record.get(name), name)
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(x, dict) for x in value):
        raise _NoChat(f"{name} is not a list of objects")
    return value


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
) -> EncodedDocument:
    """Ids of a chat, and weight 1 for what the assistant said (end of turn included), 0 for the rest.

    Args:
      tokenizer: its template writes the chat, begin tokens included.
      messages: see `render`.
      tools: see `render`.
      documents: see `render`.

    Raises:
      TokenizerError: if the template renders a turn differently once later turns follow.
    """
    written = functools.partial(render, tokenizer, tools=tools, documents=documents)
    text = written(messages)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = written(messages[:i], add_generation_prompt=True)
        after = written(messages[: i + 1])
        if not after.startswith(before) or not text.startswith(after):
            raise TokenizerError("the chat template does not render turns one after the other; cannot find the spans")
        spans.append((len(before), len(after.rstrip("\n"))))
    encoded = tokenizer.encoding(text)
    inside = lambda start: any(a <= start < b for a, b in spans)
    return EncodedDocument(encoded.ids, [int(inside(start)) for start, _ in encoded.offsets])


def chats(tokenizer: Tokenizer) -> Encode:
    """Encodes JSON rows of chats and instructions; the loss falls on the assistant's turns only.

    A row that is not a chat, or that the template refuses, is a bad row.
    """

    def encode(batch: Sequence[Document], bad: BadRows) -> Iterator[EncodedDocument]:
        for document in batch:
            record = document.record or {}
            try:
                messages = _messages(record)
                if not any(m["role"] == "assistant" for m in messages):
                    raise _NoChat("no assistant turn")
                example = encode_chat(tokenizer, messages, _objects(record, "tools"), _objects(record, "documents"))
            except (_NoChat, TokenizerError) as e:
                bad.add(document.name, str(e))
                continue
            yield example

    return encode
