# Two commands: `make run` (DarkRoom with T2MIR-DPT, from nothing to the evaluated curve) and `make test`.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: run test lint bench clean

run: .venv/ready
	$(BIN)/python train.py --env darkroom --backbone dpt --resume

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --durations=10

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check --summary=none --python-interpreter-path $(BIN)/python

bench: .venv/ready
	$(BIN)/python -m tools.bench --json results/bench.json

# Installs once; again when the dependencies change.
.venv/ready: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "error: t2mir needs Python 3.11 or newer; try make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test,tensorboard,ray,minari]'
	touch .venv/ready

clean:
	rm -rf .venv *.egg-info
