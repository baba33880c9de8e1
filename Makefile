# make demo      install, then adapt a frozen detector to scenes of handwritten digits
# make test      install, then run the tests without the long ones
# make test-all  install, then run all tests
# make docs      install, then build the documentation into docs/_build/html
# make install   .venv with the pinned stack of requirements/ and mmpeft
#
# Variables: METHOD (a file of configs/_base_/methods), TASK (coco, ade20k, dota,
# classification, internvit) and DATA (digits, photos) choose what the demo runs, DEMO_ARGS is
# passed on to it, TEST_ARGS to pytest;
# PYTHON (3.10 to 3.12), VENV, PIP_FIND_LINKS and MAX_JOBS steer the installation (see
# requirements/install.sh).

VENV ?= .venv
METHOD ?=
TASK ?=
DATA ?=
DEMO_ARGS ?=
TEST_ARGS ?=

# The name of the stamp holds what was installed: a changed lock installs again.
LOCK := $(shell cat requirements/*.txt requirements/install.sh setup.py | sha256sum | cut -c 1-12)
STAMP := $(VENV)/installed-$(LOCK)

.PHONY: demo test test-all docs install reinstall lint format clean distclean help
.DEFAULT_GOAL := help

demo: $(STAMP)
	$(VENV)/bin/python projects/demo/run.py $(if $(METHOD),--method $(METHOD)) $(if $(TASK),--task $(TASK)) $(if $(DATA),--data $(DATA)) $(DEMO_ARGS)

PYTEST = OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(VENV)/bin/python -m pytest -n 2 --dist worksteal

test: $(STAMP)
	$(PYTEST) -m "not long" $(TEST_ARGS)

test-all: $(STAMP)
	$(PYTEST) $(TEST_ARGS)

# Warnings, such as references that lead nowhere, are errors.
docs: $(STAMP)
	$(VENV)/bin/python -m sphinx -q -W --keep-going -b html docs docs/_build/html
	@echo 'Open docs/_build/html/index.html in a browser.'

install: $(STAMP)

$(STAMP):
	@requirements/install.sh $(VENV)
	@rm -f $(VENV)/installed-*
	@touch $@

reinstall:
	rm -rf $(VENV)
	$(MAKE) install

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(STAMP)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# What can be made again in seconds; data, checkpoints and the environment stay.
clean:
	rm -rf build dist docs/_build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find mmpeft tools tests configs -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	@echo 'This deletes $(VENV), data/ and everything in work_dirs/ (checkpoints, logs).'
	@[ "$(YES)" = 1 ] || { printf 'Go on? [y/N] '; read answer && [ "$$answer" = y ]; }
	rm -rf $(VENV) data
	find work_dirs -mindepth 1 ! -name .gitkeep -delete

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile
