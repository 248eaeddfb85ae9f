# README's two commands, each enough on a fresh machine with Python 3.11.

PYTHON ?= python3
BIN := .venv/bin
QUICK := tests/core tests/models tests/datasets tests/algorithms tests/privacy tests/client tests/server
# where Python is told to keep no compiled files, every worker and every process that tests start compiles all of them again
export PYTHONDONTWRITEBYTECODE :=

.PHONY: run quick test machines golden claims bench peers lint clean

run: .venv/.ready  ## train the main job on embedded data
	$(BIN)/fedveil run

quick: .venv/.ready-test  ## what each part computes, alone and in this process: while you change it, under 90 s on two cores
	$(BIN)/pytest -n 2 --dist worksteal -q -m "not long and not slow" $(wildcard $(QUICK))

test: .venv/.ready-test  ## all tests, with reduced counts where a claim needs many runs
	$(BIN)/pytest -n 2 --dist worksteal -m "not long" --ignore tests/deployment

machines: .venv/.ready-test  ## servers and clients in network namespaces, killed, cut off and lied to; root, ten minutes
	$(BIN)/pytest -n 3 --dist loadscope tests/deployment
	$(BIN)/pytest -n 2 -m long tests/benchmarks tests/simulations

golden: .venv/.ready-test  ## the bytes of the reference, run beside this code; some ten minutes, and an environment that it makes
	$(BIN)/python tests/golden/compare.py --make-old .venv-reference --new $(BIN)/python

claims: .venv/.ready-test  ## the full counts, written to docs/results.md; about an hour
	PYTHONPATH=tests $(BIN)/python -m claims.results docs/results.md

bench: .venv/.ready  ## speed beside the peers, written to docs/performance.md; about half an hour of a quiet machine
	$(BIN)/python -m benchmarks --write docs/performance.md

peers: .venv-flower/.ready .venv-pfl/.ready .venv-opacus/.ready  ## the frameworks that bench compares with, an environment each

lint: .venv/.ready-dev  ## what .ci/run checks before the tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python .ci/types.py

clean:
	rm -rf .venv build *.egg-info

# Each mark says which extras are installed; the package itself is installed editable.
.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "FedVeil needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv

.venv/.ready: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	touch $@

.venv/.ready-test: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	touch $@ .venv/.ready

.venv/.ready-dev: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,test]'
	touch $@ .venv/.ready .venv/.ready-test

.venv-flower/.ready: constraints.txt
	$(PYTHON) -m venv .venv-flower
	.venv-flower/bin/python -m pip install --quiet -c constraints.txt 'flwr[simulation]==1.41.*' torch==2.13.0
	touch $@

# an environment of its own: Opacus installs packages named benchmarks and examples
.venv-opacus/.ready: constraints.txt
	$(PYTHON) -m venv .venv-opacus
	.venv-opacus/bin/python -m pip install --quiet -c constraints.txt opacus==1.6.0 torch==2.13.0
	touch $@

# pfl needs older packages than constraints.txt has
.venv-pfl/.ready:
	$(PYTHON) -m venv .venv-pfl
	.venv-pfl/bin/python -m pip install --quiet 'pfl[pytorch]==0.6.0' torch==2.13.0
	touch $@
