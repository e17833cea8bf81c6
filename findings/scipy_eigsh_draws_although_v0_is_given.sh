#!/usr/bin/env bash
# SciPy 1.17.1: `scipy.sparse.linalg.eigsh` with a start vector gives other eigenvectors at each call where ARPACK has to start anew.
#
# `v0` is documented as the starting vector, and with one given most calls repeat bit for bit. But where the space that it spans is
# exhausted before enough vectors are found (a matrix of few distinct eigenvalues: copies among data, parts of a graph that do not hang
# together), ARPACK goes on from a vector drawn at random, and that generator is seeded anew at each call unless `rng` is given, too.
# Expected: the same matrix, the same v0, the same process: the same eigenvectors.
# Seen: the space of the largest eigenvalue of a graph of separate cliques has another basis each time; with `rng` it repeats.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check 'scipy==1.17.1' 'numpy==2.3.5'
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
from scipy.sparse.linalg import eigsh

cliques = np.kron(np.eye(4), np.ones((5, 5)) / 5)  # eigenvalues 1 (four times) and 0
start = np.linspace(1, 2, 20)


def found(rng):
    return [eigsh(cliques, 3, which="LA", v0=start, rng=rng())[1] for _ in range(5)]


def same(vectors):
    return all(np.array_equal(vectors[0], others) for others in vectors[1:])


without, seeded = found(lambda: None), found(lambda: np.random.default_rng(0))
print("v0 alone: the same five times?", same(without))
print("v0 and rng: the same five times?", same(seeded))
assert not same(without) and same(seeded)
PYTHON
