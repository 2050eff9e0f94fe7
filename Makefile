# make demo: from a softmax video transformer to a ReHyAt model and back to PyTorch, on two cores.
# make check: what to run before a commit: format, lint, layers, types, and the tests that take seconds.
# make test: the complete test suite.
# make notebooks: execute notebooks/ on the CPU, and store their outputs; NOTEBOOKS=NAME for one of them.
# make docs: the documentation site, in build/site; make docs-links: checks its links to other sites, over the network.
# make newcomer: the commands of README.md, from top to bottom, in a clone.
# make dist: the source archive and the wheel of a release, in dist/.
# make wheel-check: install that wheel into an empty environment, and run the quick demo there.
# All of them install what they need into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUNS := runs/demo
export JAX_PLATFORMS ?= cpu

.PHONY: install demo test check fault-test fuzz notebooks lint clean-demo docs docs-links newcomer dist wheel-check
.DELETE_ON_ERROR:

install: $(VENV)/.installed

# torch first and alone: what depends on it then keeps this build.
$(VENV)/.installed: pyproject.toml requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable '.[test]'
	touch $@

test: lint
	$(BIN)/pytest -n 2 --dist worksteal --durations 20 tests

# Kills, damage, full disks: see docs/faults.md. As root, for the disks.
fault-test: install
	PYTHONPATH=. $(BIN)/python tests/fault_suite.py

# Gives damaged input to every reader of users' files (`make test` uses 100 cases each), then tries hostile command lines.
# The seed changes every week. This takes a night; `make fuzz COMMANDS=1000` tries fewer command lines.
COMMANDS ?= 20000
fuzz: install
	FUZZ_EXAMPLES=20000 $(BIN)/pytest -n 2 tests/test_fuzz.py
	$(BIN)/python tests/fuzz_commands.py --cases $(COMMANDS) --seed $(shell date +%G%V)

# Prints the seconds of each. It fails on an error, and on a notebook that takes five minutes.
notebooks: $(VENV)/.notebooks_installed
	PYTHONPATH=. $(BIN)/python tests/run_notebooks.py $(NOTEBOOKS)

$(VENV)/.notebooks_installed: $(VENV)/.installed
	$(BIN)/pip install --quiet --editable '.[notebooks]'
	touch $@

# A wider selection is slower than a habit can be. Each of these modules takes seconds.
FAST_TESTS := tests/test_imports.py tests/test_formats.py tests/test_flow.py tests/test_records.py tests/test_samplers.py \
    tests/test_hybrid_attention.py tests/test_launch.py tests/test_offline_wheels.py tests/test_compiler_options.py \
    tests/test_extending.py tests/test_documentation.py tests/test_notebooks.py

check: lint
	$(BIN)/pytest -n 2 $(FAST_TESTS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy

demo: install
	$(BIN)/rehyat demo --workdir $(RUNS)

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/pip install --quiet --editable '.[docs]'
	touch $@

# Warnings are errors. Among them are links inside the site to pages or headings that do not exist.
SITE := PYTHONPATH=. $(BIN)/sphinx-build --fail-on-warning --keep-going --conf-dir docs/site --doctree-dir build/doctrees

docs: $(VENV)/.installed-docs
	$(SITE) --builder html . build/site

docs-links: $(VENV)/.installed-docs
	$(SITE) --builder linkcheck . build/links

newcomer: install
	$(BIN)/python tests/newcomer.py

dist: install
	rm -rf dist
	$(BIN)/python -m build

# It downloads packages, and prints how long the rest takes.
wheel-check: dist
	$(PYTHON) tests/wheel_check.py dist/*.whl

# The demo resumes where it was stopped; this starts it over.
clean-demo:
	rm -rf $(RUNS)
