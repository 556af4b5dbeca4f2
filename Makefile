# Every target works alone, from a fresh clone with Python 3.10 or newer and nothing installed.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed

.PHONY: demo demo-parts test test-slow check

demo: $(STAMP)  ## train, evaluate, HA-DPO, evaluate again, on a small world: some minutes on two cores
	$(VENV)/bin/python -m demo.run

demo-parts: $(STAMP) demo/out/report.html  ## after the demo: parts of its LLaVA trained alone, and evaluated
	$(VENV)/bin/python -m demo.parts

# A demo writes it last. No prerequisite: a finished demo is not made again.
demo/out/report.html:
	$(MAKE) demo

test: $(STAMP)  ## the tests, some minutes
	$(VENV)/bin/python -m pytest -m "not slow"

test-slow: $(STAMP)  ## the demo from beginning to end, and all else that takes minutes
	$(VENV)/bin/python -m pytest -m slow

check: $(STAMP)  ## style and lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# Installed again when the pins change.
$(STAMP): requirements.txt
	@echo "installing the pinned packages into $(VENV): a minute or two"
	$(VENV)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $(STAMP)
