"""Random models of theirs, in either precision, and their gradients through our reader."""

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
