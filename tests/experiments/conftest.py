"""What tests of several binaries share: a model, and a machine of one device."""

import jax
import pytest
from tiny_models import noise

from llm_jax import interop
from llm_jax.data import tokenizers
from llm_jax.models.llama import LlamaConfig

TEXT = "abc abd abe, abc abd abe. " * 20


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A random Llama and a character tokenizer, as a Hugging Face folder; `text.txt` beside them."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = tokenizers.train([TEXT, "u"], "char", 1)
    config = LlamaConfig(vocab_size=tokenizer.vocab_size, context_length=32, model_dim=16, num_layers=2, num_heads=2,
                         num_kv_heads=1, hidden_dim=24)  # fmt: skip
    model = config.make()
    interop.save(path, model, noise(model, 0.5), tokenizer)
    (path / "text.txt").write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def one_device():
    """Runs take the first device only; tests/parallel proves several, which take three times as long to compile."""
    with pytest.MonkeyPatch.context() as patch:
        first = jax.devices()[:1]
        patch.setattr(jax, "devices", lambda *_: first)
        patch.setattr(jax, "device_count", lambda *_: 1)
        yield
