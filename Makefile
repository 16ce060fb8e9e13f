VENV ?= .venv
JOBS ?= 2
STAMP := $(VENV)/.installed
PY := $(VENV)/bin/python

.PHONY: run test check bench lock clean

run: $(STAMP)            ## the quickstart: SmolLM2-135M learns where it may skip, measured
	$(PY) -m fbs_rl.quickstart
test: $(STAMP)           ## the CPU test suite, JOBS files at a time
	$(PY) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder
check: $(STAMP)          ## lint, format, types, import contracts
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/basedpyright
	$(VENV)/bin/lint-imports
bench: $(STAMP)          ## decode speed on this machine, dense against skipping
	$(PY) -m fbs_rl.bench
$(STAMP): pyproject.toml scripts/install.sh constraints/cpu.txt constraints/cuda.txt
	VENV=$(VENV) scripts/install.sh
	@touch $@
lock:
	scripts/lock.sh
clean:
	rm -rf $(VENV)
