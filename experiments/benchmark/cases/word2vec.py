r"""word2vec beside gensim: raw words a second, 100 dimensions, window 5, words that occur 5 times.

Vocabularies are made before the clock starts; ours leaves out the first step, which compiles. To train with other
settings, and to keep the vectors:

    python -m experiments.benchmark.program ours.word2vec:train \
        '{"path": "brown.txt", "config": {"loss": "hierarchical"}, "epochs": 5, "seed": 1, "save": "vectors.npz"}'

On the Brown corpus (1.1 million words), gensim 4.4 with 2 workers on the same machine's processor. Two cores of an
Intel Xeon, nothing beside it, jax 0.10.2, 3 epochs, medians of 3 turns: skip-gram with negative sampling 770,000
words/s against 577,000 (1.33), with a tree 201,000 against 581,000 (0.35), CBOW 1,017,000 against 1,650,000 (0.62).
An NVIDIA H100, jax 0.11.2, 5 epochs, medians of 3 seeds, gensim beside it with 2 workers: skip-gram 15.7 million
against 0.43 (37; with 16 workers 2.19), CBOW 16.7 against 1.47 (11), tree 11.1 against 0.45 (25); of longer blocks,
--block=1024 --blocks=64, 18.5 instead of 13.3 (40 epochs, one seed).

After 5 epochs (WordSim-353, SimLex-999, analogies; means of 5 seeds with their spread):
    skip-gram  0.258 (0.008)  0.151 (0.006)  3.0 % (0.2)    gensim  0.259 (0.008)  0.157 (0.006)  3.0 % (0.1)
    CBOW       0.118 (0.020)  0.130 (0.005)  2.7 % (0.2)            0.096 (0.010)  0.113 (0.013)  2.9 % (0.2)
    tree       0.275 (0.013)  0.089 (0.007)  3.6 % (0.2)            0.277 (0.014)  0.087 (0.006)  3.8 % (0.1)
    H100, 3 seeds: skip-gram 0.263, 0.155, 2.9 %; CBOW 0.130, 0.133, 2.7 %; tree 0.275, 0.094, 3.7 %

Where the time goes (skip-gram, a block, profiled): 45 % products of tiles, 28 % rows (gathered, scaled, added), 25 %
slopes, bands and transposes of scores. Of two cores 1.3 are busy: what a block does is too small to be divided.

Tried: blocks of 4,096 words and more (up to 52 million words/s) learn nothing on so small a text; two scatters into
one table, and the loss by a branch within the loop: XLA:CPU copies tables whole (2.8 instead of 1.2 us of
processor a word); gradients of the rows by autodiff, whose transposed products XLA:CPU computes by slow loops (35
instead of 16 us a word for trees); a product for each tile (`lax.map`) instead of batched ones, no faster; 32
shared negatives instead of 64: a quarter faster, SimLex and analogies 0.148 and 2.7 %.
"""

from experiments.benchmark.bench import Bench, Contestant, Row

KINDS: dict[str, dict[str, str]] = {
    "skip-gram, negative sampling": {},
    "skip-gram, hierarchical softmax": {"loss": "hierarchical"},
    "CBOW, negative sampling": {"architecture": "cbow"},
}


def train(bench: Bench) -> list[Row]:
    """Raw words a second of training beside gensim with two workers."""
    rows = []
    for kind, config in KINDS.items():
        spec = {"path": bench.text, "config": config, "epochs": 3, "seed": 1, "workers": 2}
        ours: Contestant = ("ours.word2vec:train", spec)
        rows.append(
            bench.beside(f"word2vec, {kind}", ours, "gensim, 2 workers", ("peers.gensim:train", spec), "words/s")
        )
    return rows
