# `make test` and `make demo` are each enough on a fresh machine with Python 3.11 or newer (with
# its venv module), make and g++. Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
BIN := $(VENV)/bin

.PHONY: demo test check clean

demo: $(VENV)/demo.stamp
	$(BIN)/ridgeline demo

# Workers share the cores: a thread that waits for work gives its core up.
test: check
	OMP_WAIT_POLICY=passive $(BIN)/pytest -n $(JOBS)

# What needs no test run: the same as the pre-commit hooks.
check: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python

clean:
	rm -rf $(VENV) build dist ridgeline.egg-info

$(VENV)/demo.stamp: EXTRAS := demo
$(VENV)/dev.stamp: EXTRAS := dev,demo
$(VENV)/%.stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(None if sys.version_info >= (3, 11) else f"ridgeline needs Python 3.11 or newer, but $(PYTHON) is {v}; name another: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
