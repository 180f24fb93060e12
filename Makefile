# make quickstart   train a small Llama 4 on Python's own source code, then sample from it
# make test         run the test suite
# make lint         check formatting and style
#
# Needs python3 (3.11, 3.12 or 3.13), make and a package registry. Another interpreter: make test PYTHON=python3.12
# Everything is installed into $(VENV); `make clean` removes that, and leaves runs/ alone.

PYTHON ?= python3
VENV ?= .venv
PIP := $(VENV)/bin/python -m pip install -q --disable-pip-version-check
INSTALLED := $(VENV)/.installed

# Large pages for large arrays (glibc on Linux; ignored elsewhere): a training step on a CPU takes a fifth less time.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

CONFIG ?= configs/quickstart.yml
PROMPT ?= def read_lines(path):\n    """

.PHONY: quickstart test lint install same-python clean
.DELETE_ON_ERROR:

quickstart: install
	$(VENV)/bin/python train.py $(CONFIG)
	@printf '\nA sample, from the prompt on:\n\n'
	$(VENV)/bin/python decode.py $(CONFIG) echo=true max_new_tokens=160 temperature=0.7 seed=1 \
	  prompt="$$(printf '%b' '$(PROMPT)')"

test: install
	$(VENV)/bin/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations=10

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .

install: $(INSTALLED)

# The stamp is newer than pyproject.toml once its requirements are installed.
$(INSTALLED): pyproject.toml | $(VENV)/bin/python
	@echo 'installing maxllama4 into $(VENV); a few minutes the first time'
	@$(VENV)/bin/python -m pip --version >/dev/null 2>&1 || $(VENV)/bin/python -m ensurepip >/dev/null
	@$(PIP) -e '.[test]'
	@touch $@

$(VENV)/.installed-dev: $(INSTALLED)
	@$(PIP) -e '.[dev]'
	@touch $@

VERSION := -c 'import sys; print("%d.%d" % sys.version_info[:2])'

$(VENV)/bin/python:
	@case "$$($(PYTHON) $(VERSION) 2>/dev/null)" in \
	  3.11|3.12|3.13) ;; \
	  '') echo '$(PYTHON) does not run: install Python 3.11, 3.12 or 3.13, or name one: make PYTHON=python3.12' >&2; exit 1 ;; \
	  *) echo "$(PYTHON) is Python $$($(PYTHON) $(VERSION)), but 3.11, 3.12 or 3.13 is needed: make PYTHON=python3.12" >&2; exit 1 ;; \
	esac
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo '$(PYTHON) cannot make a virtual environment (on Debian and Ubuntu: apt install python3-venv)' >&2; exit 1; }

# A Python that was asked for by name must be the one that is used.
ifneq ($(filter command% environment%,$(origin PYTHON)),)
install: same-python
endif

same-python: | $(VENV)/bin/python
	@test "$$($(PYTHON) $(VERSION) 2>/dev/null)" = "$$($(VENV)/bin/python $(VERSION))" || { \
	  echo '$(VENV) holds Python '"$$($(VENV)/bin/python $(VERSION))"', not $(PYTHON): make clean first, or choose another folder: VENV=.venv-other' >&2; exit 1; }

clean:
	rm -rf $(VENV)
