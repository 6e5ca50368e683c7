"""The BiLSTM and the CNN equal torch's on the same weights, outputs and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import random_params

from llm_jax.models.text_classifier import TextClassifierConfig
from llm_jax.nn.recurrent import FORGET_BIAS

torch = pytest.importorskip("torch", reason="parity needs torch: make parity")
SIZES = dict(vocab_size=13, model_dim=5, hidden_dim=4, num_layers=2, widths=(2, 3), filters=6, pooling="last")
IDS = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 0, 0], [7, 0, 0, 0, 0]], np.int32)
LENGTHS = [5, 3, 1]


def tensor(x):
    return torch.tensor(np.array(x))


def gates(x, axis=-1):
    """Ours are input, new, forget, output; torch's input, forget, new, output."""
    i, j, f, o = np.split(np.asarray(x), 4, axis)
    return np.concatenate([i, f, j, o], axis)


def their_lstm(params):
    lstm = torch.nn.LSTM(5, 4, 2, batch_first=True, bidirectional=True)
    with torch.no_grad():
        for layer in range(2):
            for ours, ending in (("forward", ""), ("backward", "_reverse")):
                tree, name = params["lstm"][f"{ours}_{layer}"], f"l{layer}{ending}"
                getattr(lstm, f"weight_ih_{name}").copy_(tensor(gates(tree["input"]["kernel"]).T))
                getattr(lstm, f"weight_hh_{name}").copy_(tensor(gates(tree["recurrent"]).T))
                bias = gates(tree["input"]["bias"]).copy()
                bias[4:8] += FORGET_BIAS
                getattr(lstm, f"bias_ih_{name}").copy_(tensor(bias))
                getattr(lstm, f"bias_hh_{name}").zero_()
    return lstm


def their_cnn(params):
    convolutions = []
    for width in SIZES["widths"]:
        layer = params["cnn"][f"filters_{width}"]
        convolution = torch.nn.Conv1d(5, 6, width, padding=width - 1)
        with torch.no_grad():
            convolution.weight.copy_(tensor(np.asarray(layer["kernel"]).reshape(width, 5, 6).transpose(2, 1, 0)))
            convolution.bias.copy_(tensor(layer["bias"]))
        convolutions.append(convolution)
    return lambda x: torch.cat([torch.relu(c(x.T[None])).amax(-1) for c in convolutions], -1)


@pytest.mark.parametrize("kind", ["lstm", "cnn"])
def test_equals_torch(kind):
    model = TextClassifierConfig(kind, **SIZES).make()
    params = random_params(model, IDS)
    table = tensor(params["embed"]["embedding"]).requires_grad_()
    if kind == "lstm":
        packed = torch.nn.utils.rnn.pack_padded_sequence(table[tensor(IDS).long()], LENGTHS, batch_first=True)
        _, (last, _) = their_lstm(params)(packed)
        pooled = torch.cat([last[-2], last[-1]], -1)
    else:
        run = their_cnn(params)
        pooled = torch.cat([run(table[tensor(row[:n]).long()]) for row, n in zip(IDS, LENGTHS, strict=True)])
    logits = pooled @ tensor(params["classifier"]["kernel"]) + tensor(params["classifier"]["bias"])
    logits.square().sum().backward()

    def loss(params):
        out = model.apply({"params": params}, IDS)
        return jnp.sum(jnp.square(out.logits)), out

    (_, out), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(out.pooler_output, pooled.detach().numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(out.logits, logits.detach().numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradient["embed"]["embedding"], table.grad.numpy(), rtol=1e-4, atol=1e-5)
