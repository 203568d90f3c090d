# make demo   installs into .venv and runs the demo
# make test   installs the test tools too, then lint, types, doctests and the whole suite
# make test-fast  what can be tested in three minutes on two cores
# make fuzz   many more damaged checkpoints of every format than make test tries
# make test-matrix  the suite with the oldest and the newest versions that are promised, and the wheel as users get it
# make test-torchao the tests with models that torchao quantised; installed, it would slow down every other start
# make docs   builds the documentation, with the API reference, into build/docs; its tools get their own environment
# make test-peers   compares with the libraries that write other layouts, which get an environment of their own
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PEERS := .venv-peers
DOCS := .venv-docs
TORCHAO := .venv-torchao
OLDEST := .venv-oldest
NEWEST := .venv-newest
WHEEL := .venv-wheel
TORCH ?= $$(grep '^torch==' constraints.txt)
INSTALL := -m pip install --quiet --disable-pip-version-check
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-fast lint types suite fuzz test-matrix test-oldest test-newest test-wheel test-torchao test-peers \
	benchmark assets cards docs stub clean

demo: $(VENV)/.installed
	$(BIN)/hf-gated-sae demo

test: lint types suite

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-test
	$(BIN)/mypy

# One process per core, each with one thread: the models are tiny.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses auto --dist worksteal --durations 10

suite: $(VENV)/.installed-test
	$(PYTEST) -m "not benchmark"

test-fast: $(VENV)/.installed-test
	$(PYTEST) -m "not benchmark and not slow" tests

docs: $(DOCS)/.installed
	$(DOCS)/bin/python docs/make_site.py
	rm -rf build/docs
	cd build && ../$(DOCS)/bin/zensical build --strict --clean --config-file zensical.toml

test-peers: $(VENV)/.installed-test $(PEERS)/.installed
	rm -rf build/peers
	for owner in saelens dictionary_learning sparsify; do \
		$(PEERS)/bin/python tests/peers/owners/write_$$owner.py build/peers/$$owner || exit 1; \
	done
	SAE_PEERS=build/peers $(BIN)/python -m pytest -q tests/peers

test-matrix: test-wheel test-newest test-oldest

test-oldest: $(OLDEST)/.installed
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -q --numprocesses auto --dist worksteal -m "not benchmark" tests

test-newest: $(NEWEST)/.installed
	OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest -q --numprocesses auto --dist worksteal -m "not benchmark" tests

# Without constraints, away from the sources: what `pip install hf-gated-sae` gives has to show an effect.
test-wheel:
	rm -rf $(WHEEL) build/wheel
	$(PYTHON) -m venv $(WHEEL)
	$(WHEEL)/bin/python $(INSTALL) $(TORCH)
	$(WHEEL)/bin/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir build/wheel .
	$(WHEEL)/bin/python $(INSTALL) $(TORCH) build/wheel/*.whl
	cd build/wheel && ../../$(WHEEL)/bin/hf-gated-sae demo

test-torchao: $(TORCHAO)/.installed
	$(TORCHAO)/bin/python -m pytest -q tests/hooks/test_quantised.py

fuzz: $(VENV)/.installed-test
	HF_GATED_SAE_FUZZ_CASES=1500 $(BIN)/python -m pytest -q -s tests/formats/test_fuzz.py

benchmark: $(VENV)/.installed-test
	$(BIN)/python -m pytest -q -s -m benchmark tests/benchmarks

assets: $(VENV)/.installed-test
	$(BIN)/python hub_scripts/make_demo_assets.py lm
	$(BIN)/python hub_scripts/make_demo_assets.py saes
	$(BIN)/python hub_scripts/render_cards.py

cards: $(VENV)/.installed-test
	$(BIN)/python hub_scripts/render_cards.py

stub: $(VENV)/.installed-test
	$(BIN)/python -c "from pathlib import Path; from hf_gated_sae import exports; \
		Path('hf_gated_sae/__init__.pyi').write_text(exports.stub())"

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) --editable ".[test]"
	touch $@

$(OLDEST)/.installed: pyproject.toml tests/matrix/oldest.txt
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python $(INSTALL) $(TORCH)
	$(OLDEST)/bin/python $(INSTALL) $(TORCH) --requirement tests/matrix/oldest.txt --editable ".[test]"
	touch $@

$(NEWEST)/.installed: pyproject.toml
	test -x $(NEWEST)/bin/python || $(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python $(INSTALL) $(TORCH)
	$(NEWEST)/bin/python $(INSTALL) --upgrade --upgrade-strategy eager $(TORCH) --editable ".[test]"
	touch $@

$(TORCHAO)/.installed: pyproject.toml constraints.txt
	test -x $(TORCHAO)/bin/python || $(PYTHON) -m venv $(TORCHAO)
	$(TORCHAO)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--editable ".[test]" torchao
	touch $@

# torchvision comes along, in a build that may not fit this torch; then importing transformers fails with it.
$(PEERS)/.installed: tests/peers/requirements.txt constraints.txt
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --requirement tests/peers/requirements.txt \
		$$(grep '^torch==' constraints.txt)
	$(PEERS)/bin/python -m pip uninstall --quiet --yes torchvision
	touch $@

# The extra alone, without the package and torch: the generator reads the source and does not import it.
$(DOCS)/.installed: pyproject.toml
	test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
		print(*project["optional-dependencies"]["docs"], sep="\n")' > $(DOCS)/requirements.txt
	$(DOCS)/bin/python $(INSTALL) --requirement $(DOCS)/requirements.txt
	touch $@

clean:
	rm -rf $(VENV) $(PEERS) $(DOCS) $(TORCHAO) $(OLDEST) $(NEWEST) $(WHEEL) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
