"""How PEFT finds modules by name, and the shortest names that it finds.

Source: peft 0.21's `check_target_module_exists`, `_set_trainable` and `get_pattern_key`.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

Match = Callable[[str, str], bool]  # (what a config says, name of a module)
T = TypeVar("T")


def is_end(end: str, name: str) -> bool:
    """Whether a name is `end` or ends with it at a dot: `target_modules`."""
    return name == end or name.endswith(f".{end}")


def is_tail(tail: str, name: str) -> bool:
    """Whether a name ends with `tail`, dot or not: `modules_to_save`, in which `norm` names `input_layernorm` too."""
    return name.endswith(tail)


def is_pattern(pattern: str, name: str) -> bool:
    """Whether a regular expression matches an end of a name at a dot: `rank_pattern`, `alpha_pattern`."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def value(patterns: Mapping[str, T], name: str, usual: T) -> T:
    """What the first pattern that matches says of a module."""
    return next((patterns[p] for p in patterns if is_pattern(p, name)), usual)


def ancestors(name: str) -> list[str]:
    """A module and the modules that hold it."""
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts) + 1)]


def is_saved(saved: Iterable[str], name: str) -> bool:
    """Whether `modules_to_save` stores a module whole, or one that holds it."""
    above = ancestors(name)
    return any(is_tail(tail, module) for tail in saved for module in above)


def is_named(names: str | Sequence[str] | None, name: str) -> bool:
    """Whether `target_modules` and the like name a module: a regular expression as a whole, or ends."""
    if isinstance(names, str):
        return re.fullmatch(names, name) is not None
    return any(is_end(end, name) for end in names or ())


def _layer_of(name: str, patterns: Sequence[str]) -> int | None:
    """The first number between dots, as PEFT finds it."""
    searches = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in patterns] or [r".*?\.[^.]*\.(\d+)\."]
    found = (re.match(search, name) for search in searches)
    return next((int(match[1]) for match in found if match), None)


def is_target(config: Any, name: str) -> bool:
    """Whether an adapter's config (`peft_config.AdapterConfig`) adapts a module."""
    is_whole = any(re.match(rf"(^|.*\.){m}($|\..*)", name) for m in config.saved)
    if is_named(config.exclude, name) or is_whole:
        return False
    if not is_named(config.targets, name):
        return False
    if isinstance(config.targets, str) or config.layers is None:
        return True
    return _layer_of(name, config.layers_pattern) in config.layers


def shortest(wanted: Sequence[str], others: Collection[str], match: Match) -> list[str]:
    """The shortest ends of names that together match all of `wanted` and none of `others`.

    Raises:
      ValueError: naming a module that cannot be named alone.
    """
    found: list[str] = []
    for name in wanted:
        if any(match(end, name) for end in found):
            continue
        parts = name.split(".")
        ends = (".".join(parts[-n:]) for n in range(1, len(parts) + 1))
        end = next((end for end in ends if not any(match(end, other) for other in others)), None)
        if end is None:
            same = next(other for other in others if match(name, other))
            raise ValueError(f"PEFT reads {name} as {same} too: both or neither can be stored")
        found.append(end)
    return sorted(found)
