# Every target sets itself up: all it needs is make and Python 3.11 or newer.
# Only relative paths below, so that the folder's name may contain spaces.

MODELS := requirements-models.txt
REQUIREMENTS := requirements.txt requirements-dev.txt requirements-census.txt constraints.txt $(MODELS)
ADMITTED := requirements-oldest.txt requirements-newest.txt

VENV := .venv
VENV_PYTHON := $(VENV)/bin/python
# The stamp carries a checksum of what was asked for, and exists only after a complete install.
CHECKSUM := $(shell cat $(REQUIREMENTS) | cksum | cut -d ' ' -f 1)
INSTALLED := $(VENV)/installed-$(CHECKSUM)
# The stamp says nothing when the Python it was made with has gone.
GONE := $(shell $(VENV_PYTHON) -c "import pip" 2>/dev/null || echo gone)

# By default the threads of several processes spin for each other, at five times the cost.
export GOMP_SPINCOUNT ?= 10000

# As many tests at once as there are cores; four notebooks fit into 16 GiB.
WORKERS := -n logical --maxprocesses 4 --dist loadgroup --no-loadscope-reorder

# What the unit tests are not: whole notebooks and what is made of their outputs.
UNIT := $(addprefix --ignore=tests/test_,notebooks.py site.py browser.py jupyterlab.py drawings.py)

.DEFAULT_GOAL := help
.PHONY: help lab notebooks test test-nightly test-oldest test-newest lint benchmark outputs study census mutants site gone

help: ## show this list
	@echo "make <target> [ARGS=...]: each target installs what it needs into $(VENV), once."
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-13s %s\n", $$1, $$2 }' Makefile

lab: $(INSTALLED) ## do the exercises in JupyterLab: copies in my/, which are yours (ARGS=--no-browser)
	$(VENV_PYTHON) -m tools.lab $(ARGS)

notebooks: $(INSTALLED) ## run the notebooks into build/, to open (with SEED=1: on other prompts)
	$(VENV_PYTHON) -m tools.notebooks run $(ARGS)

test: lint ## run the linters and every test that is not long, the notebooks included
	@sh tools/chromium.sh
	$(VENV_PYTHON) -m pytest tests -m "not nightly" $(WORKERS) $(ARGS)

test-nightly: $(INSTALLED) ## run the long tests: the notebooks with every exercise solved
	@sh tools/chromium.sh
	$(VENV_PYTHON) -m pytest tests -m nightly $(ARGS)

test-oldest: ## run the unit tests with the lowest versions that requirements.txt admits
test-newest: ## run the unit tests with the highest (LENS=<url>: with that TransformerLens)
test-oldest test-newest: test-%:
	@PYTHON="$(PYTHON)" sh tools/make_venv.sh .venv-$* \
		.venv-$*/installed-$(shell cat $(REQUIREMENTS) $(ADMITTED) | cksum | cut -d ' ' -f 1) \
		"$(MODELS)" requirements-$*.txt
	$(if $(LENS),.venv-$*/bin/python -m pip install --no-deps "$(LENS)")
	.venv-$*/bin/python -m pytest tests -m "not nightly" $(UNIT) $(WORKERS) $(ARGS)

lint: $(INSTALLED) ## check style and format, the notebooks included
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check .

benchmark: $(INSTALLED) ## time sweeps beside TransformerLens (ARGS=--quick: a sample)
	$(VENV_PYTHON) -m tools.benchmark $(ARGS)

outputs: $(INSTALLED) ## rewrite the outputs, results and tables that are committed
	$(VENV_PYTHON) -m tools.notebooks outputs $(ARGS)

site: $(INSTALLED) ## build the site from what is committed: open build/site/index.html
	$(VENV_PYTHON) -m tools.site $(ARGS)

study: $(INSTALLED) ## search for circuits: what the IOI notebook reads of it (ARGS=worst: a part)
	$(VENV_PYTHON) -m tools.study $(ARGS)

census: $(INSTALLED) ## measure many toys or models, on Ray (ARGS=--dry-run: what it would cost)
	$(VENV_PYTHON) -m census $(ARGS)

mutants: $(INSTALLED) ## change the analysis in small ways: would the tests notice? (ARGS="--n 50")
	$(VENV_PYTHON) -m pip install -q -c constraints.txt cosmic-ray==8.7.0
	$(VENV_PYTHON) -m tools.mutants $(ARGS)

$(INSTALLED): $(if $(GONE),gone)
	@PYTHON="$(PYTHON)" sh tools/make_venv.sh "$(VENV)" "$@" "$(MODELS)"

gone:  # or being made by another make at this moment
	@$(VENV_PYTHON) -c "import pip" 2>/dev/null || rm -f "$(INSTALLED)"
