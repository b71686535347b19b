# Two commands: `make demo` shows the whole path on synthetic faces, `make test` runs every test.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= demo

.PHONY: demo test lint slow clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[methods,lakes,test,lint]'
	touch $@

demo: $(VENV)/.installed
	rm -rf $(DEMO)
	$(BIN)/python jobs/synthesize.py $(DEMO)/faces --faces 20000
	$(BIN)/python jobs/cluster.py $(DEMO)/faces $(DEMO)/clusters
	$(BIN)/python jobs/evaluate.py $(DEMO)/clusters $(DEMO)/faces
	@echo "labels: $(DEMO)/clusters/labels/ (the current run is named in $(DEMO)/clusters/latest.json)"

test: $(VENV)/.test
	$(BIN)/python -m pytest -m "not slow and not gpu"

slow: $(VENV)/.test
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(DEMO)
