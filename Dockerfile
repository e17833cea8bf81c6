# The pinned dependencies and the code: the same stages in a container. GPUs are used if the engine passes them on.
ARG BASE_IMAGE=python:3.11-slim-bookworm
FROM ${BASE_IMAGE}

# Git tells DVC and the tracking which code ran. The image works without it, but then records no commit.
RUN command -v git || (apt-get update && apt-get install -y --no-install-recommends git && rm -rf /var/lib/apt/lists/*)

# Bytecode is compiled once here: each stage is a process of its own, and the container may not write beside the libraries.
ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1 PYTHONDONTWRITEBYTECODE=1
RUN python -m venv /opt/venv && pip install --no-cache-dir --disable-pip-version-check uv

# The dependencies come before the code, so that a change of code installs nothing again.
COPY requirements.lock /opt/requirements.lock
RUN uv pip sync --require-hashes /opt/requirements.lock

RUN useradd --create-home --uid 1000 deepclust && install -d -o deepclust /workspace
WORKDIR /workspace
COPY --chown=deepclust . .
# The image has no git repository; one mounted over the workspace has settings of its own.
RUN uv pip install --no-deps --no-build-isolation --editable . \
    && dvc config --local core.no_scm true && chown -R deepclust .

USER deepclust
CMD ["python", "-m", "flows.pipeline"]
