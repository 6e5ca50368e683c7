"""Random models of theirs, in either precision, and their gradients through our reader."""

import numpy as np
import torch

from llm_jax import interop
from llm_jax.nn import paths

BOUNDS = {"fp32": 1e-5, "fp64": 1e-10}
DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


def use_doubles(monkeypatch):
    """Their norms, rotary tables and softmaxes are hard-wired to float32: that name means float64 from here on."""
    for alias in ("float32", "float"):
        monkeypatch.setattr(torch, alias, torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def noisy(make_model, dtype):
    """A model in evaluation mode; biases and norms start at 0 and 1, noise makes them count."""
    torch.manual_seed(0)
    model = make_model().to(dtype).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:  # not Marian's sinusoids
                p.add_(0.05 * torch.randn_like(p))
    return model


def gradients(model, folder):
    """`{our path: their gradient}` after a backward pass: the same names, the same layout."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
    model.save_pretrained(folder)
    return dict(paths.flatten(interop.load(folder).params))


def check_gradients(grads, model, folder, bound, without=()):
    """Ours equal theirs after a backward pass, path by path, but for `without`, which are not parameters of theirs."""
    expected, got = gradients(model, folder), dict(paths.flatten(grads))
    assert got.keys() == expected.keys()
    for path in got.keys() - set(without):
        np.testing.assert_allclose(got[path], expected[path], rtol=bound, atol=bound, err_msg=path)


def exported(theirs, folder, kind=None):
    """Their model after a round through ours, read by `kind` (its own class by default) with nothing missing or spare.

    Every tensor of its state is the same.
    """
    theirs.save_pretrained(folder / "in")
    ours = interop.load(folder / "in")
    interop.save(folder / "out", ours.model, ours.params)
    again, report = (kind or type(theirs)).from_pretrained(
        folder / "out", attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    state, wanted = again.state_dict(), theirs.state_dict()
    assert state.keys() == wanted.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, wanted[name]), name
    return again.eval()
