# The commands of this repository. Each sets up .venv first, and again when the lock has changed.
#   make pipeline   the whole pipeline; ARGS="--stages … --encoders … --override key=value … --force"
#   make test       all tests; ARGS="tests/tasks -k …"
#   make test-services  a pipeline of containers, killed and cancelled, on a container engine; minutes
#   make serve      Prefect's server, work pools, deployments and workers in the background; ARGS="--docker …"; make stop ends them
#   make image      the container image, tried in containers; ENGINE=podman IMAGE=… BASE_IMAGE=… BUILD_ARGS=… RUN_ARGS="--gpus all"
#   make lint       ruff and mypy;  make lock: pin the dependencies anew;  make audit: are weaknesses of them known?

PYTHON ?= python3
ENGINE ?= docker
IMAGE ?= deepclust:latest
BASE_IMAGE ?= python:3.11-slim-bookworm
BUILD_ARGS ?=
RUN_ARGS ?=
ARGS ?=

BIN := .venv/bin
READY := .venv/ready

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

image:
	$(ENGINE) build $(BUILD_ARGS) --build-arg BASE_IMAGE=$(BASE_IMAGE) \
		--build-arg COMMIT="$$(git describe --always --abbrev=40 --dirty --exclude='*' || echo unknown)" \
		--build-arg VERSION="$$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)" \
		--build-arg LOCK="$$(sha256sum requirements.lock | cut -d ' ' -f 1)" -t $(IMAGE) .
	$(PYTHON) -m tests.image "$(ENGINE)" $(IMAGE) $(RUN_ARGS)

lock: $(BIN)/uv
	$(BIN)/uv pip compile pyproject.toml --extra pipeline --extra dev --universal --python-version 3.11 \
		--generate-hashes --no-emit-index-url --no-emit-find-links --no-header --no-annotate --quiet -o requirements.lock

# Strict: a package that the advisories' source does not know counts as a failure, not as a package without weaknesses.
audit: $(BIN)/uv
	$(BIN)/uv tool run --quiet pip-audit==2.10.1 --strict --disable-pip --require-hashes -r requirements.lock

setup: $(READY)

# uv installs the lock in seconds. Whatever index the files come from, the lock's hashes refuse any other build of torch or torchvision.
# Compiling bytecode here saves each stage's process some seconds where Python may not write its caches.
$(READY): requirements.lock pyproject.toml | $(BIN)/uv
	$(BIN)/uv pip sync --quiet --compile-bytecode --python $(BIN)/python --require-hashes requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	touch $@

$(BIN)/uv:
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 14) else f"expected Python 3.11 to 3.13, got {v[0]}.{v[1]}; name another: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
