# Two commands: `make reproduce` and `make test`. `make help` lists the rest.
PROFILE ?= quick
tested = import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10 python3.14 python; do \
	if $$p -c '$(tested)' 2>/dev/null; then echo $$p; break; fi; done)
ONLY ?=
SEEDS ?=
BUDGET ?=
bin := .venv/bin
extras := paper,explorer,words,wheels,hf,adapters,formats,docs,dev
ready := .venv/.ready
options = --profile $(PROFILE) $(if $(ONLY),--only $(ONLY)) $(if $(SEEDS),--seeds $(SEEDS))

.PHONY: help env reproduce estimate test test-slow lab docs notebooks sync check-results bench gpu clean

help:            ## this list
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/:.*##/\t/' | expand -t 18

env: $(ready)    ## make .venv from constraints.txt

# --no-compile: byte code of 20 000 files takes two minutes, and Python writes that of what it imports.
$(ready): constraints.txt settings.ini setup.py
	@$(or $(PYTHON),false) -c '$(tested)' || { echo "act needs Python 3.10 to 3.14; name one: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@echo "Setting up .venv with $$($(PYTHON) --version); the first time downloads about 3 GB and takes some minutes."
	@test -x $(bin)/python || $(PYTHON) -m venv .venv
	$(bin)/python -m pip install -c constraints.txt setuptools wheel
	$(bin)/python -m pip install --no-compile -c constraints.txt --no-build-isolation -e ".[$(extras)]"
	@touch $@

reproduce: $(ready)  ## run the paper notebooks: PROFILE=quick|small|full ONLY=table_2 SEEDS=3
	@$(bin)/act reproduce $(options)

estimate: $(ready)  ## what a profile costs in hours and disk on this machine: PROFILE=full
	@$(bin)/act reproduce $(options) --estimate

test: $(ready)   ## everything CI proves, under 15 minutes on two cores
	@OMP_NUM_THREADS=1 $(bin)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

test-slow: $(ready)  ## the long faults and parities
	@$(bin)/python -m pytest -m slow

lab: $(ready)    ## open the notebooks in JupyterLab
	@$(bin)/jupyter lab nbs

docs: $(ready)   ## build the site into docs/_build/html
	@$(bin)/python docs/build.py

notebooks: $(ready)  ## execute nbs/api in place, keeping outputs
	@$(bin)/python docs/run_notebooks.py

sync: $(ready)   ## regenerate act/ and README.md from the notebooks
	@find act -name '*.py' ! -name '__init__.py' -delete
	@$(bin)/nbdev_export && $(bin)/nbdev_clean && $(bin)/python docs/readme.py

check-results: $(ready)  ## derive the committed tables again from their run records
	@$(bin)/act check-results results/small

bench: $(ready)  ## every benchmark, each against its peer
	@for b in $(filter-out benchmarks/gpu.py benchmarks/measuring.py,$(wildcard benchmarks/[a-z]*.py)); do $(bin)/python $$b; done

gpu: $(ready)    ## on a GPU: doctor, cuda tests, benchmarks, small, what of full there is, into results/gpu; resumes
	@$(bin)/python benchmarks/gpu.py $(if $(ONLY),--only $(ONLY)) $(if $(BUDGET),--budget $(BUDGET))

clean:           ## forget the environment and what was built
	rm -rf .venv docs/_build _proc
