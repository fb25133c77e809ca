# Everything starts here: `make run` is the whole job on the embedded default, `make test` its
# proof. The first of either makes .venv; later ones reuse it until the pins change.

.DEFAULT_GOAL := help
.PHONY: help run test quick setup check clean

READY  := .venv/.ready
VENV   := .venv/bin/python
# Tests start many processes, each of which would otherwise compile every module anew.
TESTS  := env -u PYTHONDONTWRITEBYTECODE $(VENV) -m
JOB    := launch.py quant=mb66 mode=mlp
# What `make clean` removes. Never outputs/: results are the user's.
DEBRIS := .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info

help:
	@echo "make run     set up once, then quantize, train and evaluate the default model"
	@echo "make test    set up once, then run the test suite"
	@echo "make quick   run the tests that a change can break, nearest first, in under a minute"
	@echo "make setup   only make .venv and fetch the model file"
	@echo "make check   lint (ruff) and type-check (mypy)"
	@echo "make clean   remove .venv and caches; outputs/ stays"
	@echo "ARGS='...' is passed to run, test and quick; PYTHON=/path/to/python picks the interpreter"

run: $(READY)
	$(info Running python $(strip $(JOB) $(ARGS)))
	@$(VENV) $(JOB) $(ARGS)

test: $(READY)
	$(info Running the tests: $(strip pytest $(ARGS)))
	@$(TESTS) pytest --numprocesses 2 --dist worksteal $(ARGS)

quick: $(READY)
	@$(TESTS) tests.quick $(ARGS)

setup: $(READY)
	@echo ".venv is ready"

check: $(READY)
	$(info Checking style (ruff) and types (mypy))
	@$(VENV) -m ruff check --quiet .
	@$(VENV) -m mypy --no-error-summary

clean:
	$(info Removing .venv and caches)
	@rm -rf $(DEBRIS)
	@find . -name __pycache__ -not -path './outputs/*' -prune -exec rm -rf {} +

# setup.sh renames this stamp into place as its last act.
$(READY): pyproject.toml constraints.txt
	@./setup.sh
