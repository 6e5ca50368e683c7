"""One call to load whatever a path holds, one to write it back as a Hugging Face folder."""

import dataclasses
import functools
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.typing import DTypeLike

from llm_jax.data import tokenizers
from llm_jax.delta import node
from llm_jax.delta.scaled import Biased, Scaled
from llm_jax.interop import elmo, names, sources, streamed, work_directory
from llm_jax.interop import gguf as gguf_names
from llm_jax.interop.huggingface import bert, gpt, heads, llama, marian, t5, xlnet
from llm_jax.interop.names import InteropError, Rule
from llm_jax.interop.work_directory import Place
from llm_jax.models import parameters, registry
from llm_jax.models.elmo import ElmoConfig
from llm_jax.nn import paths, weights
from llm_jax.nn.execution import Execution
from llm_jax.nn.protocols import Model, ModelConfig, Params
from llm_jax.nn.realized import realize
from llm_jax.nn.stack import stack
from llm_jax.storage.gguf import GgufFile
from llm_jax.storage.safetensors import write_folder

log = logging.getLogger(__name__)


class Family(Protocol):
    """A module of `interop.huggingface`: one family's config and names there.

    It may have `fit(config, names of tensors) -> config` and `with_head(config, head, labels) -> config` besides.
    """

    def config_from_hf(self, c: dict[str, Any], /) -> Any:
        """Our config, from the contents of `config.json`."""

    def config_to_hf(self, config: Any, /) -> dict[str, Any]:
        """The contents of `config.json`."""

    def root(self, config: Any, /) -> str:
        """The prefix of their names in classes with a head."""

    def rules(self, config: Any, /) -> list[Rule]:
        """Rules that give the checkpoint's tensor for each of our parameters."""

    def ignored(self, config: Any, name: str, /) -> bool:
        """Whether the tensor `name` of a checkpoint has no counterpart here."""


FAMILIES: dict[str, Family] = {
    "gpt2": gpt,
    "openai-gpt": gpt,
    **dict.fromkeys(llama.MODEL_TYPES, llama),
    **dict.fromkeys(bert.TABLE, bert),
    "marian": marian,
    "t5": t5,
    "mt5": t5,
    "xlnet": xlnet,
}
WRITERS: dict[str, Family] = {
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


class Pretrained(NamedTuple):
    """A loaded model.

    Attributes:
      model: Linen module; `model.apply({"params": params}, input_ids)`.
      params: stacked parameter tree.
      tokenizer: None where the path holds none.
      config: the model's config.
    """

    model: Model
    params: Params
    tokenizer: tokenizers.Tokenizer | None
    config: Any


class Source(NamedTuple):
    """A model in another library's files, before its tensors are read.

    Attributes:
      config: our config.
      tensors: their tensors by name, read lazily.
      rules: where each of our parameters is.
      ignored: says which of their tensors we do not need.
      tokenizer: None where the files hold none.
      fresh: initial values of a head that the files may lack.
      dtype: of floating parameters where none is asked for; None for theirs.
    """

    config: Any
    tensors: Mapping[str, np.ndarray]
    rules: Sequence[Rule]
    ignored: Callable[[str], bool]
    tokenizer: tokenizers.Tokenizer | None
    fresh: Mapping[str, Any] | None = None
    dtype: DTypeLike | None = None


def load(
    path: epath.PathLike,
    *,
    dtype: DTypeLike | None = None,
    execution: Execution = Execution(),
    place: Place | None = None,
    average: bool | None = None,
    head: str | None = None,
    labels: Sequence[str] = (),
    stream: bool = False,
    base: epath.PathLike | None = None,
) -> Pretrained:
    """Loads a Hugging Face folder, a `.gguf` file, a work directory of ours, ELMo's files, or a repository of the hub.

    Loading streams tensor by tensor; nothing is unpickled. A folder without safetensors may hold an `.onnx` file, whose
    weights are read dequantized.

    Args:
      path: file or folder; `org/name` is fetched with `huggingface_hub` if no such folder exists.
      dtype: dtype of floating parameters; as stored by default (GGUF: float32).
      execution: how the model runs.
      place: `(abstract params, logical axes) -> shardings` (a plan's `param_shardings`); one device by default.
      average: the moving average (`training.ema`) of a work directory, or its last parameters; by default the average
        where the run kept one.
      head: another head than the one that a Hugging Face folder or ELMo's files have (see the model's config);
        parameters that the folder lacks are initialised.
      labels: names of that head's classes.
      stream: leave the layers in their file and read each one when it runs, the next while it computes: for inference
        of models larger than memory (`interop.streamed`), from a Hugging Face folder or a `.gguf` file. The returned
        model reads the file as long as it lives; its layers' parameters are empty arrays.
      base: where the frozen base of a delta run's work directory is now, if it moved (see `interop.referenced`).

    Raises:
      InteropError, StorageError, CheckpointError, TokenizerError, BaseError: one line that names what is wrong.
    """
    found = sources.find(path)
    if found.is_file() and found.suffix in (*sources.PICKLES, ".safetensors", ".json"):
        raise InteropError(f"{found} is not a model: give the folder of config.json and *.safetensors, or a .gguf file")
    is_ours = work_directory.is_in(found)
    if average and not is_ours:
        raise InteropError(f"{path} is not a work directory of ours and holds no moving average")
    if (head is not None or labels) and (found.is_file() or is_ours):
        raise InteropError(f"{path} is not a Hugging Face folder: only those take another head (experiments.convert)")
    if stream and is_ours:
        raise InteropError(
            f"{path} is a work directory of ours, which cannot stream: experiments.convert writes a folder"
        )
    if base is not None and not is_ours:
        raise InteropError(f"{path} is not a work directory of ours and takes no base={str(base)!r}")
    if is_ours:
        model, params = work_directory.load(found, dtype, execution, place, average, load, base)
        return Pretrained(model, params, _tokenizer(found, model.config), model.config)
    elmo_files = None if found.is_file() or (found / "config.json").exists() else elmo.find(found)
    if found.is_file():
        source = _gguf(found)
    elif elmo_files is not None:
        source = _elmo(found, elmo_files, head, labels)
    else:
        source = _huggingface(found, head, labels)
    model, params = _read(str(path), source, execution, dtype, place, stream)
    return Pretrained(model, params, source.tokenizer, source.config)


def _read(
    where: str, source: Source, execution: Execution, dtype: DTypeLike | None, place: Place | None, stream: bool
) -> tuple[Model, Params]:
    """The module and its parameters."""
    if stream and (place is not None or execution.stack_runner is not None):
        raise InteropError(f"{where}: stream=True is for one device, without place and without a stack_runner")
    config, dtype = source.config, dtype or source.dtype
    shapes, axes = parameters.declared(config)
    read = functools.partial(
        names.read_params,
        source.tensors,
        source.rules,
        shapes,
        source.ignored,
        where,
        dtype=dtype,
        shardings=None if place is None else place(shapes, axes),
        padded=lambda path: path in PADDED and config.vocab_pad_multiple > 1,
        fresh=source.fresh,
    )
    if not stream:
        return config.make(execution), read()
    params = read(left=paths.is_stacked)
    runner = streamed.runner(source.tensors, source.rules, shapes, where, dtype)
    return config.make(dataclasses.replace(execution, stack_runner=runner)), params


def _gguf(path: epath.Path) -> Source:
    file = GgufFile(path)
    config = gguf_names.config_of(file)
    rules = gguf_names.rules(config, file.metadata["general.architecture"])
    tokenizer = gguf_names.tokenizer_of(file.metadata)
    if tokenizer is not None:
        _check_entries(tokenizer, config)
    return Source(config, file, rules, gguf_names.ignored, tokenizer, dtype=jnp.float32)


def _elmo(path: epath.Path, files: tuple[epath.Path, epath.Path], head: str | None, labels: Sequence[str]) -> Source:
    config, tensors = elmo.read(*files)
    fresh = None
    if head is not None or labels:
        config = elmo.with_head(config, head or "classification", labels)
        fresh = elmo.fresh(config)
    ignored = lambda name: fresh is not None and name.startswith("softmax/")
    tokenizer = _tokenizer(path, config) or tokenizers.blanks()
    return Source(config, tensors, elmo.rules(config), ignored, tokenizer, fresh)


def _huggingface(path: epath.Path, head: str | None, labels: Sequence[str]) -> Source:
    kind, config = _config(path)
    family = FAMILIES[kind]
    tensors = sources.tensors_of(path)
    if hasattr(family, "fit"):
        config = family.fit(config, tensors.keys())
    root = family.root(config)
    rules, fresh = family.rules(config), None
    ignored: Callable[[str], bool] = functools.partial(family.ignored, config)
    if head is not None or labels:
        if not hasattr(config, "head"):
            raise InteropError(f"{path}: a {kind} model takes no other head")
        stored, ignored_there = rules, ignored
        try:
            config = getattr(family, "with_head", _with_head)(config, head or config.head, labels)
        except ValueError as e:
            raise InteropError(f"{path}: {e}") from e
        rules = _under(root, family.root(config), family.rules(config))
        unused = {r.theirs for r in stored} - {r.theirs for r in rules}
        ignored = lambda name: name in unused or ignored_there(name) or family.ignored(config, name)
        fresh = _fresh_head(config)
    rules = _with_their_spelling(rules, root, tensors)
    return Source(config, tensors, rules, ignored, _tokenizer(path, config), fresh)


def _config(path: epath.Path) -> tuple[str, Any]:
    """The `model_type` of a folder, and our config of it."""
    file = path / "config.json"
    if not file.exists():
        if (path / "adapter_config.json").exists():
            raise InteropError(f"{path} holds a PEFT adapter: load its base first, and give this to interop.peft.load")
        raise InteropError(f"{path} holds no model: config.json is missing")
    try:
        raw = json.loads(file.read_text())
        kind = raw["model_type"]
        generation = path / "generation_config.json"  # where newer folders keep what is never generated
        if "bad_words_ids" not in raw and generation.exists():
            raw["bad_words_ids"] = json.loads(generation.read_text()).get("bad_words_ids")
    except (ValueError, KeyError, TypeError) as e:
        raise InteropError(f"{file} is not a model config: {type(e).__name__}: {e}") from e
    if kind not in FAMILIES:
        raise InteropError(f"{file}: model_type {kind!r} is not supported; there are {', '.join(FAMILIES)}")
    try:
        return kind, FAMILIES[kind].config_from_hf(raw)
    except InteropError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise InteropError(f"{file} lacks or misstates {e}") from e


def _fresh_head(config: Any) -> dict[str, np.ndarray]:
    """A head's initial values, from key 0: with one layer below it, since the layers are read."""
    shared = {"num_groups": None, "group_size": 1} if hasattr(config, "num_groups") else {}
    model = dataclasses.replace(config, num_layers=1, **shared).make()

    def init() -> dict[str, jax.Array]:  # under jit nothing else is computed
        boxed = model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
        return {path: x for path, x in paths.flatten(weights.split_axes(boxed)[0]) if _is_of_head(path)}

    return jax.device_get(jax.jit(init)())


def _with_head(config: Any, head: str, labels: Sequence[str]) -> Any:
    return dataclasses.replace(config, head=head, labels=tuple(labels) or config.labels)


def _is_of_head(path: str) -> bool:
    return path.split("/")[0] in heads.PARTS


def _renamed(rules: Sequence[Rule], change: Callable[[str], str]) -> list[Rule]:
    return [dataclasses.replace(r, theirs=change(r.theirs)) for r in rules]


def _under(root: str, other: str, rules: list[Rule]) -> list[Rule]:
    """The rules of a class that puts `other` before the names of the model, for a file that has `root` there."""
    if root == other:
        return rules
    of_head = [r for r in rules if _is_of_head(r.ours)]
    rest = [r for r in rules if r not in of_head]
    return of_head + _renamed(rest, lambda name: root + name.removeprefix(other))


def _with_their_spelling(rules: list[Rule], root: str, tensors: Mapping[str, np.ndarray]) -> list[Rule]:
    """Checkpoints of headless classes leave the prefix out, or keep it; old ones say gamma and beta."""
    if any(name.endswith("LayerNorm.gamma") for name in tensors):
        rules = _renamed(rules, lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma"))
        rules = _renamed(rules, lambda name: name.replace("LayerNorm.bias", "LayerNorm.beta"))
    has_root = any(r.theirs.startswith(root) for r in rules)
    wants_root = any(name.startswith(root) for name in tensors)
    if has_root and not wants_root:
        return _renamed(rules, lambda name: name.removeprefix(root))
    return _renamed(rules, lambda name: root + name) if wants_root and not has_root else rules


def _tokenizer(path: epath.Path, config: ModelConfig) -> tokenizers.Tokenizer | None:
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


def _check_entries(tokenizer: tokenizers.Tokenizer, config: ModelConfig) -> None:
    """Warns of entries that the model has no row for: a text with one of them is refused."""
    rows, size = getattr(config, "vocab_size", 0), tokenizer.vocab_size
    if not rows:  # an ELMo without an output layer
        return
    if size > rows:
        log.warning(
            "the tokenizer has %d entries and the model %d rows: texts with %r%s are refused",
            size,
            rows,
            tokenizer.token(rows),
            " and the like" if size > rows + 1 else "",
        )
    # an id that neither knows ends nothing
    tokenizer.eos_ids = tuple(i for i in tokenizer.eos_ids if i < max(rows, size))


def save(
    path: epath.PathLike,
    model: Model,
    params: Params,
    tokenizer: tokenizers.Tokenizer | None = None,
    dtype: DTypeLike | None = None,
) -> None:
    """Writes a folder that `transformers` loads: config, model*.safetensors, tokenizer files; ELMo's own for ELMo.

    Structured weights (LoRA, quantized) are written as the dense matrices they stand for. Deltas that change biases too
    (IA3, biases) are merged first.

    Args:
      path: folder.
      model: the module.
      params: stacked or unstacked.
      tokenizer: written beside the model.
      dtype: dtype of what is written; that of the parameters by default.

    Raises:
      InteropError: if the architecture has no place for a parameter or a config field.
    """
    config, params = model.config, _with_biases(realize(params))
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


def _with_biases(params: Params) -> Params:
    """Merges all deltas where one changes a bias, which its dense matrix does not show."""
    if not any(isinstance(d, (Scaled, Biased)) for w in node.of(params).values() for d in node.layers_of(w)):
        return params
    try:
        return node.merge(params)
    except node.DeltaError as e:
        raise InteropError(str(e)) from e
