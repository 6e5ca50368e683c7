"""One call to load whatever a path holds, one to write it back as a Hugging Face folder."""

import dataclasses
import functools
import json
import logging
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath

from llm_jax.data import tokenizers
from llm_jax.interop import elmo, names, streamed
from llm_jax.interop import gguf as gguf_names
from llm_jax.interop.huggingface import bert, gpt, heads, llama, marian, t5, xlnet
from llm_jax.interop.names import InteropError
from llm_jax.models import parameters, registry
from llm_jax.models.elmo import ElmoConfig
from llm_jax.nn import paths, weights
from llm_jax.nn.execution import Execution
from llm_jax.nn.stack import stack
from llm_jax.storage import flax_msgpack, safetensors
from llm_jax.storage.gguf import GgufFile
from llm_jax.storage.onnx import OnnxFile
from llm_jax.storage.safetensors import TensorFolder, write_folder

log = logging.getLogger(__name__)
FAMILIES = {
    "gpt2": gpt,
    "openai-gpt": gpt,
    **dict.fromkeys(llama.MODEL_TYPES, llama),
    **dict.fromkeys(bert.TABLE, bert),
    "marian": marian,
    "t5": t5,
    "mt5": t5,
    "xlnet": xlnet,
}
WRITERS: dict[str, Any] = {
    "gpt": gpt,
    "llama": llama,
    "bert": bert,
    "transformer": marian,
    "t5": t5,
    "xlnet": xlnet,
}
# their rows may be padded
PADDED = (
    *("embed/embedding", "head/kernel", "head/bias", "head/output/kernel", "head/output/bias"),
    "logits_bias",
)
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")

Place = Callable[[Any, Any], Any]


class Pretrained(NamedTuple):
    """A loaded model.

    Attributes:
      model: Linen module; `model.apply({"params": params}, input_ids)`.
      params: stacked parameter tree.
      tokenizer: None where the path holds none.
      config: the model's config.
    """

    model: Any
    params: Any
    tokenizer: tokenizers.Tokenizer | None
    config: Any


def load(
    path: epath.PathLike,
    *,
    dtype: Any = None,
    execution: Execution = Execution(),
    place: Place | None = None,
    average: bool = False,
    head: str | None = None,
    labels: Sequence[str] = (),
    stream: bool = False,
) -> Pretrained:
    """Loads a Hugging Face folder, a `.gguf` file, a work directory of ours, ELMo's files, or a repository of the hub.

    Loading streams tensor by tensor; nothing is unpickled. A folder without safetensors may hold an `.onnx` file, whose
    weights are read dequantized.

    Args:
      path: where; `org/name` is fetched with `huggingface_hub` if no such folder exists.
      dtype: cast floating parameters; as stored by default (GGUF: float32).
      execution: how the model runs.
      place: `(abstract params, logical axes) -> shardings` (a plan's `param_shardings`); one device by default.
      average: the moving average (`training.ema`) of a work directory, in the place of the last parameters.
      head: of a Hugging Face folder or ELMo's files: another head than its own (see the model's config); what the
        folder lacks of it is initialised.
      labels: names of that head's classes.
      stream: leave the layers in their file and read each one when it runs, the next while it computes: for inference
        of models larger than memory (`interop.streamed`), of a Hugging Face folder or a `.gguf` file. The model that
        is returned reads the file as long as it lives; its layers' parameters are empty arrays.

    Raises:
      InteropError, StorageError, CheckpointError, TokenizerError: one line that names what is wrong.
    """
    found = _find(path)
    if found.is_file() and found.suffix in (*PICKLES, ".safetensors", ".json"):
        raise InteropError(f"{found} is no model: give its folder with config.json and *.safetensors, or a .gguf file")
    if average and not (found / "checkpoints").exists():
        raise InteropError(f"{path} is no work directory of ours and holds no moving average")
    if (head is not None or labels) and (found.is_file() or (found / "checkpoints").exists()):
        raise InteropError(f"{path} is no Hugging Face folder: only those take another head (experiments.convert)")
    read = functools.partial(_read, str(path), execution, dtype, place, stream)
    if found.is_file():
        return _load_gguf(found, read)
    if (found / "checkpoints").exists():
        if stream:
            raise InteropError(
                f"{path} is a work directory of ours, which cannot stream: experiments.convert writes a folder"
            )
        return _load_own(found, dtype, execution, place, average)
    originals = None if (found / "config.json").exists() else elmo.find(found)
    if originals is not None:
        config, tensors = elmo.read(*originals)
        fresh = None
        if head is not None or labels:
            config = elmo.with_head(config, head or "classification", labels)
            fresh = elmo.fresh(config)
        ignored = lambda name: fresh is not None and name.startswith("softmax/")
        model, params = read(config, tensors, elmo.rules(config), ignored, fresh)
        return Pretrained(model, params, _tokenizer(found, config) or tokenizers.blanks(), config)
    return _load_huggingface(found, read, head, labels)


def _find(path: epath.PathLike) -> epath.Path:
    found = epath.Path(path)
    if found.exists():
        return found
    if not _REPOSITORY.fullmatch(str(path)):
        raise InteropError(f"no model at {path}")
    try:
        import huggingface_hub
    except ImportError as e:
        raise InteropError(f"no folder {path}; to fetch it from the hub: pip install 'llm_jax[hub]'") from e
    try:
        fetch = lambda *more: epath.Path(
            huggingface_hub.snapshot_download(
                str(path),
                allow_patterns=["*.json", "*.jinja", "*.spm", "spiece.model", "merges.txt", "vocab.txt", *more],
            )
        )
        got = fetch("*.safetensors")
        return got if safetensors.has_model(got) else fetch(flax_msgpack.PATTERN)
    except Exception as e:
        raise InteropError(f"{path} is no local folder and could not be fetched from the hub: {e}") from e


def _initial(config: Any) -> Any:
    """A head's first values, from key 0: computed for one layer, since the layers are read."""
    shared = {"num_groups": None, "group_size": 1} if hasattr(config, "num_groups") else {}
    changes: Any = {"num_layers": 1, **shared}
    model = dataclasses.replace(config, **changes).make()
    boxed = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    return jax.device_get(weights.split_axes(boxed)[0])


def _read(where, execution, dtype, place, stream, config, source, rules, ignored, fresh=None, kind=None):
    """The module and its parameters; `kind` is the dtype where none was asked for."""
    if stream and (place is not None or execution.stack_runner is not None):
        raise InteropError(f"{where}: stream=True is for one device, without place and without a stack_runner")
    dtype, model = dtype or kind, config.make(execution)
    shapes, axes = parameters.declared(config)
    padded = lambda p: p in PADDED and config.vocab_pad_multiple > 1
    shardings = None if place is None else place(shapes, axes)
    read = functools.partial(names.read_params, source, rules, shapes, ignored, where, dtype, shardings, padded, fresh)
    if not stream:
        return model, read()
    params = read(left=paths.is_stacked)
    runner = streamed.runner(source, rules, shapes, where, dtype)
    return config.make(dataclasses.replace(execution, stack_runner=runner)), params


def _load_gguf(path, read):
    file = GgufFile(path)
    config = gguf_names.config_of(file)
    rules = gguf_names.rules(config, file.metadata["general.architecture"])
    model, params = read(config, file, rules, gguf_names.ignored, kind=jnp.float32)
    tokenizer = gguf_names.tokenizer_of(file.metadata)
    if tokenizer is not None:
        _check_entries(tokenizer, config)
    return Pretrained(model, params, tokenizer, config)


def _load_huggingface(path, read, head, labels):
    file = path / "config.json"
    if not file.exists():
        if (path / "adapter_config.json").exists():
            raise InteropError(f"{path} holds a PEFT adapter: load its base first, and give this to interop.peft.load")
        raise InteropError(f"{path} holds no model: config.json is missing")
    try:
        raw = json.loads(file.read_text())
        kind = raw["model_type"]
        words = path / "generation_config.json"  # where newer folders keep what is never generated
        if "bad_words_ids" not in raw and words.exists():
            raw["bad_words_ids"] = json.loads(words.read_text()).get("bad_words_ids")
    except (ValueError, KeyError, TypeError) as e:
        raise InteropError(f"{file} is no model config: {type(e).__name__}: {e}") from e
    if kind not in FAMILIES:
        raise InteropError(f"{file}: model_type {kind!r} is not supported; there are {', '.join(FAMILIES)}")
    family: Any = FAMILIES[kind]
    try:
        config = family.config_from_hf(raw)
    except InteropError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise InteropError(f"{file} lacks or misstates {e}") from e
    source = _tensors(path)
    if hasattr(family, "fit"):
        config = family.fit(config, source.keys())
    root = family.root(config)
    rules, ignored, fresh = family.rules(config), functools.partial(family.ignored, config), None
    if head is not None or labels:
        if not hasattr(config, "head"):
            raise InteropError(f"{path}: a {kind} model takes no other head")
        own, its_ignored = rules, ignored
        try:
            config = getattr(family, "with_head", _with_head)(config, head or config.head, labels)
        except ValueError as e:
            raise InteropError(f"{path}: {e}") from e
        rules = _under(root, family.root(config), family.rules(config))
        spare = {r.theirs for r in own} - {r.theirs for r in rules}
        ignored = lambda n: n in spare or its_ignored(n) or family.ignored(config, n)
        flat = paths.flatten(_initial(config))
        fresh = {p: x for p, x in flat if _of_a_head(p)}
    rules = _with_their_spelling(rules, root, source)
    tokenizer = _tokenizer(path, config)
    model, params = read(config, source, rules, ignored, fresh)
    return Pretrained(model, params, tokenizer, config)


def _tokenizer(path, config):
    if not tokenizers.exists(path):
        return None
    try:
        tokenizer = tokenizers.load(path)
    except tokenizers.FamilyError as e:  # the model may be wanted alone
        log.warning("read without a tokenizer: %s", e)
        return None
    tokenizer.token_types = getattr(config, "num_token_types", 0) > 1
    _check_entries(tokenizer, config)
    return tokenizer


def _check_entries(tokenizer: tokenizers.Tokenizer, config: Any) -> None:
    """Says which entries the model has no row for: a text with one is refused, any other is read."""
    rows, size = getattr(config, "vocab_size", 0), tokenizer.vocab_size
    if not rows:  # an ELMo without an output layer
        return
    if size > rows:
        log.warning(
            "the tokenizer has %d entries and the model %d rows: texts with %r%s are refused",
            *(size, rows, tokenizer.token(rows), " and the like" if size > rows + 1 else ""),
        )
    # what neither can say ends nothing
    tokenizer.eos_ids = tuple(i for i in tokenizer.eos_ids if i < max(rows, size))


def _tensors(path):
    """Their tensors by name: safetensors, or else an old Flax file, or else an ONNX graph; never a pickle."""
    if not safetensors.has_model(path):
        if flax_msgpack.is_in(path):
            return flax_msgpack.read(path)
        graphs = sorted(p.name for p in path.glob("*.onnx"))
        if len(graphs) > 1:
            raise InteropError(f"{path} holds {', '.join(graphs)}: leave the one that is to be read")
        if graphs:
            return OnnxFile(path / graphs[0])
        pickles = sorted(p.name for suffix in PICKLES for p in path.glob(f"*{suffix}"))
        if pickles and not any(path.glob("*.safetensors")):
            raise InteropError(
                f"{path} holds pickles only ({pickles[0]}), which are never read: convert to safetensors"
            )
    return TensorFolder(path)


def _with_head(config, head, labels):
    return dataclasses.replace(config, head=head, labels=tuple(labels) or config.labels)


def _of_a_head(path):
    return path.split("/")[0] in heads.PARTS


def _under(root, other, rules):
    """The rules of a class that puts `other` before the names of the model, for a file that has `root` there."""
    rename = lambda r: r if _of_a_head(r.ours) else dataclasses.replace(r, theirs=root + r.theirs.removeprefix(other))
    return rules if root == other else [rename(r) for r in rules]


def _with_their_spelling(rules, root, source):
    """Checkpoints of headless classes leave the prefix out, or keep it; old ones say gamma and beta."""
    rename = lambda change: [dataclasses.replace(r, theirs=change(r.theirs)) for r in rules]
    if any(n.endswith("LayerNorm.gamma") for n in source):
        old = lambda n: n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        rules = rename(old)
    here, there = (any(n.startswith(root) for n in names) for names in ([r.theirs for r in rules], source))
    if here and not there:
        return rename(lambda n: n.removeprefix(root))
    return rename(lambda n: root + n) if there and not here else rules


def _load_own(path, dtype, execution, place, average):
    from llm_jax.storage.checkpoints import Checkpoints

    try:
        config = registry.from_dict(json.loads((path / "config.json").read_text())["model"])
    except (OSError, ValueError, KeyError) as e:
        raise InteropError(f"{path} is no work directory of ours: {e}") from e
    model = config.make(execution)
    _, axes = parameters.declared(config)
    checkpoints = Checkpoints(path / "checkpoints", read_only=True)
    put = None if place is None else lambda shapes: place(shapes, axes)
    params, _ = checkpoints.restore_params(average=average, cast=dtype, place=put)
    parameters.check(model, params)
    return Pretrained(model, params, _tokenizer(path, config), config)


def save(
    path: epath.PathLike, model: Any, params: Any, tokenizer: tokenizers.Tokenizer | None = None, dtype: Any = None
) -> None:
    """Writes a folder that `transformers` loads: config, model*.safetensors, tokenizer files; ELMo's own for ELMo.

    Structured weights (LoRA, quantized) are written as the dense matrices they stand for.

    Args:
      path: folder.
      model: the module.
      params: stacked or unstacked.
      tokenizer: written beside it.
      dtype: cast; as they are by default.

    Raises:
      InteropError: if the architecture has no place for a parameter or a config field.
    """
    config = model.config
    if isinstance(config, ElmoConfig):
        elmo.write(path, config, params, dtype)
        if tokenizer is not None:
            tokenizer.save(path)
        return
    family = WRITERS[registry.family_of(config)]
    theirs = family.config_to_hf(config)
    leaves = jax.tree.leaves(params)
    floating = [x.dtype for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)]
    theirs["dtype"] = theirs["torch_dtype"] = jnp.dtype(dtype or floating[0]).name
    if tokenizer is not None:
        ends = list(tokenizer.eos_ids)
        theirs["bos_token_id"] = tokenizer.bos_id
        theirs["eos_token_id"] = ends if len(ends) > 1 else ends[0] if ends else theirs.get("eos_token_id")
    real = dict.fromkeys(PADDED, config.vocab_size)
    write_folder(path, names.write_params(stack(params), family.rules(config), real, dtype))
    folder = epath.Path(path)
    (folder / "config.json").write_text(json.dumps(theirs, indent=2) + "\n")
    if tokenizer is not None:
        tokenizer.save(folder)


def save_own(path: epath.PathLike, model: Any, params: Any, tokenizer: tokenizers.Tokenizer | None = None) -> None:
    """Writes a work directory as training leaves it, with one checkpoint: structured weights stay structured.

    Raises:
      InteropError: if `path` holds a run already.
      CheckpointError: where the disk refuses.
    """
    from llm_jax.storage.checkpoints import Checkpoints

    folder = epath.Path(path)
    if (folder / "checkpoints").exists():
        raise InteropError(f"{folder} holds a run already; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    parameters.check(model, params)
    config = {"model": registry.to_dict(model.config)}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if tokenizer is not None:
        tokenizer.save(folder)
    checkpoints = Checkpoints(folder / "checkpoints", asynchronous=False)
    checkpoints.save(0, {"params": params}, {"config": config})
    checkpoints.close()
