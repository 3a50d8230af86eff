# Everything from a clean clone: `make demo` makes the picture in the README, `make test` runs the tests.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO_READY := $(VENV)/.demo-ready
PIP := $(BIN)/pip install --disable-pip-version-check -c constraints.txt
export SCUMBLE_HOME ?= $(HOME)/.scumble

.PHONY: setup bundled demo test test-compiled coverage check format style lint types layers dead circles links doctests formats-table bench engines-demo kernels engines-sd15 engines-sdxl fuzz serve lock clean

setup: $(READY)

# What serving, training and the demo need. pip shows its progress: this takes minutes.
# torch comes through pip: its CPU build is what a machine without a GPU gets.
# Of nvidia-pytriton only the tritonserver binary is wanted, so none of its dependencies.
$(DEMO_READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[demo]'
	$(PIP) --no-deps nvidia-pytriton==0.7.0
	touch $@

# What tests and checks need besides: linters, fuzzers, oracles, TensorRT for RTX.
$(READY): $(DEMO_READY)
	$(PIP) -e '.[dev]'
	touch $@

demo: $(DEMO_READY)
	$(BIN)/scumble demo --out demo/out

# A process for each core that a small machine has; each has one thread, and takes whole files, whose fixtures are shared.
WORKERS ?= 2
test: setup
	$(BIN)/pytest -n $(WORKERS) --dist loadfile

# Minutes on a busy machine: TorchInductor compiles a denoiser in C++.
test-compiled: setup
	$(BIN)/pytest -q -m compiles

# Says only what is wrong; `make format` mends what a tool can mend. The quick ones first.
check: setup style lint layers circles links dead doctests types test

# Fails below the share of lines that pyproject.toml asks for; lines that only servers and commands run in processes of
# their own are not seen.
coverage: setup
	$(BIN)/pytest -n $(WORKERS) --dist loadfile --cov --cov-report=term:skip-covered

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

style:
	$(BIN)/ruff format --check .

lint:
	$(BIN)/ruff check .

types:
	$(BIN)/mypy
	for body in model_repository/*/1/model.py; do $(BIN)/mypy $$body || exit 1; done

layers:
	$(BIN)/lint-imports

circles:
	$(BIN)/python .ci/import_circles.py

links:
	$(BIN)/python .ci/doc_links.py

dead:
	$(BIN)/python .ci/dead_code.py

# Only files that have examples: others need not even be importable here, as Triton's bodies are not.
PACKAGES := clients registry build server trainers demo
doctests:
	$(BIN)/pytest -q --doctest-modules $$(grep -rl '>>> ' --include='*.py' $(PACKAGES))

# Compares every format with its oracle, and writes what was found into docs/formats.md.
formats-table: setup
	rm -f .formats-notes.jsonl
	SCUMBLE_FORMATS_NOTES=$(CURDIR)/.formats-notes.jsonl $(BIN)/pytest -q -m oracle
	$(BIN)/python tests/support/formats_table.py .formats-notes.jsonl docs/formats.md
	rm .formats-notes.jsonl

# All adapters of the demo, remade from the base and the picture packages (npm) and measured; hours on 2 cores.
bundled: $(DEMO_READY)
	./demo/train.sh

# Random adapters come from the tests' own makers.
bench: setup
	PYTHONPATH=tests $(BIN)/python benches/mixed.py
	PYTHONPATH=tests $(BIN)/python benches/kinds.py

# What comes in: 10,000 mutated files, then coverage-guided ones, a minute for each reader. Then the searches for prompts
# and schedules that take too long, which are brief in every test run, with so many times as many examples.
SEARCH ?= 40
fuzz: setup
	PYTHONPATH=tests $(BIN)/python -W ignore tests/support/fuzz_incoming.py --files 10000
	for reader in zip pickle header; do \
	  PYTHONPATH=tests $(BIN)/python tests/support/fuzz_guided.py $$reader -max_total_time=60 || exit 1; done
	SCUMBLE_SEARCH=$(SEARCH) $(BIN)/pytest -q tests/unit/server/prompts/grammar/test_bounds.py \
	  tests/unit/server/denoise/test_schedulers_bounds.py tests/unit/server/denoise/solvers

# Engines without a GPU (TensorRT for RTX): all graphs of the demo base; real sizes with random weights, as a table.
ENGINES := $(BIN)/python benches/engines.py --table
engines-demo: setup
	$(BIN)/scumble registry publish demo/base --name scumble/demo
	$(BIN)/scumble build engine --base scumble/demo --flavour tensorrt_rtx --sm 89 --sm 120

# Registers and shared memory of the fused LoRA kernel, for GPUs that need not be there. Triton takes a gigabyte.
kernels: setup
	$(PIP) -e '.[triton]'
	$(BIN)/python benches/lora_kernel.py

engines-sd15: setup
	PYTHONPATH=tests nice -n 5 $(ENGINES) --family sd1.5 --profile deploy/profiles/sd15.toml

engines-sdxl: setup
	PYTHONPATH=tests nice -n 5 $(ENGINES) --family sdxl --profile deploy/profiles/sdxl.toml

serve: $(DEMO_READY)
	$(BIN)/scumble serve

# Pins what the tests ran with; names versions only, no machine and no host.
lock: setup
	$(BIN)/pip freeze --exclude-editable | grep -v '^scumble' | sed 's/+cpu//' | grep -v '^nvidia-pytriton' > constraints.txt

clean:
	rm -rf $(VENV) demo/out .mypy_cache .ruff_cache .pytest_cache .coverage htmlcov
