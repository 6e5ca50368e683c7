"""BERT, T5, Marian, XLNet and ALBERT in torch and transformers: encoding, decoding, training steps."""

from typing import Any

import torch
import transformers

from experiments.benchmark.peers.runtime import adamw, median_seconds

NO_DROPOUT: dict[str, Any] = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def _marian(width: int, layers: int, heads: int, hidden: int, start: int, **more: Any) -> dict[str, Any]:
    """MarianConfig's fields, encoder and decoder alike."""
    return dict(
        d_model=width, encoder_layers=layers, decoder_layers=layers, encoder_attention_heads=heads,
        decoder_attention_heads=heads, encoder_ffn_dim=hidden, decoder_ffn_dim=hidden, pad_token_id=start,
        decoder_start_token_id=start, **more,
    )  # fmt: skip


BERT_TOY = dict(vocab_size=500, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
TOY: dict[str, dict[str, Any]] = {
    "bert": BERT_TOY,
    "albert": BERT_TOY,
    "xlnet": dict(vocab_size=500, d_model=32, n_layer=2, n_head=2, d_inner=64),
    "t5": dict(vocab_size=500, d_model=32, num_layers=2, num_heads=2, d_ff=64),
    "marian": _marian(32, 2, 2, 64, start=0, vocab_size=500),
}
REAL: dict[str, dict[str, Any]] = {
    "bert": {},
    "albert": dict(hidden_size=768, num_attention_heads=12, intermediate_size=3072),
    "xlnet": dict(d_model=768, n_layer=12, n_head=12, d_inner=3072),
    "t5": {},
    "marian": _marian(512, 6, 8, 2048, start=58100),
}


def model_of(spec: dict[str, Any]) -> Any:
    """The family's model, or a toy; without dropout."""
    family = spec["family"]
    sizes = (TOY if spec["tiny"] else REAL)[family]
    torch.manual_seed(0)
    if family == "bert":
        return transformers.BertModel(transformers.BertConfig(**sizes, **NO_DROPOUT))
    if family == "albert":
        return transformers.AlbertForMaskedLM(transformers.AlbertConfig(**sizes, **NO_DROPOUT))
    if family == "xlnet":
        return transformers.XLNetLMHeadModel(transformers.XLNetConfig(**sizes, dropout=0.0))
    if family == "t5":
        config: Any = transformers.T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0)
    else:
        config = transformers.MarianConfig(
            **sizes, activation_function="swish", scale_embedding=True, dropout=0.0, max_position_embeddings=512,
            eos_token_id=0, forced_eos_token_id=None,
        )  # fmt: skip
    return transformers.AutoModelForSeq2SeqLM.from_config(config)


def encode(spec: dict[str, Any]) -> dict[str, Any]:
    """Tokens per second through an encoder."""
    model = model_of(spec).eval()
    rows, length = spec["shape"]
    ids = torch.randint(0, model.config.vocab_size, (rows, length))
    run = torch.compile(model) if spec["compile"] else model
    with torch.inference_mode():
        seconds = median_seconds(lambda: run(input_ids=ids), 10)
    return {"value": rows * length / seconds}


def decode(spec: dict[str, Any]) -> dict[str, Any]:
    """New tokens per second of `generate`, the source's reading included; no output ends early."""
    model = model_of(spec).eval()
    ids = torch.randint(1, model.config.vocab_size, (spec["batch"], spec["source"]))
    options = dict(max_new_tokens=spec["new"], min_new_tokens=spec["new"], do_sample=False, num_beams=spec["beams"])
    with torch.inference_mode():
        run = lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        seconds = median_seconds(run, 3, warm=1)
    return {"value": spec["batch"] * spec["new"] / seconds}


def step(spec: dict[str, Any]) -> dict[str, Any]:
    """Tokens per second of whole training steps (fused AdamW, clipping)."""
    model = model_of(spec).train()
    rows, length = spec["shape"]
    ids = torch.randint(5, model.config.vocab_size, (rows, length))
    if spec["family"] == "xlnet":
        count = length // 6
        positions = torch.argsort(torch.rand(rows, length))[:, :count]
        rank = torch.full((rows, length), -1).scatter(1, positions, torch.arange(count).expand(rows, count))
        hidden = (rank[:, :, None] <= rank[:, None, :]) & (rank >= 0)[:, None, :]
        mapping = torch.nn.functional.one_hot(positions, length).float()
        call: dict[str, Any] = dict(perm_mask=hidden.float(), target_mapping=mapping, labels=ids.gather(1, positions))
    else:
        call = {"labels": torch.where(torch.rand(rows, length) < 0.15, ids, -100)}
    optimizer = adamw(model)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(input_ids=ids, **call).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return {"value": rows * length / median_seconds(run, 5)}
