# make train · make test · make lint · make bench — each sets itself up in .venv; only Python >= 3.11 and make are needed.
# make interop sets up .venv-openenv and .venv-verifiers, where the tests of these suites run: their pins exclude ours.
# make vllm sets up .venv-vllm, where the tests of the vLLM engine run on a CPU; make test runs them where it is there.
# Another torch build (CUDA): make train TORCH="torch==2.13.0 --index-url URL" with the URL that pytorch.org shows for your card.
PYTHON ?= python3
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
TORCH ?= torch==2.13.0
ARGS ?=
WORKERS ?= logical

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

VLLM_PIP := $(VLLM_VENV)/bin/python -m pip --disable-pip-version-check install --quiet

# What ESPL_REQUIRE names is never skipped; vLLM and Ray are required of the second environment, the rest of the first.
COMMA := ,
REQUIRED := $(subst $(COMMA), ,$(ESPL_REQUIRE))
SECOND := $(or $(filter vllm ray,$(REQUIRED)),$(wildcard $(VLLM_VENV)/.ready))
SUITES := openenv verifiers
GUESTS := $(sort $(filter $(SUITES),$(REQUIRED)) $(foreach suite,$(SUITES),$(if $(wildcard .venv-$(suite)/.ready),$(suite))))

.PHONY: train test test-main test-vllm vllm interop $(SUITES:%=test-%) lint bench clean

train: $(VENV)/.train
	@$(BIN)/espl-train $(ARGS)

test: test-main
	$(if $(GUESTS),@$(MAKE) --no-print-directory $(GUESTS:%=test-%))
	$(if $(SECOND),@$(MAKE) --no-print-directory test-vllm)

test-main: lint
	ESPL_REQUIRE=$(subst $() ,$(COMMA),$(filter-out vllm ray $(SUITES),$(REQUIRED))) \
		$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

test-vllm: vllm
	ESPL_REQUIRE=vllm,ray OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} \
		$(VLLM_VENV)/bin/python -m pytest -m vllm tests/test_engines_*.py tests/test_evaluate_vllm.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.dev
	@for script in benchmarks/engine.py benchmarks/logprobs.py benchmarks/grading.py; do \
		echo "== $$script"; $(BIN)/python $$script $(ARGS) || exit 1; done

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "espl needs Python 3.11 or newer; choose one with: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	@echo "setting up $(VENV)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.train: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing torch (once)"
	@$(PIP) $(TORCH)
	@echo "installing espl and what it trains with (once)"
	@$(PIP) --editable ".[train]"
	@touch $@

$(VENV)/.dev: $(VENV)/.train
	@echo "installing the test tools (once)"
	@$(PIP) --editable ".[train,reasoning,games,docker,openskill,dev]"
	@touch $@

$(SUITES:%=test-%): test-%: .venv-%/.ready
	ESPL_REQUIRE=$* OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} .venv-$*/bin/python -m pytest -m $* tests/test_interop_*.py

interop: $(SUITES:%=.venv-%/.ready)

.SECONDARY: $(SUITES:%=.venv-%/.packages)

.venv-%/.packages: constraints-%.txt
	@echo "setting up .venv-$* (once)"
	@$(PYTHON) -m venv .venv-$*
	@.venv-$*/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --requirement constraints-$*.txt
	@touch $@

.venv-%/.ready: pyproject.toml .venv-%/.packages
	@.venv-$*/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --editable .
	@touch $@

vllm: $(VLLM_VENV)/.ready

$(VLLM_VENV)/.packages: constraints-vllm.txt
	@echo "setting up $(VLLM_VENV) (once)"
	@$(PYTHON) -m venv $(VLLM_VENV)
	@$(VLLM_PIP) --constraint constraints-vllm.txt $(TORCH)
	@$(VLLM_PIP) --no-deps --requirement constraints-vllm.txt
	@touch $@

$(VLLM_VENV)/.ready: pyproject.toml $(VLLM_VENV)/.packages
	@$(VLLM_PIP) --no-deps --editable .
	@touch $@

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(SUITES:%=.venv-%) build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
