"""What all binaries share: flags, devices, typed configs, and errors as one line."""

import dataclasses
import glob
import importlib.util
import json
import logging
import os
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import app, flags
from absl import logging as absl_logging
from etils import epath
from ml_collections import config_dict, config_flags

from llm_jax import config as configs
from llm_jax.models import registry

PARSE_ERRORS = (flags.Error, AttributeError, TypeError, ValueError, KeyError, FileNotFoundError, ImportError)
SIMULATE = flags.DEFINE_integer("simulate_devices", 0, "Give a CPU run this many devices.", lower_bound=0)


def as_config_dict(config: Any) -> config_dict.ConfigDict:
    """A frozen dataclass as a ConfigDict that flags can override, with the types of its fields."""
    from llm_jax.training import recipes

    out = config_dict.ConfigDict()
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        nests = dataclasses.is_dataclass(value)  # apart, so that a type checker does not take the class from it
        if nests:
            nested = as_config_dict(value)
            if type(value) in registry.FAMILIES.values():
                nested.family = registry.family_of(value)
            if type(value) in recipes.RECIPES:
                nested.name = value.tag
            out[field.name] = nested
        elif value is None:
            out[field.name] = config_dict.placeholder(_optional_type(hints[field.name]))
        else:
            out[field.name] = value
    return out


def _optional_type(hint: Any) -> type:
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    first = next(o for o in options if o is not type(None))
    first = typing.get_origin(first) or first
    return dict if dataclasses.is_dataclass(first) else first


def from_config_dict(cls: Any, values: config_dict.ConfigDict) -> Any:
    """The frozen dataclass, built once from final values."""
    plain = values.to_dict()
    return cls.from_dict(plain) if hasattr(cls, "from_dict") else configs.from_dict(cls, plain)


def setup_devices() -> None:
    """Applies `--simulate_devices` and joins the job of `JAX_COORDINATOR_ADDRESS`; call before touching a device."""
    import jax

    from llm_jax.parallel import processes

    if SIMULATE.value:
        # XLA's threads: waiting in a collective they must not keep other devices from coming to it
        os.environ.setdefault("NPROC", str(8 * SIMULATE.value))
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", SIMULATE.value)
    processes.join()


def find_model(name: Any) -> str:
    """A path or hub name as it is; the name of an installed package that carries a model: the file or folder in it."""
    if os.path.exists(name) or not name.isidentifier():
        return name
    spec = importlib.util.find_spec(name)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        found = sorted(glob.glob(os.path.join(folder, "*.gguf")))
        found += sorted(
            os.path.dirname(f) for f in glob.glob(os.path.join(folder, "**", "*.safetensors"), recursive=True)
        )
        if found:
            return found[0]
    return name


def define_model() -> flags.FlagHolder[Any]:
    """The `--model` flag, for `find_model`."""
    help_text = "HF folder, .gguf, work directory, hub name, or installed model package."
    return flags.DEFINE_string("model", None, help_text, required=True)


def define_average() -> flags.FlagHolder[Any]:
    """The `--average` flag, for `interop.load`."""
    return flags.DEFINE_bool(
        "average", None, "Take the moving average (training.ema) of a work directory; by default where it keeps one."
    )


def define_stream() -> flags.FlagHolder[Any]:
    """The `--stream` flag, for `interop.load`."""
    return flags.DEFINE_bool("stream", False, "Leave layers on disk and read each when it runs: models beyond memory.")


def define_accept_changed_data() -> flags.FlagHolder[Any]:
    """The `--accept_changed_data` flag of binaries that resume, for `training.run.train`."""
    return flags.DEFINE_bool("accept_changed_data", False, "Resume although data files were replaced since.")


class _Text(flags.ArgumentParser):
    """Text for a model; bytes of an argument that are not UTF-8 come as halves of surrogate pairs."""

    def parse(self, argument: str) -> str:
        """The argument; raises ValueError, which becomes one line."""
        try:
            argument.encode()
        except UnicodeEncodeError as e:
            raise ValueError(f"is not UTF-8 at character {e.start}") from None
        return argument


def define_text(name: str, help_text: str) -> flags.FlagHolder[Any]:
    """A flag whose value is text for a model."""
    return flags.DEFINE(_Text(), name, None, help_text)


def define_texts(name: str, help_text: str) -> flags.FlagHolder[Any]:
    """A flag of text that may be repeated."""
    return flags.DEFINE_multi(_Text(), flags.ArgumentSerializer(), name, [], help_text)


def define_encoding() -> flags.FlagHolder[Any]:
    """The `--encoding` flag of binaries that read text, for `storage.text_files`."""
    help_text = "Encoding of text without a byte order mark, as latin-1; UTF-8 by default; replace: U+FFFD for errors."
    return flags.DEFINE_string("encoding", None, help_text)


def text_of(source: str, encoding: str | None) -> Any:
    """A `TextFile` of a file, or of stdin where `source` is `-`."""
    from llm_jax.storage.text_files import TextFile

    stdin: Any = sys.stdin.buffer if source == "-" else None
    return TextFile("stdin" if source == "-" else source, encoding, stdin)


def define_config(default: str | None, help_text: str) -> flags.FlagHolder[Any]:
    """The `--config=FILE[:variant]` flag with dotted overrides; overrides of the default file are read right here."""
    try:
        return config_flags.DEFINE_config_file("config", default, help_text, lock_config=True)
    except PARSE_ERRORS as e:
        _fail(_one_line(e), 2)


def need(*wanted: flags.FlagHolder[Any]) -> None:
    """Refuses a command without these flags."""
    for flag in wanted:
        if not flag.value:
            raise ValueError(f"--{flag.name} is missing")


def write_json(file: flags.FlagHolder[Any], results: Any) -> None:
    """Writes results to the file of a flag, where it is given."""
    if file.value:
        epath.Path(file.value).write_text(json.dumps(results, indent=2))


def _fail(message: str, code: int) -> typing.NoReturn:
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    together = "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized()
    os._exit(code) if code == 130 or together else sys.exit(code)  # at exit a job's processes wait for each other


def _command(given: Sequence[str], commands: Mapping[str, Sequence[flags.FlagHolder[Any]]]) -> str | None:
    """The command that was asked for, which takes the flags that were given."""
    if commands and (not given or given[0] not in commands):
        _fail(f"expected one of {', '.join(commands)}" + (f", not {given[0]!r}" if given else ""), 2)
    if len(given) > bool(commands):
        _fail(f"unexpected argument {given[bool(commands)]!r}; flags start with --", 2)
    if not commands:
        return None
    takers: dict[str, list[str]] = {}
    for command, of in commands.items():
        for flag in of:
            takers.setdefault(flag.name, []).append(command)
    for name, takes in takers.items():
        if flags.FLAGS[name].present and given[0] not in takes:
            _fail(f"--{name} belongs to {', '.join(takes)}, not to {given[0]}", 2)
    return given[0]


def run(main: Callable[..., None], commands: Mapping[str, Sequence[flags.FlagHolder[Any]]] | None = None) -> None:
    """Runs a binary; expected errors become one line on stderr.

    The exit code is 1, 130 when interrupted, and 2 where the same command would fail again (`ConfigError.exit_code`).

    Args:
      main: takes nothing, or the command.
      commands: which flags each takes; the first argument names one.
    """

    def wrapped(argv: Sequence[str]) -> None:
        command = _command(argv[1:], commands or {})
        absl_logging.set_verbosity(absl_logging.ERROR)  # orbax reports every file
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        for name in ("llm_jax", "experiments"):
            logging.getLogger(name).addHandler(handler)
            logging.getLogger(name).setLevel(logging.INFO)
            logging.getLogger(name).propagate = False
        from llm_jax.parallel import processes

        try:
            setup_devices()
            main() if command is None else main(command)
        except KeyboardInterrupt as e:
            _fail((str(e) or "interrupted") + ("" if command else "; run the same command again to resume"), 130)
        except BrokenPipeError:
            sys.exit(1)
        except (ValueError, TypeError, RuntimeError, OSError, MemoryError, ImportError) as e:
            if os.environ.get("LLM_JAX_TRACEBACK"):
                raise
            text = str(e).strip() or type(e).__name__
            hint = " (too little memory: a smaller training.batch_size, accumulation, or plan.remat=full helps)"
            hint = "" if command else hint
            memory = isinstance(e, MemoryError) or "RESOURCE_EXHAUSTED" in text
            first = next((line for line in text.splitlines() if line.strip()), type(e).__name__)
            _fail(processes.explain(first) + (hint if memory else ""), getattr(e, "exit_code", 1))

    app.run(wrapped, flags_parser=_parse)


def _parse(argv: Sequence[str]) -> list[str]:
    """Absl's parser; a bad flag or config value is one line."""
    for flag, value in zip(argv, [*argv[1:], ""], strict=True):
        name, equals, given = flag.partition("=")
        file = (given if equals else value).partition(":")[0]
        if name.lstrip("-") == "config" and name.startswith("-") and not os.path.exists(file):
            _fail(f"no config file at {file}", 2)
    try:
        return flags.FLAGS(list(argv), known_only=False)
    except PARSE_ERRORS as e:
        _fail(_one_line(e), 2)


def _one_line(error: BaseException) -> str:
    inner = error
    while inner.args and isinstance(inner.args[0], BaseException):  # ml_collections wraps a KeyError
        inner = inner.args[0]
    text = str(inner.args[0]) if isinstance(inner, KeyError) and inner.args else str(inner)
    if "Traceback" in text:  # a config file that raises: its own message is the last line
        text = text.strip().splitlines()[-1]
    text = " ".join(text.split()).replace('"', "").encode(errors="replace").decode()
    return f"unknown config field {text}" if isinstance(error, (AttributeError, KeyError)) else text
