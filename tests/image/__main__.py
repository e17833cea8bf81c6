"""What `make image` does with the new image: reads its labels, and tries it as two users, without and with a workspace.

python3 -m tests.image ENGINE IMAGE [option of the engine's run …]

Needs only Python's standard library and the engine. Without root, rootless Podman needs the option --userns=keep-id.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import sqlite3
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path

from tests.paths import ROOT

# What nobody is in the image. Only root may make a workspace for somebody else.
STRANGER = (4242, 4243) if os.getuid() == 0 else (os.getuid(), os.getgid())


def main(engine: str, image: str, options: list[str]) -> None:
    """Try the image; the first thing that is wrong ends it with one line."""
    run = [*shlex.split(engine), "run", "--rm", *options]
    user = ["--user", ":".join(map(str, STRANGER))]
    check = ["python", "-u", "-m", "tests.image.inside", "sizes", "prepare"]
    commit = _labels(shlex.split(engine), image)
    _call(*run, "-e", "DEEPCLUST_TRACKING=off", image, *check, "pretrain@swav")
    _call(*run, "-e", "DEEPCLUST_TRACKING=off", *user, image, *check)
    if commit is None:
        print("no git repository here, so the image was not tried with a workspace")
        return
    with tempfile.TemporaryDirectory(prefix="deepclust-") as folder:
        workspace = Path(folder, "workspace")
        _call("git", "clone", "--quiet", "--no-hardlinks", str(ROOT), str(workspace))
        if os.getuid() == 0:  # writable for the stranger, but not theirs: git alone would refuse it
            _call("chmod", "-R", "a+rwX", folder)
        _call(*run, *user, "-v", f"{workspace}:{workspace}", "-w", str(workspace), image, *check)
        _left(workspace, commit)
    print("the image works")


def _labels(engine: list[str], image: str) -> str | None:
    """Compare the labels with this repository; returns its commit."""
    shown = subprocess.run([*engine, "image", "inspect", image], capture_output=True, text=True, check=False)
    if shown.returncode:
        sys.exit(shown.stderr.strip())
    labels = json.loads(shown.stdout)[0]["Config"]["Labels"] or {}
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    commit = head.stdout.strip() or None
    lock = hashlib.sha256((ROOT / "requirements.lock").read_bytes()).hexdigest()
    revision = labels.get("org.opencontainers.image.revision", "")
    if labels.get("deepclust.lock") != lock or revision.removesuffix("-dirty") != (commit or "unknown"):
        sys.exit(f"error: expected labels with the commit {commit} and the lock {lock}, got {labels}; build it anew")
    print(f"labels: commit {revision}, version {labels['org.opencontainers.image.version']}, lock {lock[:12]}…")
    return commit


def _left(workspace: Path, commit: str) -> None:
    """Whose the stages' files are, and which commit they recorded."""
    owners = {(path.stat().st_uid, path.stat().st_gid) for path in (workspace / "artifacts").rglob("*")}
    if owners != {STRANGER}:
        sys.exit(f"error: expected files of the user {STRANGER} in artifacts/, found those of {owners or 'nobody'}")
    with closing(sqlite3.connect(workspace / "mlflow.db")) as store:
        recorded = {value for (value,) in store.execute("SELECT value FROM tags WHERE key = 'git.commit'")}
    if recorded != {commit}:
        sys.exit(f"error: expected the commit {commit} with the runs in MLflow, found {recorded or 'none'}")
    print(f"the workspace's files are the user's, its runs have the commit {commit[:8]}")


def _call(*command: str) -> None:
    if code := subprocess.run(command, check=False).returncode:
        sys.exit(code)  # the container, the engine or git has said why


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: python3 -m tests.image ENGINE IMAGE [option of the engine's run …]")
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
