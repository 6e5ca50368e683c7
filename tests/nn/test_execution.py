import pytest

from llm_jax.nn.execution import Execution


@pytest.mark.parametrize(
    "remat, every", [("none", 0), ("dots", 1), ("full", 1), ("every:3", 3), ("names:attention,mlp", 1)]
)
def test_remat_modes(remat, every):
    execution = Execution(remat=remat)
    assert execution.remat_every() == every and callable(execution.remat_policy())
    assert hash(execution) == hash(Execution(remat=remat))


@pytest.mark.parametrize(
    "wrong",
    [{"remat": r} for r in ("", "some", "every", "every:0", "every:x", "names:", "names", "full:2", "none:1")]
    + [{"attention": "flash"}],
)
def test_bad_modes_are_named_with_the_good_ones(wrong):
    with pytest.raises(ValueError, match=rf"{next(iter(wrong))}='.*' is not one of (none|auto), "):
        Execution(**wrong)
