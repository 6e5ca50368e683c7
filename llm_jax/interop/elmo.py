"""ELMo's own files: `*options.json` and `*weights.hdf5`.

Source: the layout that https://github.com/allenai/bilm-tf writes.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.typing import DTypeLike

from llm_jax import config as configs
from llm_jax.interop import names
from llm_jax.interop.names import InteropError, Rule
from llm_jax.models.elmo import DIRECTIONS, ElmoConfig
from llm_jax.nn import paths, weights
from llm_jax.nn.protocols import Params
from llm_jax.nn.stack import stack

OPTIONS, WEIGHTS = "*options.json", "*weights.hdf5"
# ours -> (their group, their field)
FIELDS = {
    "character_dim": ("char_cnn", "embedding"),
    "num_highways": ("char_cnn", "n_highway"),
    "num_characters": ("char_cnn", "n_characters"),
    "max_characters": ("char_cnn", "max_characters_per_token"),
    "activation": ("char_cnn", "activation"),
    "cell_clip": ("lstm", "cell_clip"),
    "projection_clip": ("lstm", "proj_clip"),
    "model_dim": ("lstm", "projection_dim"),
    "hidden_dim": ("lstm", "dim"),
    "num_layers": ("lstm", "n_layers"),
    "residual": ("lstm", "use_skip_connections"),
}
# fields of its training; nothing here computes with them
INERT = (
    *("all_clip_norm_val", "batch_size", "n_epochs", "n_gpus", "n_negative_samples_batch", "n_train_tokens"),
    *("unroll_steps", "share_embedding_softmax", "sample_softmax", "bidirectional"),
)

# our parameters of a head with labels, which no file of theirs has
HEAD = ("mix/weights", "mix/gamma", "classifier/kernel", "classifier/bias")


def find(folder: epath.Path) -> tuple[epath.Path, epath.Path] | None:
    """(options, weights) of a folder, None where it is not an ELMo."""
    found = [sorted(folder.glob(pattern)) for pattern in (OPTIONS, WEIGHTS)]
    return (found[0][0], found[1][0]) if all(found) else None


def config_of(options: Mapping[str, Any], vocab_size: int = 0) -> ElmoConfig:
    """Our config from the contents of `options.json`.

    Raises:
      InteropError: naming a field that is missing or unknown.
    """
    groups = {"char_cnn": {"filters"}, "lstm": set()}
    for group, field in FIELDS.values():
        groups[group].add(field)
    unknown = sorted(options.keys() - set(INERT) - groups.keys() - {"dropout", "n_tokens_vocab"})
    unknown += [f"{g}.{f}" for g, fields in groups.items() for f in sorted(options.get(g, {}).keys() - fields)]
    if unknown:
        raise InteropError(f"options.json has {', '.join(unknown)}, which this library does not know")
    try:
        values = {ours: options[group][field] for ours, (group, field) in FIELDS.items()}
        values["character_dim"] = values["character_dim"]["dim"]
        filters = options["char_cnn"]["filters"]
        values |= {"widths": [w for w, _ in filters], "filters": [n for _, n in filters]}
    except (KeyError, TypeError, ValueError) as e:
        raise InteropError(f"options.json lacks or misstates {e}") from e
    clips = {k: None if values[k] is None else float(values[k]) for k in ("cell_clip", "projection_clip")}
    values |= {**clips, "dropout": float(options.get("dropout", 0.0)), "vocab_size": vocab_size}
    return configs.from_dict(ElmoConfig, values)


def options_of(config: ElmoConfig) -> dict[str, Any]:
    """The contents of `options.json` for our config."""
    out: dict[str, Any] = {"char_cnn": {}, "lstm": {}, "dropout": config.dropout}
    for ours, (group, field) in FIELDS.items():
        out[group][field] = getattr(config, ours)
    out["char_cnn"]["embedding"] = {"dim": config.character_dim}
    out["char_cnn"]["filters"] = [list(pair) for pair in zip(config.widths, config.filters, strict=True)]
    if config.vocab_size:
        out["n_tokens_vocab"] = config.vocab_size
    return out


def _fused(config: ElmoConfig, index: int, path: str, theirs: str) -> Rule:
    """Input and recurrent kernels lie in one array, the first above the second."""
    part = (index, (config.model_dim, config.model_dim))
    return Rule(path, theirs, transposed=True, part=part, forward=np.transpose, backward=np.transpose)


def rules(config: ElmoConfig) -> list[Rule]:
    """Where each of our parameters is; their table has no row for id 0."""
    c = config
    out = [
        Rule(
            "words/characters/embedding",
            "char_embed",
            forward=lambda x: np.concatenate([np.zeros_like(x[:1]), x]),
            backward=lambda x: x[1:],
        )
    ]
    for i, (width, count) in enumerate(zip(c.widths, c.filters, strict=True)):
        flat = lambda x: x.reshape(-1, x.shape[-1])
        deep = lambda x, w=width, n=count: x.reshape(1, w, c.character_dim, n)
        out.append(Rule(f"words/filters_{i}/kernel", f"CNN/W_cnn_{i}", forward=flat, backward=deep))
        out.append(Rule(f"words/filters_{i}/bias", f"CNN/b_cnn_{i}"))
    pairs = [(f"highway_{i}/{k}", f"CNN_high_{i}", k) for i in range(c.num_highways) for k in ("carry", "transform")]
    for ours, group, kind in (*pairs, ("projection", "CNN_proj", "proj")):
        out.append(Rule(f"words/{ours}/kernel", f"{group}/W_{kind}"))
        out.append(Rule(f"words/{ours}/bias", f"{group}/b_{kind}"))
    for number, direction in enumerate(DIRECTIONS):
        cell = f"RNN_{number}/RNN/MultiRNNCell/Cell{{l}}/LSTMCell"
        ours = f"{direction}/layers/lstm"
        out.append(_fused(c, 0, f"{ours}/input/kernel", f"{cell}/W_0"))
        out.append(_fused(c, 1, f"{ours}/recurrent", f"{cell}/W_0"))
        out.append(Rule(f"{ours}/input/bias", f"{cell}/B"))
        out.append(Rule(f"{ours}/projection", f"{cell}/W_P_0"))
    if c.vocab_size:
        out.append(Rule("head/kernel", "softmax/W", transposed=True))
        out.append(Rule("head/bias", "softmax/b"))
    return out + ([] if c.head == "none" else [Rule(name, name) for name in HEAD])


def with_head(config: ElmoConfig, head: str, labels: Sequence[str]) -> ElmoConfig:
    """The same features under a head with labels: without the words' output layer and without dropout inside.

    Raises:
      InteropError: if there is no such head.
    """
    try:
        return dataclasses.replace(config, head=head, labels=tuple(labels) or config.labels, vocab_size=0, dropout=0.0)
    except ValueError as e:
        raise InteropError(f"ELMo: {e}") from e


def fresh(config: ElmoConfig) -> dict[str, jax.Array]:
    """Initial values, from key 0, of the mix and the classifier, which no file holds."""

    def init() -> dict[str, jax.Array]:  # under jit nothing else is computed
        ids = np.zeros((1, 2), np.int32)
        params = weights.split_axes(config.make().init(jax.random.key(0), ids)["params"])[0]
        return {p: x for p, x in paths.flatten(params) if p in HEAD}

    return jax.jit(init)()


def read(options: epath.Path, file: epath.Path) -> tuple[ElmoConfig, dict[str, np.ndarray]]:
    """Config and tensors.

    Raises:
      InteropError: if a file is broken, or h5py is not installed.
    """
    try:
        import h5py
    except ImportError as e:
        raise InteropError(f"{file} needs h5py: pip install 'llm_jax[elmo]'") from e
    tensors: dict[str, np.ndarray] = {}
    try:
        with h5py.File(file) as f:
            f.visititems(lambda name, x: tensors.update({name: x[...]}) if isinstance(x, h5py.Dataset) else None)
        contents = json.loads(options.read_text())
    except (OSError, ValueError) as e:
        raise InteropError(f"{file} or {options.name} cannot be read: {e}") from e
    head = tensors.get("softmax/W")
    return config_of(contents, 0 if head is None else head.shape[0]), tensors


def write(folder: epath.PathLike, config: ElmoConfig, params: Params, dtype: DTypeLike | None = None) -> None:
    """Writes `options.json` and `weights.hdf5`.

    Raises:
      InteropError: if a parameter has no place (that of a head with labels has none), the row of id 0 is not zero, or
        h5py is not installed.
    """
    if config.head != "none":
        raise InteropError(f"ELMo's format has no place for head={config.head!r}: keep the work directory")
    try:
        import h5py
    except ImportError as e:
        raise InteropError("ELMo's format needs h5py: pip install 'llm_jax[elmo]'") from e
    params = jax.device_get(stack(params))
    table = dict(paths.flatten(params))["words/characters/embedding"]
    if np.any(np.asarray(table[0])):
        raise InteropError("words/characters/embedding has a row for id 0, which ELMo's format leaves out: zero it")
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = {"head/kernel": config.vocab_size, "head/bias": config.vocab_size}
    with h5py.File(folder / "weights.hdf5", "w") as f:
        for name, array in names.write_params(params, rules(config), rows, dtype):
            f.create_dataset(name, data=array)
    (folder / "options.json").write_text(json.dumps(options_of(config), indent=2) + "\n")
