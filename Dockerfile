# The locked dependencies and the code, for any user and with or without GPUs. `make image` builds it and tries it out.
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS builder
RUN python -m venv /opt/uv && /opt/uv/bin/pip install --no-cache-dir --disable-pip-version-check uv \
    && python -m venv --without-pip /opt/venv
# A change of code alone installs nothing again. With an index that has torch's CPU builds (`make image TORCH=cpu INDEX=…`)
# the lock is that of these builds.
ARG PINS=requirements.lock
ARG INDEX
COPY pyproject.toml requirements-cpu.in ${PINS} /opt/
# Of the lock, what the extras need: nothing for developers, no Docker worker, and no HEIC (docs/security.md, Licences).
# As constraints, the lock's pins and hashes hold for everything, and what it lacks is refused; --no-config leaves out
# [tool.uv], which is for making the lock. Bytecode is compiled here, as containers do not write beside the libraries;
# that of the libraries' tests is 98 MB.
RUN /opt/uv/bin/uv pip install --no-config --no-cache --python /opt/venv/bin/python --compile-bytecode --require-hashes \
    --constraint /opt/${PINS} -r /opt/pyproject.toml --extra pipeline --extra dicom --extra efficientnet --extra kubernetes \
    ${INDEX:+--index "$INDEX" --index-strategy unsafe-best-match --overrides /opt/requirements-cpu.in} \
    && find /opt/venv -path '*/tests/*' -name '*.pyc' -delete

FROM ${BASE_IMAGE}
# Git tells DVC and the tracking which code ran, whoever owns the workspace.
RUN (command -v git || (apt-get update && apt-get install -y --no-install-recommends git && rm -rf /var/lib/apt/lists/*)) \
    && git config --system safe.directory '*'
# The base's pip, where Python's own images and Debian keep it.
RUN rm -rf /usr/local/bin/pip* /usr/local/lib/python3*/ensurepip /usr/local/lib/python3*/site-packages/pip* \
    /usr/bin/pip* /usr/lib/python3*/ensurepip /usr/lib/python3/dist-packages/pip* /usr/share/python-wheels
# The home is open to all, for containers that run as another user; the name is for users that /etc/passwd lacks.
RUN useradd --uid 1000 deepclust && install -d -m 1777 /home/deepclust && install -d -m 777 /workspace
ENV HOME=/home/deepclust USER=deepclust VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1 \
    DO_NOT_TRACK=1 DVC_NO_ANALYTICS=1 NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=builder /opt/venv /opt/venv

# Only for use without a workspace: Python finds the code of the folder that it starts in. There is no git here.
WORKDIR /workspace
COPY . .
RUN printf '[core]\n    no_scm = true\n' >.dvc/config.local && chmod -R a+rwX .

ARG COMMIT=unknown
ARG VERSION=unknown
ARG LOCK=unknown
LABEL org.opencontainers.image.title=deepclust org.opencontainers.image.licenses=Apache-2.0 \
    org.opencontainers.image.revision=${COMMIT} org.opencontainers.image.version=${VERSION} deepclust.lock=${LOCK}
# By number, so that Kubernetes can tell that it is not root.
USER 1000:1000
CMD ["python", "-m", "flows.pipeline"]
