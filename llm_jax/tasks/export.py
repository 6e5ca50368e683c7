"""What a fine-tuning run leaves to others: a merged model, and its deltas in PEFT's format."""

import logging

from etils import epath

from llm_jax import interop
from llm_jax.interop import Pretrained, peft
from llm_jax.training import finetune
from llm_jax.training.finetune import FinetuneConfig, Finetuned

log = logging.getLogger(__name__)


def write(
    workdir: epath.PathLike, result: Finetuned, loaded: Pretrained, config: FinetuneConfig, path: epath.PathLike
) -> None:
    """Writes `WORKDIR/merged` and, where the run had deltas, `WORKDIR/adapter`; what has no place is said in the log.

    Args:
      workdir: of the run.
      result: of the run. In a job of several processes one of them writes.
      loaded: the model that the run began with; its parameters are not read.
      config: of the run.
      path: of that model.
    """
    has_deltas = not config.delta.is_empty
    if result.merged is not None and finetune.can_save(loaded.config):
        if has_deltas:
            difference = peft.merged_difference(loaded.model, result.params, result.merged)
            log.info("merging changed logits by %.2g at most", difference)
        interop.save(f"{workdir}/merged", loaded.model, result.merged, loaded.tokenizer)
    if not has_deltas:
        return
    # what a start took out of the base is written against the base as it was
    original = finetune.load(str(path), config).params if config.delta.changes_base else None
    try:
        peft.save(f"{workdir}/adapter", loaded.model, result.params, str(path), result.trainable or (), original)
    except interop.InteropError as e:  # what was trained is in the checkpoint, and whole in merged/
        log.warning("no adapter/ is written: %s; the checkpoint holds everything", e)
