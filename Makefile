# Everything runs in one virtual environment, made on first use and again when the pins change.
#
#   make walkthrough                      notebooks 00-05 on the default model
#   make walkthrough MODEL=… DEVICE=…     the same on a hub id or folder, on another device
#   make lab                              JupyterLab on the first notebook
#   make student                          notebooks without solutions, into student/ (OUT=… elsewhere)
#   make lab LAB=student                  JupyterLab on those
#   make test                             the whole test suite, in a browser too where Chromium is installed,
#                                         then every notebook under nbval
#   make exhaustive                       the slow tests too: every architecture, the notebooks on a second model
#   make notebooks                        execute the committed notebooks in place
#   make reproduce                        nbval at one thread and at two (NOTEBOOKS=… some of them, ROUNDS=3
#                                         three times in a row)
#   make site                             all notebooks and pages as one static site, in runs/site
#
# PYTHON=… picks the interpreter (3.11 or newer), VENV=… the environment's folder.

VENV ?= .venv
MODEL ?=
DEVICE ?=
FRESH ?=
LAB ?= notebooks
OUT ?= student
ROUNDS ?= 1
SUITABLE := import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for candidate in python3.11 python3.12 python3.13 python3 python; do \
	"$$candidate" -c "$(SUITABLE)" >/dev/null 2>&1 && { echo "$$candidate"; break; }; done)
BIN := $(VENV)/bin
STAMP := $(VENV)/installed.stamp
NOTEBOOKS = $(wildcard notebooks/*.ipynb)

# The kernel of this environment, not one that the user registered under the same name.
export JUPYTER_PREFER_ENV_PATH = 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.DELETE_ON_ERROR:
.PHONY: help setup assets walkthrough lab exhaustive student test notebooks reproduce site lint typecheck clean

help:
	@sed -n 's/^#   //p' Makefile

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt setup.py
	@test -n "$(PYTHON)" || { echo "error: no Python >= 3.11 with venv found; install one or give PYTHON=/path/to/python" >&2; exit 1; }
	@"$(PYTHON)" -c "$(SUITABLE)" || { echo "error: $(PYTHON) is older than 3.11 or has no venv module" >&2; exit 1; }
	"$(PYTHON)" -m venv --clear "$(VENV)"
	"$(BIN)/python" -m pip install -c constraints.txt -e ".[all]"
	@touch "$(STAMP)"

assets: $(STAMP)
	"$(BIN)/python" -m pruner_lib.assets

walkthrough: assets
	"$(BIN)/python" -m pruner_lib.walkthrough --model "$(MODEL)" --device "$(DEVICE)" $(if $(FRESH),--fresh)

lab: $(STAMP)
	"$(BIN)/jupyter" lab "$(LAB)/00_start_here.ipynb"

student: $(STAMP)
	"$(BIN)/python" -m pruner_lib.course student "$(OUT)"

test: assets
	OMP_NUM_THREADS=1 "$(BIN)/python" -m pytest -m "not slow and not real_model and not browser" --numprocesses auto
	"$(BIN)/python" -m pytest -m "real_model and not slow"
	"$(BIN)/python" -m pytest -m browser tests/browser
ifneq ($(NOTEBOOKS),)
	OMP_NUM_THREADS=1 "$(BIN)/python" -m pytest --nbval --nbval-current-env -n 2 --dist loadfile notebooks
endif

exhaustive: assets
	OMP_NUM_THREADS=1 "$(BIN)/python" -m pytest -m "slow and not real_model and not browser" --numprocesses auto
	"$(BIN)/python" -m pytest -m "slow and real_model"

notebooks: assets
	"$(BIN)/jupyter" nbconvert --to notebook --execute --inplace --ExecutePreprocessor.record_timing=False $(NOTEBOOKS)
	"$(BIN)/python" docs/readme.py

reproduce: assets
	for threads in $(foreach round,$(shell seq $(ROUNDS)),1 2); do \
		OMP_NUM_THREADS=$$threads "$(BIN)/python" -m pytest --nbval --nbval-current-env \
			-n $$((3 - threads)) --dist loadfile $(NOTEBOOKS) || exit 1; done

site: $(STAMP)
	"$(BIN)/python" docs/site/build.py

lint: $(STAMP)
	"$(BIN)/ruff" check .
	"$(BIN)/ruff" format --check .

typecheck: $(STAMP)
	"$(BIN)/mypy"

clean:
	rm -rf "$(VENV)" runs build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
