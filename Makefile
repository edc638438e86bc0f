# Everything works from a fresh clone: each target sets up what it needs first.
PYTHON ?= python3
PY := .venv/bin/python

.PHONY: setup train test soak lint bench clean

setup: .venv/ready  ## .venv with everything that training needs
	@echo "Ready: source .venv/bin/activate, then llmtrain --help"

train: .venv/ready  ## set up, then train the default model (5 to 9 minutes on 2 cores)
	$(PY) -m llmtrain

test: .venv/ready-dev  ## unit, multi-process and integration tests (16 to 20 minutes on 2 cores)
	$(PY) -m pytest -n 3 --dist loadfile --no-loadscope-reorder
	@if $(PY) -c "from llmtrain.gpus import num_gpus; raise SystemExit(not num_gpus())"; then $(PY) -m pytest --gpu; fi

soak: .venv/ready-dev  ## the long campaigns with their full counts
	$(PY) -m pytest --soak -m soak -s

lint: .venv/ready-dev  ## style and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright

bench: .venv/ready-dev  ## our step against named peers, in one run (installs them into .venv-peers)
	$(PY) -m benchmarks.step
	$(PY) -m benchmarks.qlora
	$(PY) -m benchmarks.lecture
	$(PY) -m benchmarks.overhead
	$(PY) -m benchmarks.ranks
	$(PY) -m benchmarks.saving
	$(PY) -m benchmarks.service
	$(PY) -m benchmarks.sharding

clean:
	rm -rf .venv .venv-peers build *.egg-info .pytest_cache .ruff_cache

.venv/ready: pyproject.toml constraints.txt
	@echo "Setting up .venv (once; a minute or two)"
	@test -x $(PY) || $(PYTHON) -m venv .venv
	@$(PY) -m pip install --quiet --disable-pip-version-check torch==2.13.0
	@$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

.venv/ready-dev: .venv/ready
	@echo "Setting up the tools for tests (once)"
	@$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@
