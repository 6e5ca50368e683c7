"""A text classifier comes back from its folder, or says why not."""

import numpy as np
import pytest
from tiny_models import random_params

from llm_jax.classic.text.vocabulary import Words
from llm_jax.interop import classifier_folder
from llm_jax.models.text_classifier import TextClassifierConfig

MODEL = TextClassifierConfig("cnn", vocab_size=4, model_dim=3, filters=2, widths=(2,), labels=("a", "b", "c"))
TEXTS = ["cat dog", "", "dog emu cat dog", "dog"]


@pytest.fixture
def folder(tmp_path):
    params = random_params(MODEL.make(), np.ones((1, 2), np.int32))
    classifier_folder.save(MODEL, params, Words(["cat", "dog"], "blanks"), 3, tmp_path)
    return tmp_path, params


def test_round_trip(folder):
    path, params = folder
    got = classifier_folder.load(path)(TEXTS)
    assert got.shape == (4, 3)
    np.testing.assert_allclose(np.exp(got).sum(1), 1, rtol=1e-5)
    ids = np.array([[2, 3, 0], [0, 0, 0], [3, 1, 2], [3, 0, 0]], np.int32)  # the third text is cut
    logits = np.asarray(MODEL.make().apply({"params": params}, ids).logits)
    np.testing.assert_allclose(got, logits - np.log(np.exp(logits).sum(1, keepdims=True)), rtol=1e-4, atol=1e-5)
    few = classifier_folder.log_probs(MODEL, params, Words(["cat", "dog"], "blanks"), 3, batch_size=3)
    np.testing.assert_allclose(few(TEXTS), got, rtol=1e-5, atol=1e-6)
    assert few([]).shape == (0, 3)


def test_damaged(folder):
    path, _ = folder
    with pytest.raises(ValueError, match="holds no text_classifier.json"):
        classifier_folder.load(path / "gone")
    text, data = (path / classifier_folder.FILE).read_text(), (path / "model.safetensors").read_bytes()
    for wrong in (text[:-9], "{}", text.replace('"cnn"', '"gru"')):
        (path / classifier_folder.FILE).write_text(wrong)
        with pytest.raises(ValueError, match="the model cannot be read"):
            classifier_folder.load(path)
    (path / classifier_folder.FILE).write_text(text.replace('["cat", "dog"]', '["cat"]'))
    with pytest.raises(ValueError, match="vocab_size=4.*3 words"):
        classifier_folder.load(path)
    (path / classifier_folder.FILE).write_text(text)
    (path / "model.safetensors").write_bytes(data[:-9])
    with pytest.raises(ValueError, match="the model cannot be read.*safetensors"):
        classifier_folder.load(path)
