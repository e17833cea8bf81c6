# The commands of this repository. Each sets up .venv first, and again when the lock has changed.
#   make pipeline   the whole pipeline; ARGS="--stages … --encoders … --override key=value … --force"
#   make test       all tests; ARGS="tests/tasks -k …"
#   make test-services  a pipeline of containers, killed and cancelled, on a container engine; minutes
#   make serve      Prefect's server, work pools, deployments and workers in the background; ARGS="--docker …"; make stop ends them
#   make image      the container image, tried in containers; ENGINE=podman IMAGE=… BASE_IMAGE=… BUILD_ARGS=… RUN_ARGS="--gpus all"
#   make lint       ruff and mypy;  make lock: pin the dependencies anew;  make audit: are weaknesses of them known?
#   make setup      only .venv; TORCH=cpu INDEX=… takes torch's build without CUDA from that package index (make image likewise)

# What `make setup` was last told of TORCH and INDEX.
-include .venv/build.mk
TORCH ?= cuda
INDEX ?=
PYTHON ?= python3
ENGINE ?= docker
IMAGE ?= deepclust:latest
BASE_IMAGE ?= python:3.11-slim-bookworm
BUILD_ARGS ?=
RUN_ARGS ?=
ARGS ?=

BIN := .venv/bin
ifeq ($(TORCH),cuda)
ifeq ($(origin INDEX),command line)
$(error expected TORCH=cpu with INDEX=…, got TORCH=cuda, which comes from the usual index; add TORCH=cpu)
endif
INDEX :=
LOCK := requirements.lock
READY := .venv/ready
else ifeq ($(TORCH),cpu)
LOCK := requirements-cpu.lock
READY := .venv/ready-cpu
# Versions are pinned, so it does not matter which index has a file; torch and torchvision are pinned to their CPU builds.
FROM_INDEX = --index '$(subst ','\'',$(INDEX))' --index-strategy unsafe-best-match
else
$(error expected TORCH=cuda or TORCH=cpu, got TORCH=$(TORCH))
endif

.PHONY: pipeline test test-services serve stop image lint lock audit setup
.DEFAULT_GOAL := pipeline

pipeline: setup
	$(BIN)/python -m flows.pipeline $(ARGS)

test: setup
	DO_NOT_TRACK=1 $(BIN)/python -m pytest $(ARGS)

# Starts an engine itself where none answers (Debian, root), and builds the image: tests/services/engine.py.
test-services: setup
	DO_NOT_TRACK=1 $(BIN)/python -m pytest tests/services $(ARGS)

serve: setup
	$(BIN)/python -m flows.serve $(ARGS)

stop: setup
	$(BIN)/python -m flows.serve --stop

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

image: $(if $(filter cpu,$(TORCH)),$(LOCK))
	$(ENGINE) build $(BUILD_ARGS) --build-arg BASE_IMAGE=$(BASE_IMAGE) --build-arg PINS=$(LOCK) \
		--build-arg INDEX='$(subst ','\'',$(INDEX))' \
		--build-arg COMMIT="$$(git describe --always --abbrev=40 --dirty --exclude='*' || echo unknown)" \
		--build-arg VERSION="$$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)" \
		--build-arg LOCK="$$(sha256sum requirements.lock | cut -d ' ' -f 1)" -t $(IMAGE) .
	$(PYTHON) -m tests.image "$(ENGINE)" $(IMAGE) $(RUN_ARGS)

PIN = $(BIN)/uv pip compile pyproject.toml --extra pipeline --extra dev --generate-hashes --no-emit-index-url \
	--no-emit-find-links --no-header --no-annotate --quiet --universal --python-version 3.11

lock: $(BIN)/uv
	$(PIN) -o requirements.lock

# Strict: a package that the advisories' source does not know counts as a failure, not as a package without weaknesses.
audit: $(BIN)/uv
	$(BIN)/uv tool run --quiet pip-audit==2.10.1 --strict --disable-pip --require-hashes -r requirements.lock

setup: $(READY)

# uv installs the lock in seconds. Whatever index the files come from, the lock's hashes refuse any other build of torch or torchvision.
# Compiling bytecode here saves each stage's process some seconds where Python may not write its caches.
$(READY): $(LOCK) pyproject.toml | $(BIN)/uv
ifeq ($(TORCH)-$(shell uname -sm),cuda-Linux x86_64)
	@echo "setup: torch comes with CUDA, 7.8 GB; without it 2.6 GB: make setup TORCH=cpu INDEX=(an index that has torch's CPU builds)"
endif
	$(BIN)/uv pip sync --quiet --compile-bytecode --python $(BIN)/python --require-hashes $(FROM_INDEX) $(LOCK)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@rm -f .venv/ready .venv/ready-cpu
	@printf 'TORCH ?= %s\nINDEX ?= %s\n' '$(TORCH)' '$(subst ','\'',$(INDEX))' >.venv/build.mk
	touch $@

# A lock of its own, of this machine, as the files' hashes are those of the index that is named.
requirements-cpu.lock: requirements.lock requirements-cpu.in pyproject.toml | $(BIN)/uv
	@test -n '$(subst ','\'',$(INDEX))' || { echo "expected INDEX=… with TORCH=cpu, got none; name a package index that has torch's CPU builds" >&2; exit 1; }
	@sed -nE 's/^(torch|torchvision)==([^ ;]+).*/\1==\2+cpu/p' requirements.lock >.venv/torch-cpu.in
	@$(PIN) --overrides requirements-cpu.in --overrides .venv/torch-cpu.in --constraints requirements.lock $(FROM_INDEX) -o .venv/$@ || { \
		echo "expected $$(paste -sd ' ' .venv/torch-cpu.in) in INDEX, see above; name another index" >&2; exit 1; }
	mv .venv/$@ $@

$(BIN)/uv:
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 14) else f"expected Python 3.11 to 3.13, got {v[0]}.{v[1]}; name another: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
