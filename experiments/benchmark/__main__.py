"""Speed and memory beside PyTorch in the same run.

    python -m experiments.benchmark --json=bench.json
    python -m experiments.benchmark --cases=train,decode --rounds=3
    python -m experiments.benchmark --cases=shakespeare --shakespeare=FILE

Every measurement is a process of its own; ours and the peer's take turns, `--rounds` times, and medians are
compared, because machines are noisy. Only jax, flax, optax (and torch, transformers for the peers) are imported; on
a machine without torch the peers' columns stay empty.

Rows are `case, ours, peer, theirs, ratio, limit, limit_share, unit`. The limit of training is the fastest large
matrix product seen in the same run over the model FLOPs of a token (`training.flops`), that of decoding the fastest
read of memory over the bytes of parameters and cache that a token needs, or its products' at that rate where they take
longer (beams).

Levers, and what each gave on 2 cores of an AMD EPYC (float32; the machine's own speed drifts by 15 % between runs; on a
faster EPYC with AVX-512 the same code has since trained 2.7 times as fast, torch's 1.6 times):

- `GLIBC_TUNABLES=glibc.malloc.hugetlb=1`: 1.34 to 1.07 s a step of a 2.6 M-parameter GPT (page faults 218,000 to 800).
- `unstack` by `lax.split` instead of `x[i]`: its gradient is one concatenation; with it and the next two, 9.2 to 8.3 s
  a step of GPT-2 small.
- weight gradients as plain matrices (leading axes flattened), kept out: 4 % faster when XLA gives only products to YNN
  (`--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_DOT`), 30 % slower without that flag.
- the gradient of the logits behind an `optimization_barrier`, so that the two products which read it share one copy,
  and cross-entropy in 4 chunks whose gradient is taken beside their logits: 7.6 to 6.5 s a step of GPT-2 small.
- `--xla_cpu_enable_concurrency_optimized_scheduler=false`: speed as before, within noise; temporary memory of that
  step 2.75 to 1.58 GB.
- `--xla_cpu_copy_insertion_use_region_analysis=true`: 1.49 to 1.19 GB of that step scanned, by not copying Adam's
  moments; speed as before, within noise.
- norms, activations and attention that keep only their inputs for the backward pass: scanned, 2.32 to 1.49 GB and
  121 to 145 tokens/s; unrolled, 1.58 to 1.49 GB and 139 to 138.
- the activation computed again for the down kernel's gradient: scanned, 1.19 to 1.06 GB of that step, unrolled 1.50 to
  1.37; 1 % slower, within noise.
- decoding with kernels stored as their transpose (`weights.Transposed`), so that XLA:CPU packs the few rows of the
  activations and not the whole matrix: 61 to 43 ms a token of batch 8; the same for the tied head is included.
- keys and values stored `[B, K, S, H]`, as the products of attention read them: 43 to 33 ms a token of batch 8.
- beam search of T5 small, 8 x 4 beams, on AVX-512 cores: 173 tokens/s with the cache copied in a new order for
  every token; 161 with a table of ancestors (XLA:CPU multiplies 4 queries with many keys slowly); 221 with no more
  slots than the output needs; 324 with queries taken one by one, and 239 of these with `FEW_ROWS` at 16 instead of 64
  (the output layer has 32 rows). The best entries by blocks: 1.5 to 0.3 ms for 32 rows of 32,128.
- the few queries of a row's beams, or of a group of heads, as the second operand of both products of attention
  (`attend._Few`), in the place of one by one: 27.5 to 25.6 ms a token of 8 x 4 beams of T5 small, 38.6 to 35.1 of
  Marian; SmolLM2-135M, batch 8 behind 256 tokens, 58 to 80 tokens/s.
- beams that take the logits by columns, as the last product leaves them, and no copy to ban an entry: 25.6 to 24.1 and
  35.1 to 32.0 ms. What is left is 60 % products with weights at two thirds of the rate of large ones.
- these columns padded to whole blocks, so that the best entries read them without a copy: 0.7 ms of 30 (Marian).
- glibc's `mmap_max=0` with a large `trim_threshold`: no page faults, but 7.7 in place of 5.1 GB; kept out.
- the label's logit by a gather instead of a comparison: nothing beyond noise.
- attention in `chunked` form against `fused`: 4 % on the demo's model, within noise.

On 2 cores of an Intel Xeon (AVX-512), alone on the machine, medians of 3 turns: encoding 0.88 of torch eager (0.97 of
onnxruntime), a step of XLNet 1.01, of ALBERT 0.95; T5 greedy 1.46 and beam 4 1.48 of transformers (1.7 and 1.2 of
ctranslate2), opus-mt 1.34 and 1.46 (1.8 and 1.2). Products of few rows with weights are level with torch's there and
read 17 to 21 GB/s, which is nearly all of a token's time; kernels transposed or not, small ones or all: no difference.

On an NVIDIA H100 (bfloat16, 32 rows of 1,024 tokens, jax 0.11.2):

- cuDNN's attention kernel (XLA's own materialises all scores), with the backward pass keeping inputs only: scanned, 126
  to 103 ms a step and 30.7 to 14.2 GB.
- a vocabulary padded to a multiple of 128, without which cuBLAS is not used for the rows of 50,257 (24 of 86 ms), and
  logits kept in bfloat16 under the float32 loss: unrolled, 89 to 73 ms, 17.0 to 13.6 GB.
- command buffers for decoding: 1,453 tokens/s as XLA has them by default, 1,433 around the whole loop, 477 without.
- a model of 1.2 billion parameters under plans for one device: `benchmark_plans.py`.
"""

import functools
import json
import os
import statistics
import subprocess
import sys
from typing import Any

from absl import app, flags

CASES = (
    *("train", "memory", "decode", "compile", "shakespeare", "encode", "translate", "steps", "ngrams"),
    *("word2vec", "bayes", "plans"),
)
CASE = flags.DEFINE_list("cases", ",".join(CASES), f"What to measure: {', '.join(CASES)}.")
ROUNDS = flags.DEFINE_integer("rounds", 3, "Turns that every contestant takes.", lower_bound=1)
JSON = flags.DEFINE_string("json", None, "Write the rows to this file.")
TINY = flags.DEFINE_bool("tiny", False, "Toy sizes: shows that everything runs; the figures mean nothing.")
SHAKESPEARE = flags.DEFINE_string(
    "shakespeare",
    "../shared/data/tinyshakespeare/input.txt",
    "nanoGPT's character corpus; its case is left out without.",
)
TEXT = flags.DEFINE_string(
    "text", None, "Of ngrams and word2vec: a sentence a line, words between blanks; by default the library's sources."
)
PRECISION = flags.DEFINE_enum("precision", None, ["fp32", "bf16"], "fp32 on a CPU, bf16 on a GPU by default.")


# what both sides run, by platform: rows and tokens a row of a training step, side of the square matrix product
SIZES = {"cpu": {"rows": 4, "length": 256, "side": 3072}, "gpu": {"rows": 32, "length": 1024, "side": 8192}}
DECODED = {"prompt": 32, "new": 64}  # tokens a row


def _measure(who: str, what: str, **options: Any) -> dict[str, Any] | None:
    """Runs one measurement in a fresh process; None where the peer is not installed or fails."""
    module = {"ours": "experiments.benchmark.ours", "peer": "experiments.benchmark.peers"}[who]
    if options.get("classic"):
        module = "experiments.benchmark.ngrams"
    elif "ngrams" in options:
        module = "experiments.benchmark.naive_bayes"
    elif "variant" in options:
        module = "experiments.benchmark.plans"
    elif "epochs" in options:
        module = "experiments.benchmark.word2vec"
    elif "family" in options:
        engine = "engines" if options.get("engine") else "families_peers"
        module = {"ours": "experiments.benchmark.families", "peer": f"experiments.benchmark.{engine}"}[who]
    spec = json.dumps({"what": what, "tiny": TINY.value, "precision": PRECISION.value, "sizes": SIZES, **options})
    done = subprocess.run([sys.executable, "-m", module, spec], capture_output=True, text=True, env=_environment())
    if done.returncode == 42:
        return None
    if done.returncode and who == "peer":  # torch.compile cannot link in a path with spaces, for one
        print(f"{who} {what} {options} failed, its column stays empty:\n{done.stderr[-500:]}", file=sys.stderr)
        return None
    if done.returncode:
        raise RuntimeError(f"{who} {what} {options} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


@functools.cache
def _device() -> dict[str, str]:
    """`platform` and `value`, a name; read in another process, since this one must not hold the accelerator."""
    spec = json.dumps({"what": "device"})
    command = [sys.executable, "-m", "experiments.benchmark.ours", spec]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def _environment() -> dict[str, str]:
    """On a CPU: large pages for malloc, as the Makefile sets them, and what saves memory in XLA."""
    if _device()["platform"] != "cpu":
        return dict(os.environ)
    flags_of_xla = (
        "--xla_cpu_enable_concurrency_optimized_scheduler=false --xla_cpu_copy_insertion_use_region_analysis=true"
    )
    return {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "XLA_FLAGS": flags_of_xla, **os.environ}


def _turns(contestants: dict[str, tuple[str, str, dict[str, Any]]], rounds: int) -> dict[str, Any]:
    """Median of every contestant's `value` over alternating turns, with the last turn's other fields."""
    seen: dict[str, list[dict[str, Any]]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, (who, what, options) in contestants.items():
            result = _measure(who, what, **options)
            if result is not None:
                seen[name].append(result)
                print(f"  {name}: {result['value']:.4g}", file=sys.stderr, flush=True)
    return {n: {**r[-1], "value": statistics.median(x["value"] for x in r)} for n, r in seen.items() if r}


def _row(case: str, ours: Any, peer: str, theirs: Any, unit: str, limit: Any = None) -> dict[str, Any]:
    better = theirs is not None and theirs > 0
    share = None if limit is None else ours / limit
    ratio = ours / theirs if better else None
    return dict(case=case, ours=ours, peer=peer, theirs=theirs, ratio=ratio, limit=limit, limit_share=share, unit=unit)


@functools.cache
def _training() -> dict[str, Any]:
    """Speed and peak memory of training, shared by two cases."""
    return _turns(
        {
            "ours unrolled": ("ours", "train", {"unroll": True}),
            "torch.compile": ("peer", "train", {"compile": True}),
            "ours scanned": ("ours", "train", {"unroll": False}),
            "torch eager": ("peer", "train", {"compile": False}),
        },
        ROUNDS.value,
    )


@functools.cache
def _product() -> float:
    """FLOP/s of the fastest large matrix product that either side has shown."""
    return max(m["value"] for m in (_measure("ours", "matmul"), _measure("peer", "matmul")) if m)


def _train() -> list[dict[str, Any]]:
    results = _training()
    theirs = {n: results[n]["value"] for n in ("torch.compile", "torch eager") if n in results}
    rows = []
    for name in ("ours unrolled", "ours scanned"):
        limit = _product() / results[name]["flops_per_token"]
        for peer in ("torch.compile", "torch eager"):
            case = f"train GPT-2 small, {name.removeprefix('ours ')}"
            rows.append(_row(case, results[name]["value"], peer, theirs.get(peer), "tokens/s", limit))
    return rows


def _memory() -> list[dict[str, Any]]:
    rows = []
    theirs = _training().get("torch.compile")
    for form in ("unrolled", "scanned"):
        ours = _training()[f"ours {form}"]["peak_bytes"]
        case = f"peak memory of training, {form}"
        rows.append(_row(case, ours, "torch.compile", theirs and theirs["peak_bytes"], "bytes"))
    return rows


def _decode() -> list[dict[str, Any]]:
    rows = []
    bandwidth = _measure("ours", "bandwidth")
    assert bandwidth is not None
    for batch in (1, 8):
        results = _turns(
            {
                "ours": ("ours", "decode", {"batch": batch, **DECODED}),
                "transformers generate": ("peer", "decode", {"batch": batch, **DECODED}),
            },
            ROUNDS.value,
        )
        ours, theirs = results["ours"], results.get("transformers generate")
        limit = batch * bandwidth["value"] / ours["bytes_per_step"]
        case = f"decode GPT-2 small, batch {batch}"
        rows.append(_row(case, ours["value"], "transformers generate", theirs and theirs["value"], "tokens/s", limit))
    return rows


def _compile() -> list[dict[str, Any]]:
    """Seconds to compile the training step; the peer is our own step at 4 layers."""
    rows = []
    for unroll in (False, True):
        few, many = (_measure("ours", "compile", unroll=unroll, layers=n) for n in (4, 24))
        assert few is not None and many is not None
        form = "unrolled" if unroll else "scanned"
        rows.append(_row(f"compile 24 layers, {form}", many["value"], f"4 layers, {form}", few["value"], "s"))
    return rows


def _shakespeare() -> list[dict[str, Any]]:
    """NanoGPT's published CPU setting; its README gives a loss of 1.88 after about three minutes."""
    if not os.path.exists(SHAKESPEARE.value):
        print(f"shakespeare: left out, there is no {SHAKESPEARE.value}", file=sys.stderr)
        return []
    peer = "transformers GPT-2, torch.compile"
    theirs = _measure("peer", "shakespeare", path=SHAKESPEARE.value)
    rows = []
    # the published rate first; the other two change the optimizer and nothing else
    for optimizer, rate in (("adamw", 1e-3), ("adamw", 4e-3), ("muon", 2e-2)):
        ours = _measure("ours", "shakespeare", path=SHAKESPEARE.value, optimizer=optimizer, learning_rate=rate)
        assert ours is not None
        case = f"nanoGPT's Shakespeare, {optimizer} {rate:g}"
        rows.append(_row(f"{case}, validation loss", ours["loss"], "nanoGPT README", 1.88, "nats/character"))
        rows.append(_row(f"{case}, 2,000 steps", ours["value"], peer, theirs and theirs["value"], "s"))
        if rate == 1e-3:  # the peer's
            loss = theirs and theirs["loss"]
            rows.append(_row(f"{case}, validation loss", ours["loss"], peer, loss, "nats/character"))
    return rows


def _families(cases: dict[str, tuple[str, dict[str, Any], tuple[dict[str, Any], ...]]]) -> list[dict[str, Any]]:
    """Rows of cases `{name: (what, options of both, options of each peer)}`."""
    rows = []
    read = _measure("ours", "bandwidth")
    assert read is not None
    for case, (what, options, peers) in cases.items():
        contestants = {"ours": ("ours", what, options)}
        contestants |= {p["name"]: ("peer", what, {**options, **p}) for p in peers}
        results = _turns(contestants, ROUNDS.value)
        ours = results["ours"]
        limit = _product() / ours["flops"] if "flops" in ours else None
        if "bytes_per_step" in ours:
            seconds = max(ours["bytes_per_step"] / read["value"], ours["flops_per_step"] / _product())
            limit = options["batch"] / seconds
        for p in peers:
            theirs = results.get(p["name"])
            rows.append(_row(case, ours["value"], p["name"], theirs and theirs["value"], "tokens/s", limit))
    return rows


ENGINES: dict[str, dict[str, Any]] = {
    name: {"name": name, "engine": True, "compile": False} for name in ("onnxruntime", "ctranslate2")
}
EAGER = {"name": "torch eager", "compile": False}


def _encode() -> list[dict[str, Any]]:
    peers = (EAGER, {"name": "torch.compile", "compile": True}, ENGINES["onnxruntime"])
    return _families({"encode BERT base, 8 x 128": ("encode", {"family": "bert", "shape": [8, 128]}, peers)})


def _translate() -> list[dict[str, Any]]:
    size = {"batch": 8, "source": 32, "new": 64}
    peers = ({"name": "transformers generate"}, ENGINES["ctranslate2"])
    return _families(
        {
            f"{family}, {'greedy' if beams == 1 else f'beam {beams}'}, batch 8": (
                "decode",
                {"family": family, "beams": beams, **size},
                peers,
            )
            for family in ("t5", "marian")
            for beams in (1, 4)
        }
    )


def _steps() -> list[dict[str, Any]]:
    shape = {"shape": [4, 128]}
    return _families(
        {f"train {family}, 4 x 128": ("step", {"family": family, **shape}, (EAGER,)) for family in ("xlnet", "albert")}
    )


def _ngrams() -> list[dict[str, Any]]:
    """Estimation, which has no peer in Python; queries in one call and KenLM's by lines and by words; memory."""
    what: dict[str, Any] = {"classic": True, "path": TEXT.value}
    runs = {"estimate": ("ours", "estimate", what), "arrays": ("ours", "bytes", what)}
    runs["kenlm"] = ("peer", "bytes", {**what, "loop": "lines"})
    texts = {"text that was counted": {**what, "unseen": False}, "text that was not": {**what, "unseen": True}}
    for text, options in texts.items():
        runs[text] = ("ours", "query", options)
        runs[f"{text}, from strings"] = ("ours", "query", {**options, "numbered": False})
        runs |= {f"{text}, {loop}": ("peer", "query", {**options, "loop": loop}) for loop in ("lines", "words")}
    results = _turns(runs, ROUNDS.value)
    value = lambda name: results[name]["value"] if name in results else None
    rows = [_row("n-grams, order 5, from text", value("estimate"), "-", None, "words/s")]
    for text in texts:
        for ours in (text, f"{text}, from strings"):
            rows += [
                _row(
                    f"n-grams, order 5, {ours}",
                    value(ours),
                    f"kenlm, loop over {loop}",
                    value(f"{text}, {loop}"),
                    "words/s",
                )
                for loop in ("lines", "words")
            ]
    for name, mine in (("sorted", value("arrays")), ("hash tables", results["arrays"]["hashed"])):
        rows.append(_row(f"n-grams, order 5, {name}", mine, "kenlm, probing", value("kenlm"), "bytes/n-gram"))
    return rows


def _beside(case: str, peer: str, options: dict[str, Any], unit: str) -> dict[str, Any]:
    """A row of ours and of one peer, whose name comes before a comma."""
    name = peer.partition(",")[0]
    results = _turns({"ours": ("ours", "ours", options), name: ("peer", name, options)}, ROUNDS.value)
    theirs = results.get(name)
    return _row(case, results["ours"]["value"], peer, theirs and theirs["value"], unit)


def _word2vec() -> list[dict[str, Any]]:
    """Raw words a second of training beside gensim with two workers."""
    kinds = {
        "skip-gram, negative sampling": {},
        "skip-gram, hierarchical softmax": {"loss": "hierarchical"},
        "CBOW, negative sampling": {"architecture": "cbow"},
    }
    options = {"epochs": 3, "seed": 1, "workers": 2, "path": TEXT.value}
    return [
        _beside(f"word2vec, {name}", "gensim, 2 workers", {**options, "config": config}, "words/s")
        for name, config in kinds.items()
    ]


def _bayes() -> list[dict[str, Any]]:
    """Tf-idf and naive Bayes beside scikit-learn: single words, and pairs too."""
    cases = [(words, part) for words in ("words", "words and pairs") for part in ("fit", "predict")]
    return [
        _beside(
            f"tf-idf and naive Bayes, {part}, {words}",
            "scikit-learn",
            {"part": part, "ngrams": 1 + (words != "words")},
            "texts/s",
        )
        for words, part in cases
    ]


def _plans() -> list[dict[str, Any]]:
    """Speed and memory of a model of 1.2 billion parameters under plans for one accelerator."""
    if _device()["platform"] == "cpu" and not TINY.value:
        print("plans: left out, they are of an accelerator", file=sys.stderr)
        return []
    from experiments.benchmark.plans import VARIANTS  # which needs all that a run needs

    rows = []
    for name in VARIANTS:
        ours = _turns({name: ("ours", "plan", {"variant": name})}, ROUNDS.value)[name]
        limit = _product() / ours["flops_per_token"]
        rows.append(_row(f"train Llama 1B, {name}", ours["value"], "-", None, "tokens/s", limit))
        rows.append(_row(f"peak memory, {name}", ours["peak_bytes"], "-", None, "bytes"))
    return rows


def main(argv: list[str]) -> None:
    """Measures, prints the table, writes the rows."""
    del argv
    unknown = set(CASE.value) - set(CASES)
    if unknown:
        sys.exit(f"error: unknown cases {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    measure = {"train": _train, "memory": _memory, "decode": _decode, "compile": _compile, "shakespeare": _shakespeare}
    measure |= {"encode": _encode, "translate": _translate, "steps": _steps, "ngrams": _ngrams}
    measure |= {"word2vec": _word2vec, "bayes": _bayes, "plans": _plans}
    rows: list[dict[str, Any]] = []
    for name in CASE.value:
        print(name, file=sys.stderr, flush=True)
        rows += measure[name]()
        if JSON.value:  # after every case, so that an interruption loses nothing
            with open(JSON.value, "w") as f:
                json.dump(rows, f, indent=2)
    print(f"device: {_device()['value']}")
    show = lambda x: "-" if x is None else x if isinstance(x, str) else f"{x:,.0f}" if x >= 1000 else f"{x:.3g}"
    keys = ("case", "ours", "peer", "theirs", "ratio", "limit", "limit_share", "unit")
    table = [keys, *(tuple(show(r[k]) for k in keys) for r in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(keys))]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


if __name__ == "__main__":
    app.run(main)
