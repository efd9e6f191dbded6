# Everything runs in environments of its own, made from PyPI: nothing is installed elsewhere.
PYTHON ?= python3
# Interpreters for the matrix besides those on the PATH.
PYTHONS ?= $(wildcard $(or $(PYENV_ROOT),$(HOME)/.pyenv)/versions/3.*/bin/python)
export PIP_CACHE_DIR := $(CURDIR)/.cache/pip
export VIRTUALENV_OVERRIDE_APP_DATA := $(CURDIR)/.cache/virtualenv
.NOTPARALLEL:
SOURCES := pyproject.toml README.rst $(wildcard avocado_vt_joblock/*.py etc/avocado/conf.d/*)

.PHONY: help demo check lint types docs test guests stress bench matrix clean

help:  ## List these targets.
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

demo: .venv/made  ## See the lock at work with real jobs.
	.venv/bin/python tests/demo.py

check: lint types docs test  ## Run all that CI runs.

lint: .venv/made  ## Check style and formatting.
	.venv/bin/ruff check
	.venv/bin/ruff format --check

types: .venv/made  ## Check types.
	.venv/bin/mypy

docs: .venv/made  ## Build the manual in docs/_build/html.
	.venv/bin/sphinx-build -q -W --keep-going -E -b html docs docs/_build/html

test: .venv/made .venv-103/made  ## Run the tests, and those of the plugin once more on Avocado 103.0.
	.venv/bin/pytest
	.venv-103/bin/pytest tests/test_plugin.py tests/test_endings.py tests/test_waiting.py

guests: .venv/made  ## Run every ending of a job with real QEMU guests: a quarter of an hour.
	.venv/bin/pytest --capture=no tests/guests/test_guests.py tests/guests/all_endings.py

stress: .venv/made  ## Run the tests of the lock and of many jobs with 100 times the rounds: hours.
	.venv/bin/pytest --capture=no --verbose --stress=100 tests/lock tests/test_jobs.py

bench: .venv/made  ## Measure the lock beside others, and make the page docs/figures.rst of it.
	.venv/bin/python benchmarks/bench.py

matrix: .venv/made  ## Run the tests on each Python and Avocado that is supported and there.
	.venv/bin/tox run $(if $(PYTHONS),--discover $(PYTHONS)) $(TOX_ARGS)
	rm -rf build *.egg-info

clean:  ## Remove what the other targets make.
	rm -rf .venv .venv-* build dist docs/_build *.egg-info .cache .tox .mypy_cache .pytest_cache .ruff_cache

.venv/made: AVOCADO := 113
.venv/made: GROUP := dev
.venv-103/made: AVOCADO := 103
.venv-103/made: GROUP := test
.venv/made .venv-103/made: $(SOURCES) tests/avocado-103.txt tests/avocado-113.txt tests/netifaces/pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --upgrade pip
	$(@D)/bin/pip install --quiet --no-deps --requirement tests/avocado-$(AVOCADO).txt
	$(@D)/bin/pip install --quiet --group $(GROUP)
	$(@D)/bin/pip install --quiet --force-reinstall --no-deps --no-build-isolation .
	rm -rf build *.egg-info
	touch $@
