# `make help` says what there is. Each target does all of its own set-up, and a second run does
# only what changed. The virtual environment is .venv; delete it to start afresh.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.NOTPARALLEL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

BIN := .venv/bin
# That extensions are named in pyproject.toml is still called experimental at each build.
BUILD_ENV := PYTHONWARNINGS=ignore
NATIVE := $(wildcard memfaas/*.pyx memfaas/*.pxd memfaas/native/*.c memfaas/native/*.h fuse/*.pyx fuse/*.c fuse/*.h)

BUILD_PACKAGES := fuse3 gcc libc6-dev libfuse3-dev libibverbs-dev libxxhash-dev pkg-config python3-dev python3-venv
TEST_PACKAGES := fio git iproute2 libnbd-bin lua5.1 lua5.2 lua5.3 lua5.4 luajit memcached munge nbdkit redis-server rsync slurm-client slurm-wlm-basic-plugins slurmctld slurmd
VM_PACKAGES := busybox-static cpio ibverbs-providers iproute2 kmod perftest qemu-system-x86

.PHONY: help install dev build demo test test-fast lint format bench bench-verbs peers vm clean

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: .venv/.built ## A working .venv with .venv/bin/memfaas

dev: .venv/.dev ## install, and what lint and the tests need

build: .venv/.built ## Compile the native part again after a change

demo: install ## A local cluster at work: stores and verifies a data set, shows leases and speed
	@$(BIN)/memfaas demo

test: dev vm lint ## Everything that must pass: lint, then all tests, fast ones first
	@$(BIN)/pytest

vm: ## What the tests need that run in a virtual machine, with a kernel of their own
	@.ci/apt-install $(VM_PACKAGES)
	.ci/vm-files

test-fast: dev ## The fast tests alone
	@$(BIN)/pytest -m 'not slow'

lint: dev ## Style, format and types
	@$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: dev ## Bring the code into the house format
	@$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: install peers ## Measure memfaas and its peers in one run
	@$(BIN)/memfaas bench compare

bench-verbs: dev vm ## Measure verbs; without an RDMA device, in a virtual machine too (ARGS="--rounds 5")
	@$(BIN)/memfaas bench verbs $(ARGS)
	$(BIN)/python -m tests.vm.bench $(ARGS)

# A peer that cannot be had here is no failure: the benchmark names it as skipped.
peers: .venv/.installed
	@.ci/apt-install $(TEST_PACKAGES)
	$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["bench"], sep="\n")' |
	while read -r peer; do
		$(BIN)/pip install --quiet "$$peer" || echo "make: cannot install $$peer; the benchmark will skip it" >&2
	done

clean: ## Remove what was built and cached, but not .venv
	@rm -rf build dist memfaas.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage
	rm -f memfaas/*.so fuse/*.so .venv/.built
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# --- how -----------------------------------------------------------------------------------------

# The first Python of at least 3.11 that can make virtual environments and compile extensions:
# the user's own, or else Debian's, which the line above has completed.
.venv/.created:
	@.ci/apt-install $(BUILD_PACKAGES)
	for python in "$${PYTHON:-python3}" /usr/bin/python3 python3.14 python3.13 python3.12 python3.11; do
		if "$$python" .ci/check_python.py 2> /dev/null; then
			echo "make: .venv with $$("$$python" --version)"
			"$$python" -m venv .venv
			$(BIN)/pip install --quiet --upgrade 'pip>=25.1' 'setuptools>=80' 'setuptools-scm>=8' 'Cython>=3.1'
			touch $@
			exit
		fi
	done
	echo "make: no Python of at least 3.11 with venv and headers; install one and set PYTHON=/path/to/python3" >&2
	exit 1

.venv/.installed: pyproject.toml .venv/.created
	@$(BUILD_ENV) $(BIN)/pip install --quiet --no-build-isolation --editable .
	touch $@ .venv/.built

.venv/.built: $(NATIVE) .venv/.installed
	@if [[ ! -e $@ || -n "$$(find $(NATIVE) -newer $@)" ]]; then
		$(BUILD_ENV) $(BIN)/python -c 'import setuptools; setuptools.setup()' --quiet build_ext --inplace --force
	fi
	touch $@

.venv/.dev: pyproject.toml .venv/.built
	@.ci/apt-install $(TEST_PACKAGES)
	$(BIN)/pip install --quiet --group dev
	touch $@
