# Everything runs in .venv, which the first target that needs it creates.

PYTHON ?= python3
BIN := .venv/bin
JOBS ?= 2
# Trained models with their data, as sw/models.py names them; not part of the project.
MODELS ?= ../shared/models

.PHONY: run test test-long test-emulated sim lint docs bench bench-long models speed constraints clean

run: .venv/run.stamp
	$(BIN)/python -m sw.demo

test: .venv/dev.stamp tools
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup -m "not long" -r s

test-long: .venv/dev.stamp tools
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup -m long -r s

# What depends on onnxruntime and numpy, on emulated x86 processors without VNNI and without AVX.
# numpy takes an emulated processor with AVX2 for one that it is not, hence the variable.
EMULATED_TESTS := golden frontend compiler/test_partition.py
test-emulated: .venv/dev.stamp tools
	for processor in Haswell Nehalem; do \
	  NPY_DISABLE_CPU_FEATURES=X86_V3 qemu-x86_64 -cpu $$processor $(BIN)/python -m pytest \
	    -p no:xdist -p no:cacheprovider -m "not long" -k "not older" \
	    $(EMULATED_TESTS:%=tests/sw/%) || exit 1; \
	done

sim: .venv/dev.stamp tools
	$(BIN)/python -m sim.benches.regress

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m isa.tools.document --check
	$(BIN)/python -m sw.check --document --check

docs: .venv/run.stamp
	$(BIN)/python -m isa.tools.document
	$(BIN)/python -m sw.check --document

bench: .venv/bench.stamp
	$(BIN)/python -m sw.bench

bench-long: .venv/bench.stamp
	$(BIN)/python -m sw.bench --long

models: .venv/run.stamp
	$(BIN)/python -m sw.cli.modeltable --models $(MODELS) -o docs/models.md --rtl --samples 200

speed: .venv/run.stamp
	$(BIN)/python -m sw.cli.speed

clean:
	rm -rf .venv build *.egg-info

# The versions that were tested; where they are not to be had, any that pyproject.toml allows.
PIP_INSTALL = $(BIN)/python -m pip install --quiet
define install
	$(PIP_INSTALL) --constraint constraints.txt --editable '$(1)' || \
	  $(PIP_INSTALL) --editable '$(1)'
endef

.venv/run.stamp: pyproject.toml constraints.txt
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(call install,.)
	touch $@

.venv/dev.stamp: .venv/run.stamp
	$(call install,.[dev])
	touch $@

.venv/bench.stamp: .venv/run.stamp
	$(call install,.[bench])
	touch $@

# After a change of the ranges in pyproject.toml, in a new .venv.
constraints: .venv/dev.stamp .venv/bench.stamp
	$(BIN)/python -m pip freeze --exclude-editable >constraints.txt

# Icarus Verilog, and the emulator of older processors, where they may be installed; their tests are
# skipped, and say so, where they may not.
.PHONY: tools
tools:
	@{ command -v iverilog && command -v qemu-x86_64; } >/dev/null || { \
	  SUDO=$$([ "$$(id -u)" = 0 ] || echo "sudo -n"); \
	  $$SUDO apt-get update -qq && \
	    $$SUDO env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq iverilog qemu-user; \
	} </dev/null >/dev/null 2>&1 || \
	  echo "iverilog and qemu-user could not both be installed: tests that need them are skipped"
