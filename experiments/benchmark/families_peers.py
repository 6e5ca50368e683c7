"""The peers' side of the families' benchmark: torch and transformers, the same sizes, batch and optimizer.

`python -m experiments.benchmark.families_peers SPEC` prints one JSON line, or exits with 42 without torch.
"""

import json
import sys
from typing import Any

from experiments.benchmark.peers import median_seconds, torch, transformers

OFF: dict[str, Any] = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def model_of(spec: dict[str, Any]) -> Any:
    """The family's, or a toy; without dropout."""
    tiny = spec["tiny"]
    v: dict[str, Any] = {"vocab_size": 500} if tiny else {}
    own: dict[str, Any]
    four: dict[str, Any] = (
        dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64) if tiny else {}
    )
    torch.manual_seed(0)
    if spec["family"] == "bert":
        return transformers.BertModel(transformers.BertConfig(**v, **four, **OFF))
    if spec["family"] == "albert":
        base: dict[str, Any] = dict(hidden_size=768, num_attention_heads=12, intermediate_size=3072)
        return transformers.AlbertForMaskedLM(transformers.AlbertConfig(**{**base, **v, **four, **OFF}))
    if spec["family"] == "xlnet":
        own = dict(d_model=32, n_layer=2, n_head=2, d_inner=64) if tiny else dict(d_model=768, n_layer=12, n_head=12)
        inner: dict[str, Any] = {} if tiny else {"d_inner": 3072}
        return transformers.XLNetLMHeadModel(transformers.XLNetConfig(**v, **own, **inner, dropout=0.0))
    if spec["family"] == "t5":
        own = dict(d_model=32, num_layers=2, num_heads=2, d_ff=64) if tiny else {}
        config: Any = transformers.T5Config(**v, **own, dropout_rate=0.0, decoder_start_token_id=0)
    else:
        own = dict(d_model=32, layers=2, heads=2, ffn=64) if tiny else dict(d_model=512, layers=6, heads=8, ffn=2048)
        start = 0 if tiny else 58100
        both: dict[str, Any] = {
            f"{s}_{theirs}": own[ours]
            for s in ("encoder", "decoder")
            for theirs, ours in (("layers", "layers"), ("attention_heads", "heads"), ("ffn_dim", "ffn"))
        }
        config = transformers.MarianConfig(
            **v, **both, d_model=own["d_model"], activation_function="swish", scale_embedding=True, dropout=0.0,
            max_position_embeddings=512, decoder_start_token_id=start, pad_token_id=start, eos_token_id=0,
            forced_eos_token_id=None,
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
        places = torch.argsort(torch.rand(rows, length))[:, :count]
        rank = torch.full((rows, length), -1).scatter(1, places, torch.arange(count).expand(rows, count))
        hidden = (rank[:, :, None] <= rank[:, None, :]) & (rank >= 0)[:, None, :]
        mapping = torch.nn.functional.one_hot(places, length).float()
        call: dict[str, Any] = dict(perm_mask=hidden.float(), target_mapping=mapping, labels=ids.gather(1, places))
    else:
        call = {"labels": torch.where(torch.rand(rows, length) < 0.15, ids, -100)}
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95), fused=True)

    def one() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(input_ids=ids, **call).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return {"value": rows * length / median_seconds(one, 5)}


WHAT = {"encode": encode, "decode": decode, "step": step}

if __name__ == "__main__":
    wanted = json.loads(sys.argv[1])
    print(json.dumps(WHAT[wanted["what"]](wanted)))
