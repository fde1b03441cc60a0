# Everything runs in .venv, which the first target that needs it creates. `make help` lists the targets.

PYTHON ?= python3
BIN := .venv/bin
JOBS ?= 2
# Trained models with their data, as sw/zoo/recipes.py names them; not part of the project.
MODELS ?= ../shared/models

# The variable silences a notice of the theme's authors.
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

.PHONY: help run test test-long test-emulated sim coverage lint docs registers generated bench bench-long \
  synth models speed constraints clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' Makefile | expand -t 16

run: .venv/run.stamp ## classify handwritten digits on the simulated hardware, and report
	$(BIN)/python -m sw.demo

test: .venv/dev.stamp tools ## the test suite
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup -m "not long" -r s

test-long: .venv/dev.stamp tools ## the tests that take minutes each
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup -m long -r s

# What depends on onnxruntime and numpy, on emulated x86 processors without VNNI and without AVX.
# numpy takes an emulated processor with AVX2 for one that it is not, hence the variable.
EMULATED_TESTS := golden frontend compiler/test_partition.py
test-emulated: .venv/dev.stamp tools ## the tests of the golden model on emulated older processors
	for processor in Haswell Nehalem; do \
	  NPY_DISABLE_CPU_FEATURES=X86_V3 qemu-x86_64 -cpu $$processor $(BIN)/python -m pytest \
	    -p no:xdist -p no:cacheprovider -m "not long" -k "not older" \
	    $(EMULATED_TESTS:%=tests/sw/%) || exit 1; \
	done

sim: .venv/dev.stamp tools ## the cocotb benches, in Verilator and Icarus
	$(BIN)/python -m sim.benches.regress

coverage: .venv/dev.stamp tools ## the test suite, with the share of lines and branches it runs
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup -m "not long" --cov --cov-report=term

lint: .venv/dev.stamp ## style, types, generated pages, the documentation's links
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pyright
	$(BIN)/python -m isa.tools.document --check
	$(BIN)/python -m isa.tools.configuration --check
	$(BIN)/python -m sw.check --document --check
	$(BIN)/python -m sw.silicon --check
	$(BIN)/python docs/pictures/draw.py --check
	$(MKDOCS) --quiet

docs: .venv/docs.stamp ## the documentation as a site, in build/site
	$(MKDOCS)

registers: .venv/registers.stamp ## the registers as a page and as IP-XACT, in build/registers
	mkdir -p build/registers
	$(BIN)/python -m isa.tools.systemrdl -o build/registers/systole.rdl
	$(BIN)/peakrdl html build/registers/systole.rdl -o build/registers/html
	$(BIN)/peakrdl ip-xact build/registers/systole.rdl -o build/registers/systole.xml

generated: .venv/run.stamp ## write the generated pages, pictures and reports in docs/ again
	$(BIN)/python -m isa.tools.document
	$(BIN)/python -m isa.tools.configuration
	$(BIN)/python -m sw.check --document
	$(BIN)/python docs/pictures/draw.py
	$(BIN)/python docs/pages.py

bench: .venv/bench.stamp ## measure networks: docs/performance.md
	$(BIN)/python -m sw.bench

bench-long: .venv/bench.stamp ## measure all networks
	$(BIN)/python -m sw.bench --long

synth: .venv/synth.stamp ## area and clock by synthesis: docs/silicon.md; hours if all is stale
	$(BIN)/python -m sw.silicon

models: .venv/run.stamp ## measure published models: docs/models.md, with MODELS=FOLDER
	$(BIN)/python -m sw.cli.modeltable --models $(MODELS) -o docs/models.md --rtl --samples 200

speed: .venv/run.stamp ## measure the simulation's speed
	$(BIN)/python -m sw.cli.speed

clean: ## remove .venv and everything built
	rm -rf .venv build *.egg-info

# The versions that were tested; where they are not to be had, any that pyproject.toml allows.
PIP_INSTALL = $(BIN)/python -m pip install --quiet
, := ,
define install
	$(PIP_INSTALL) --constraint constraints.txt --editable '$(1)' || \
	  $(PIP_INSTALL) --editable '$(1)'
endef

.venv/run.stamp: pyproject.toml constraints.txt
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(call install,.)
	touch $@

.venv/dev.stamp: .venv/run.stamp
	$(call install,.[dev$(,)docs])
	touch $@

.venv/docs.stamp: .venv/run.stamp
	$(call install,.[docs])
	touch $@

.venv/registers.stamp: .venv/run.stamp
	$(call install,.[registers])
	touch $@

.venv/bench.stamp: .venv/run.stamp
	$(call install,.[bench])
	touch $@

.venv/synth.stamp: .venv/run.stamp
	$(call install,.[synth])
	touch $@

# After a change of the ranges in pyproject.toml, in a new .venv.
constraints: .venv/dev.stamp .venv/bench.stamp ## write the tested versions again
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
