# A virtual environment that is already active is used, unless make cannot name its path for the
# spaces in it; otherwise .venv is made.
VENV ?= $(if $(filter 1,$(words $(VIRTUAL_ENV))),$(VIRTUAL_ENV),.venv)
PYTHON := $(VENV)/bin/python
BASE_PYTHON ?= python3
JOBS ?= auto
SERVE ?=

.PHONY: help install serve test check format docs soak browser bench clean

help:
	@echo "make install install into .venv, or into the environment that is active"
	@echo "make serve   install and start the service (options: make serve SERVE='--port 8001')"
	@echo "make test    install and run the tests"
	@echo "make check   formatting, lint, types and tests"
	@echo "make docs    write the tables in docs/ from the code and the results"
	@echo "make soak    the long runs: needles over HTTP, questions at 64K tokens, panels under load, Ray clusters, docs/operations.md"
	@echo "make browser the explorer's page in a headless Chromium, which is installed if it can be"
	@echo "make bench   time one decode step's attention on this machine's CPU"

$(PYTHON):
	@$(BASE_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(BASE_PYTHON) is older than Python 3.11: name a newer one, make BASE_PYTHON=python3.12"; exit 1; }
	$(BASE_PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# The stamps carry the lock's checksum, so that a changed lock installs again.
RUN_STAMP := $(VENV)/.saccade-run-$(shell cksum < requirements.lock | cut -d' ' -f1)
DEV_STAMP := $(VENV)/.saccade-dev-$(shell cat requirements.lock requirements-dev.lock | cksum | cut -d' ' -f1)

$(RUN_STAMP): | $(PYTHON)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

$(DEV_STAMP): $(RUN_STAMP)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --requirement requirements-dev.lock
	@touch $@

install: $(RUN_STAMP)

serve: $(RUN_STAMP)
	@exec $(VENV)/bin/saccade serve $(SERVE)

# Prometheus and its promtool test the rules and the dashboards. Debian's package is unpacked here,
# so nothing is installed or started, and no root is needed; elsewhere those tests are skipped, and
# say so. A prometheus on the path is taken as it is.
build/prometheus:
	@if command -v promtool >/dev/null && command -v prometheus >/dev/null; then exit 0; fi; \
	if ! command -v dpkg-deb >/dev/null; then exit 0; fi; \
	mkdir -p build && folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && \
	( cd "$$folder" && chmod 755 . && \
	  { apt-get download -qq prometheus || { apt-get update -qq && apt-get download -qq prometheus; }; } && \
	  dpkg-deb --extract prometheus_*.deb unpacked ) && mv "$$folder/unpacked" "$@" || \
	echo "Prometheus could not be fetched: its rules and dashboards are not tested"

# One computing thread a test process: more would fight over the cores. Each has a half of the tests
# on end, and helps the other when it is done: files stay together, whose tests share what is slow.
test: $(DEV_STAMP) build/prometheus
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest --numprocesses $(JOBS) --dist worksteal

check: $(DEV_STAMP)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(MAKE) --no-print-directory test

format: $(DEV_STAMP)
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

docs: $(DEV_STAMP)
	$(PYTHON) tests/docs/generate.py
	$(PYTHON) tests/bench/quality.py
	$(PYTHON) tests/bench/patterns.py --render > /dev/null

soak: $(DEV_STAMP) build/prometheus
	$(PYTHON) tests/bench/retrieval.py --documents 100 --tokens 8192
	$(PYTHON) tests/bench/far.py
	$(PYTHON) tests/bench/dashboards.py
	$(PYTHON) tests/bench/serve_run.py
	$(PYTHON) tests/bench/operations.py
	$(PYTHON) tests/bench/two_nodes.py
	$(PYTHON) tests/bench/scaling.py
	$(PYTHON) tests/bench/streams.py
	$(PYTHON) tests/bench/prefix.py
	$(MAKE) --no-print-directory browser

browser: $(DEV_STAMP)
	@tests/browser/chromium.sh
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest tests/browser
	$(PYTHON) tests/bench/explorer.py

bench: $(RUN_STAMP)
	$(VENV)/bin/saccade bench decode --device cpu

clean:
	rm -rf .venv build .pytest_cache .mypy_cache .ruff_cache .hypothesis
