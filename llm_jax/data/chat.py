"""Chats: templates rendered in a sandbox, and which tokens the assistant said."""

import datetime
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jinja2.sandbox

from llm_jax.data.corpora import BadRows, Document
from llm_jax.data.tokenizers import Tokenizer, TokenizerError
from llm_jax.data.tokens import Encode, Example

Message = Mapping[str, str]

# for models without a template: plain turns, as instruction data sets write them
PLAIN_TEMPLATE = (
    "{% for m in messages %}{{ '### ' + m['role'] + '\\n' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant\\n' }}{% endif %}"
)


def render(tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
    """The text of a chat by the tokenizer's template, or a plain one.

    Templates come from strangers: they run in jinja2's immutable sandbox.

    Raises:
      TokenizerError: if the template fails or refuses the messages.
    """

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda x, indent=None: json.dumps(x, ensure_ascii=False, indent=indent)
    environment.globals |= {
        "raise_exception": refuse,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
    }
    try:
        template = environment.from_string(tokenizer.chat_template or PLAIN_TEMPLATE)
        return template.render(
            messages=list(messages),
            add_generation_prompt=add_generation_prompt,
            bos_token=tokenizer.special(tokenizer.bos_id),
            eos_token=tokenizer.special(tokenizer.eos_id),
        )
    except Exception as e:  # a stranger's template may raise anything
        raise TokenizerError(f"the chat template failed: {type(e).__name__}: {' '.join(str(e).split())}") from e


def as_messages(record: Mapping[str, Any]) -> list[dict[str, str]] | None:
    """A chat from a JSON row of one of the usual shapes, None for any other.

    `{"messages": [{"role", "content"}]}`, `{"conversations": [{"from", "value"}]}`,
    `{"instruction", "input"?, "output"}`, `{"prompt", "completion"}`.
    """
    if isinstance(record.get("messages"), list):
        turns: list[Any] = [_turn(m, "role", "content") for m in record["messages"]]
    elif isinstance(record.get("conversations"), list):
        roles: dict[Any, Any] = {"human": "user", "gpt": "assistant"}
        named = [_turn(m, "from", "value") for m in record["conversations"]]
        turns = [(roles.get(role, role) if isinstance(role, str) else None, text) for role, text in named]
    elif "instruction" in record and "output" in record:
        asked = "\n\n".join(str(record[k]) for k in ("instruction", "input") if record.get(k))
        turns = [("user", asked), ("assistant", record["output"])]
    elif "prompt" in record and "completion" in record:
        turns = [("user", record["prompt"]), ("assistant", record["completion"])]
    else:
        return None
    if not turns or any(not isinstance(r, str) or not isinstance(c, str) for r, c in turns):
        return None
    return [{"role": r, "content": c} for r, c in turns]


def _turn(message: Any, role: str, content: str) -> tuple[Any, Any]:
    return (message.get(role), message.get(content)) if isinstance(message, dict) else (None, None)


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Message]) -> Example:
    """Ids of a chat, and weight 1 for what the assistant said (end of turn included), 0 for the rest.

    Raises:
      TokenizerError: if the template renders a turn differently once later turns follow.
    """
    text = render(tokenizer, messages)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(tokenizer, messages[:i], add_generation_prompt=True)
        after = render(tokenizer, messages[: i + 1])
        if not after.startswith(before) or not text.startswith(after):
            raise TokenizerError("the chat template does not render turns one after the other; cannot find the spans")
        spans.append((len(before), len(after.rstrip("\n"))))
    encoded = tokenizer.backend.encode(text, add_special_tokens=False)
    inside = lambda start: any(a <= start < b for a, b in spans)
    return Example(encoded.ids, [int(inside(start)) for start, _ in encoded.offsets])


def chats(tokenizer: Tokenizer) -> Encode:
    """Encodes JSON rows of chats and instructions; the loss falls on the assistant's turns only."""

    def encode(batch: Sequence[Document], bad: BadRows) -> Iterator[Example]:
        for document in batch:
            messages = as_messages(document.record or {})
            if messages is None:
                bad.add(document.name, "no messages, conversations, instruction/output or prompt/completion")
            elif not any(m["role"] == "assistant" for m in messages):
                bad.add(document.name, "no assistant turn")
            else:
                yield encode_chat(tokenizer, messages)

    return encode
