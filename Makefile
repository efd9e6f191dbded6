# Everything runs in environments of its own, made from PyPI: nothing is installed elsewhere.
PYTHON ?= python3
# The environment with the newest Avocado; the one with the oldest lies beside it.
VENV ?= .venv
OLDEST := $(VENV)-103
# The one for the demo, with only what that needs.
DEMO := $(VENV)-demo
# The tests that run on the oldest Avocado too.
OLDEST_TESTS := tests/test_plugin.py tests/test_refusal.py tests/test_endings.py tests/test_waiting.py
# How many tests run at the same time: most of them wait for Avocado to start.
WORKERS := 4
# The interpreters of the matrix: those of pyenv, or else those on the PATH.
PYENV_ROOT ?= $(HOME)/.pyenv
PYTHONS ?= $(foreach version,3.9 3.10 3.11 3.12 3.13,$(firstword \
	$(wildcard $(PYENV_ROOT)/versions/$(version).*/bin/python) $(shell command -v python$(version) 2> /dev/null)))
export PIP_CACHE_DIR := $(CURDIR)/.cache/pip
export PRE_COMMIT_HOME := $(CURDIR)/.cache/pre-commit
.NOTPARALLEL:
SOURCES := pyproject.toml README.rst $(wildcard avocado_vt_joblock/*.py etc/avocado/conf.d/* docs/*.rst)

.PHONY: help demo check lint docs test guests stress bench matrix rpm rpmbuild-there clean

help:  ## List these targets.
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

demo: $(DEMO)/made  ## See the lock at work with real jobs, without QEMU: a minute.
	$(DEMO)/bin/python tests/demo.py

check: lint docs test  ## Run all that CI runs.

lint: $(VENV)/made  ## Check and repair style, spelling and formats, and check types, as before a commit.
	$(VENV)/bin/pre-commit run --all-files --show-diff-on-failure

docs: $(VENV)/made  ## Build the manual in docs/_build/html.
	$(VENV)/bin/sphinx-build -q -W --keep-going -E -b html docs docs/_build/html

test: $(VENV)/made $(OLDEST)/made  ## Run the tests, and those of the plugin once more on Avocado 103.0.
	$(VENV)/bin/pytest --numprocesses=$(WORKERS)
	$(OLDEST)/bin/pytest --numprocesses=$(WORKERS) $(OLDEST_TESTS)

guests: $(VENV)/made  ## Run every ending of a job with real QEMU guests: a quarter of an hour.
	$(VENV)/bin/pytest --capture=no --durations=0 -m "" tests/guests

stress: $(VENV)/made  ## Run the tests of the lock and of many jobs with 100 times the rounds: hours.
	$(VENV)/bin/pytest --capture=no --verbose --stress=100 tests/lock tests/test_plugin.py

bench: $(VENV)/made  ## Measure what the lock costs beside avocado-vt's own plugin.
	$(VENV)/bin/python -W ignore benchmarks/bench.py

matrix:  ## Run the tests on each Python that is supported and there.
	@for python in $(PYTHONS); do \
		version=$$($$python -c 'import sys; print("%d.%d" % sys.version_info[:2])') && \
		$(MAKE) test PYTHON=$$python VENV=.venv-$$version GROUP=test || failed="$$failed $$python"; \
	done; \
	if [ "$$failed" ]; then echo "Failed:$$failed"; exit 1; fi

rpm: rpmbuild-there $(VENV)/made  ## Build RPMs in the directory rpmbuild.
	rm -rf rpmbuild
	$(VENV)/bin/python -m build --no-isolation --sdist --outdir rpmbuild/SOURCES
	rpmbuild -ba --nodeps --quiet --define '_topdir $(CURDIR)/rpmbuild' \
		--define '__python3 $(abspath $(VENV))/bin/python' packaging/*.spec
	rm -rf *.egg-info

rpmbuild-there:
	@command -v rpmbuild > /dev/null || { echo 'There is no rpmbuild here. It is in' \
		'rpm-build (Fedora), or in rpm and python3-packaging (Debian).'; exit 1; }

clean:  ## Remove what the other targets make.
	rm -rf .venv .venv-* build dist rpmbuild docs/_build *.egg-info .cache .mypy_cache .pytest_cache .ruff_cache

$(VENV)/made: AVOCADO := 113
$(VENV)/made: GROUP := dev
$(OLDEST)/made: AVOCADO := 103
$(OLDEST)/made: GROUP := test
$(VENV)/made $(OLDEST)/made: $(SOURCES) tests/avocado-103.txt tests/avocado-113.txt tests/netifaces/pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --upgrade pip
	$(@D)/bin/pip install --quiet --no-deps --requirement tests/avocado-$(AVOCADO).txt
	$(@D)/bin/pip install --quiet --group $(GROUP)
	$(@D)/bin/pip install --quiet --force-reinstall --no-deps --no-build-isolation .
	rm -rf build *.egg-info
	touch $@

$(DEMO)/made: $(SOURCES) tests/avocado-113.txt
	@test -d $(@D) || echo "First the demo gets an environment, $(@D): about half a minute, once."
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/pip install --quiet --disable-pip-version-check --no-deps \
		--requirement tests/avocado-113.txt
	@$(@D)/bin/pip install --quiet --disable-pip-version-check --force-reinstall --no-deps \
		--no-build-isolation .
	@rm -rf build *.egg-info
	@touch $@
