# make demo   train on real images with three losses and draw what happened
# make test   prove the package right (sets up everything it needs, as every target does)
# make test-all   that, and what takes longer: all cases of the interpreted kernels, builds of every kind, type checks

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
PYTEST := $(PY) -m pytest
JOBS ?= 2
# worksteal, not loadgroup: with groups a worker that dies ends the run in an error of xdist, or never.
PARALLEL := -n $(JOBS) --dist worksteal --max-worker-restart 20

# Threads that wait do not spin: several times faster where the cores are shared. Benchmarks keep the default,
# which hands small work over sooner.
demo test test-rest test-all mutants: export OMP_WAIT_POLICY ?= passive

CSRC := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help docs build demo test test-rest test-all lint format mutants kernel-report bench efficacy gpu-check clean

help:
	@sed -n 's/^# //p' Makefile
	@echo "also: build docs test-rest lint format mutants kernel-report bench efficacy gpu-check clean"

# The environment: torch first, so that nothing else pulls another one; torchvision without its own idea of torch.
$(VENV)/.deps: requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "zipfls_cuda needs Python 3.11 or newer; set PYTHON=")'
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "installing what the package and its tests need into $(VENV)"
	@$(PIP) $$(grep '^torch==' requirements-dev.txt)
	@$(PIP) --no-deps $$(grep '^torchvision==' requirements-dev.txt)
	@$(PIP) -r requirements-dev.txt
	@touch $@

# The package itself, in place: Python files are used where they are, C++ is rebuilt when it changed.
$(VENV)/.built: $(VENV)/.deps setup.py pyproject.toml $(CSRC)
	@echo "building zipfls_cuda"
	@$(PIP) --no-build-isolation --no-deps --editable .
	@$(PY) -m zipfls_cuda > /dev/null
	@touch $@

build: $(VENV)/.built

demo: build
	@$(PY) -m experiments.run --preset demo --out runs/demo

test: build
	@$(PYTEST) $(PARALLEL)

# The tests that `make test` leaves out; compilers at work need more time than a test has by default.
test-rest: build
	@$(PYTEST) $(PARALLEL) -m slow -o faulthandler_timeout=1200

test-all:
	@$(MAKE) --no-print-directory test
	@$(MAKE) --no-print-directory test-rest

# The site, from README, docs/ and docstrings, into build/site; a broken link or docstring is an error.
docs: export NO_MKDOCS_2_WARNING = 1
docs: build
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PY) -m mkdocs --quiet build

lint: build
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(VENV)/bin/clang-format --dry-run --Werror $(CSRC)

format: build
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .
	@$(VENV)/bin/clang-format -i $(CSRC)

mutants: build
	@$(PY) tests/mutants.py

kernel-report: build
	@$(PY) benchmarks/nvcc_report.py --jobs $(JOBS) || test $$? -eq 2
	@$(PY) benchmarks/kernel_report.py --jobs $(JOBS)

bench: build
	@$(PYTEST) benchmarks
	@$(PY) benchmarks/report.py

# Does it help? Trains what has no record yet: hours from none. ROW= trains one row of the table again, in minutes;
# PLAN=gpu is the same study on larger images, for a GPU; JOBS runs at a time.
efficacy: build
	@$(PY) -m experiments.efficacy --jobs $(JOBS) $(if $(PLAN),--preset $(PLAN)) $(if $(ROW),--row "$(ROW)")
	@$(PY) benchmarks/report.py

# On a machine with a GPU: uses that machine's own Python, builds, tests, sanitizes, measures, within SECONDS (560).
# PART= selects, OUT= may hold what an earlier call found, DRY=1 walks through it without a GPU.
gpu-check: $(if $(DRY),build)
	@$(if $(DRY),$(PY),$(PYTHON)) benchmarks/gpu_check.py $(if $(DRY),--dry) --parts "$(PART)" \
		$(if $(SECONDS),--seconds "$(SECONDS)") $(if $(OUT),--out "$(OUT)")

clean:
	rm -rf $(VENV) build *.egg-info zipfls_cuda/_C*.so zipfls_cuda/_build.json .pytest_cache .ruff_cache .hypothesis .benchmarks
