import dataclasses
import json

import pytest

from llm_jax import config
from llm_jax.training.optimizers import OptimizerConfig
from llm_jax.training.run_config import RunConfig


@dataclasses.dataclass(frozen=True)
class Inner:
    width: int = 3
    names: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Outer:
    rate: float = 0.5
    on: bool = False
    title: str = "a"
    limit: int | None = None
    inner: Inner = Inner()
    maybe: Inner | None = None
    shape: tuple[int, ...] = (1, 2)
    extra: dict | None = None

    def __post_init__(self):
        if self.rate < 0:
            raise ValueError(f"rate={self.rate} must not be negative")


VALUES = [
    Outer(),
    Outer(limit=4, maybe=Inner(7, ("a", "b")), shape=(), extra={"k": [1, 2]}),
    Outer(rate=2.0, on=True, inner=Inner(names=("x",))),
]


@pytest.mark.parametrize("value", VALUES)
def test_round_trip_through_json(value):
    assert config.from_dict(Outer, json.loads(json.dumps(config.to_dict(value)))) == value


def test_a_whole_run_round_trips_and_is_hashable():
    run = RunConfig()
    again = RunConfig.from_dict(json.loads(json.dumps(run.to_dict())))
    assert again == run and hash(again) == hash(run)


@pytest.mark.parametrize("fields", [{"name": "lion", "eps": 0.5}, {"name": "adafactor", "b1": 0.0}, {"noam_dim": 64}])
def test_a_setting_without_effect_reaches_its_refusal(fields):
    """Through the door that flags and config files take."""
    values = {**RunConfig().to_dict(), "optimizer": {**config.to_dict(OptimizerConfig()), **fields}}
    with pytest.raises(config.ConfigError, match="has no effect with name="):
        RunConfig.from_dict(values)
    assert RunConfig.from_dict({"optimizer": {"name": "adamw", "final_ratio": 0.0}}).optimizer.final_ratio == 0.0


def test_missing_fields_take_defaults_and_integers_become_floats():
    built = config.from_dict(Outer, {"rate": 1, "inner": {}})
    assert built == Outer(rate=1.0) and type(built.rate) is float


@pytest.mark.parametrize(
    "values, words",
    [
        ({"rat": 1.0}, ["unknown field rat", "rate"]),
        ({"inner": {"widht": 1}}, ["inner.widht", "width"]),
        ({"zzz": 1}, ["unknown field zzz", "rate", "shape"]),  # nothing near: all are named
        ({"rate": "fast"}, ["rate takes float", "'fast'"]),
        ({"rate": True}, ["rate takes float", "True"]),
        ({"limit": 1.5}, ["limit takes int", "1.5"]),
        ({"limit": True}, ["limit takes int", "True"]),
        ({"on": 1}, ["on takes bool", "1"]),
        ({"title": 3}, ["title takes str", "3"]),
        ({"shape": "12"}, ["shape takes a sequence"]),
        ({"shape": [1, "2"]}, ["shape takes int", "'2'"]),
        ({"inner": 3}, ["inner takes a dictionary", "3"]),
        ({"maybe": {"width": None}}, ["maybe.width takes int", "None"]),
        ({"rate": -1}, ["rate=-1.0 must not be negative"]),
        ([1], ["Outer takes a dictionary"]),
    ],
)
def test_a_bad_value_is_named(values, words):
    with pytest.raises(config.ConfigError) as e:
        config.from_dict(Outer, values)
    assert all(w in str(e.value) for w in words), e.value
