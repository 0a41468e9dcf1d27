# Everything but `install` is done in .venv, which is made anew when pyproject.toml changes. PYTHON is the interpreter
# that it is made with.
PYTHON ?= python3
CONFIG ?= /etc/ctrport/config.yaml
KILLS ?= 200
SOAK_MINUTES ?= 10
# Where `make install` puts ctrport, and what stands in front of every path of it: for packages.
PREFIX ?= /opt/ctrport
DESTDIR ?=

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready

# What has no I/O is to be covered by tests/unit alone, so many of a hundred branches.
CORE_COVERAGE := 95

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help tools venv demo bench crowd flame drift matrix kills soak boot test lint unit node pythons stubs reference dist distboot image run \
	install uninstall clean

help:  ## Show this list
	@sed -nE 's/^([a-z]+):.*## (.*)/\1\t\2/p' Makefile | while IFS="$$(printf '\t')" read -r name text; do \
		printf '  make %-9s %s\n' "$$name" "$$text"; done

tools:  ## Install the programs that tests and demo need (apt-get, as root), only what is missing
	@PYTHON="$(PYTHON)" bin/install-tools

venv: $(READY)  ## Build .venv with ctrport and all that its tests need

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[legacy]' --group dev
	@touch $@

demo: tools $(READY)  ## Publish a real Redis on a node made of namespaces, step by step (as root)
	@$(BIN)/python -m demo.demo

bench: tools $(READY)  ## Measure ctrport beside portmap and dockerd, write docs/figures.md anew (as root, 10 minutes)
	@$(BIN)/python -m bench.bench --to docs

crowd: tools $(READY)  ## Measure it on a node of 1000 containers (as root, 10 minutes)
	@$(BIN)/python -m bench.crowd

flame: tools $(READY)  ## Draw what a port waits for, bench/event.svg, beside 10 mappings and 10,000 (as root, 3 minutes)
	@$(BIN)/python -m bench.flame --mappings 10 10000
	@$(BIN)/python -m bench.flame --mappings 10 10000 --backend iptables-nft --to bench/event-iptables.svg

drift: tools $(READY)  ## Measure how soon lost rules are back, and what busy neighbours cost (as root, 1 minute)
	@$(BIN)/python -m bench.drift

matrix: tools $(READY)  ## Try who reaches what under every setting, write docs/paths.md anew (as root, 6 minutes)
	@$(BIN)/python -m tests.matrix

kills: tools $(READY)  ## Kill the daemon and see what the next one makes of it (as root, 7 minutes): make kills KILLS=200
	@$(BIN)/python -m tests.faults.kills --kills $(KILLS)

soak: tools $(READY)  ## See that the daemon does not grow while all comes and goes (as root): make soak SOAK_MINUTES=10
	@$(BIN)/python -m tests.faults.soak --minutes $(SOAK_MINUTES)

boot: $(READY)  ## Boot a Debian with a real systemd, and try the unit and the installation in it (as root, 5 minutes)
	@bin/install-boot-tools
	@$(BIN)/python -m tests.boot

test: tools lint unit node  ## Check and test everything (as root, some minutes)

lint: $(READY)  ## Check style, types, import contracts and generated code
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python bin/generate-stubs --check
	$(BIN)/python bin/generate-reference --check

unit: $(READY)  ## Run the tests without I/O, and see that they cover the core
	$(BIN)/python -m pytest tests/unit --numprocesses 2 --cov --cov-report=
	$(BIN)/coverage report --include="$$($(BIN)/python bin/core-files)" --skip-covered --fail-under=$(CORE_COVERAGE)

node: tools $(READY)  ## Run the tests with a real containerd, a real kernel and real packets (as root)
	$(BIN)/python -m pytest tests/node --numprocesses 3 --dist loadfile

pythons:  ## Run the unit tests under every Python from 3.10 to 3.13 that is found
	@bin/test-pythons

stubs: $(READY)  ## Generate daemon/ctrport/api from proto/
	$(BIN)/python bin/generate-stubs

reference: $(READY)  ## Write the tables of docs/configuration.md from the schema
	$(BIN)/python bin/generate-reference

dist: tools $(READY)  ## Build dist/*.tar.gz, which installs on a node without network, and try it (as root, 1 minute)
	@rm -f dist/ctrport-*.tar.gz
	@TOOLS="$(BIN)/python" bin/build-dist
	$(BIN)/python -m pytest -q tests/archive

distboot: dist  ## Install that archive in a booted Debian without network and compiler (as root, 2 minutes)
	@bin/install-boot-tools
	@$(BIN)/python -m tests.boot archive

image: dist  ## Build the root of the image for Kubernetes below .image, and try it (as root, 3 minutes)
	@bin/install-boot-tools
	@bin/build-image .image
	$(BIN)/python -m pytest -q tests/image

run: $(READY)  ## Run the daemon here, on this machine's containerd (as root): make run CONFIG=FILE
	$(BIN)/ctrport run --config $(CONFIG)

install:  ## Install the daemon with its systemd unit, or upgrade it (as root)
	@PREFIX="$(PREFIX)" DESTDIR="$(DESTDIR)" PYTHON="$(PYTHON)" bin/install

uninstall:  ## Remove the daemon and every rule of it; /etc/ctrport stays (as root)
	@PREFIX="$(PREFIX)" DESTDIR="$(DESTDIR)" bin/uninstall

clean:  ## Remove what was built
	rm -rf .venv .venv-pythons .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis .coverage*
	rm -rf .boot .image build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
