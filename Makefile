# make demo   installs into .venv and runs the demo
# make test   installs the test tools too, then lint, types, doctests and the whole suite
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test lint types suite benchmark assets cards clean

demo: $(VENV)/.installed
	$(BIN)/hf-gated-sae demo

test: lint types suite

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-test
	$(BIN)/mypy

suite: $(VENV)/.installed-test
	$(BIN)/python -m pytest -q -m "not benchmark"

benchmark: $(VENV)/.installed-test
	$(BIN)/python -m pytest -q -s -m benchmark tests/benchmarks

assets: $(VENV)/.installed-test
	$(BIN)/python hub_scripts/make_demo_assets.py lm
	$(BIN)/python hub_scripts/make_demo_assets.py saes
	$(BIN)/python hub_scripts/render_cards.py

cards: $(VENV)/.installed-test
	$(BIN)/python hub_scripts/render_cards.py

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
