"""Small workspaces: git clones of this repository with images made on the spot, that containers see under their path.

They belong to an ordinary user, as whom everything in them runs: root would pass over permissions.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import docker
import psutil

from tasks.shared.operations.params import overrides
from tests.paths import ROOT
from tests.services import folders
from tests.tasks import small_run

USER = os.getuid() or 1000
GROUP = os.getgid() or 1000
SMALL = [
    "encoders=[pixels, swav]",
    "pretrain.checkpoint={every_steps: 3, every_seconds: null, keep: 2}",
    "adapt.adapters=[source, bn]",
]
# Else a run's variables would decide what a test does.
_OURS = ("PREFECT_", "DEEPCLUST_", "MLFLOW_", "PET_", "DVC_", "GIT_DIR", "GIT_WORK_TREE", "PYTHONPATH", "VIRTUAL_ENV")


def as_user(command: Sequence[str]) -> list[str]:
    """The command, run by the user whom workspaces belong to.

    Root's children keep one right of root's: they reach the engine's socket and this repository's virtual environment,
    wherever these are. Containers have no such right.
    """
    if os.getuid():
        return list(command)
    rights = [f"--{kind}-caps=-all,+dac_override" for kind in ("inh", "ambient")]
    return ["setpriv", f"--reuid={USER}", f"--regid={GROUP}", "--clear-groups", *rights, *command]


def environment(root: Path, **more: str) -> dict[str, str]:
    """The environment of commands in a workspace: this process's, without what would change what they do."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_OURS)}
    home = root.parent / "home"
    kept |= {"HOME": str(home), "PYTHONPATH": str(root), "DO_NOT_TRACK": "1"}
    kept["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    return kept | more


def run(root: Path, *command: str, check: bool = True, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a workspace, as its user; `python` is this interpreter. What it prints is in `stdout`."""
    done = subprocess.run(
        as_user(command),
        cwd=root,
        env=environment(root, **variables),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert not check or done.returncode == 0, f"{' '.join(command)}: status {done.returncode}\n{done.stdout}"
    return done


@contextmanager
def folder(client: docker.DockerClient) -> Iterator[Path]:
    """A new folder for workspaces. What an earlier run left behind is ended and removed first."""

    def clear(path: Path) -> None:
        for container in containers(client, path):
            with contextlib.suppress(docker.errors.APIError):
                container.remove(force=True)
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.pid != os.getpid() and Path(process.cwd()).is_relative_to(path):
                    process.kill()

    with folders.folder("deepclust-services-", clear) as path:
        (path / "home").mkdir()
        os.chown(path / "home", USER, GROUP)
        yield path


def containers(client: docker.DockerClient, path: Path) -> list[docker.models.containers.Container]:
    """The containers that see a folder, or one in it; those that have ended too."""
    found = []
    for container in _listed(client):
        sources = [mount.get("Source") or "/" for mount in container.attrs.get("Mounts", [])]
        if any(Path(source).is_relative_to(path) for source in sources):
            found.append(container)
    return found


def _listed(client: docker.DockerClient) -> list[docker.models.containers.Container]:
    """All containers. Podman answers with status 500 while one of them is being removed."""
    for _ in range(20):
        with contextlib.suppress(docker.errors.APIError):
            return client.containers.list(all=True, ignore_removed=True)
        time.sleep(0.5)
    return client.containers.list(all=True, ignore_removed=True)


def make(root: Path, *edits: str) -> Path:
    """Clone this repository as it is, uncommitted changes of tracked files included, with images and short parameters.

    Args:
        root: The workspace, which does not exist yet.
        edits: Further edits of params.yaml, such as `pretrain.swav.epochs=3`.
    """
    # A link to a file of this repository's would be given away with the clone.
    clone = ["git", "-c", "advice.detachedHead=false", "clone", "--quiet", "--no-hardlinks"]
    subprocess.run([*clone, str(ROOT), str(root)], check=True)
    changes = subprocess.run(["git", "-C", str(ROOT), "diff", "--binary", "HEAD"], check=True, capture_output=True)
    if changes.stdout:
        subprocess.run(["git", "-C", str(root), "apply"], input=changes.stdout, check=True)
    with tempfile.TemporaryDirectory() as made:
        small_run.build(Path(made))
        shutil.copytree(Path(made) / "images", root / "images")
        shutil.copyfile(Path(made) / "params.yaml", root / "params.yaml")
    overrides.apply([*SMALL, *edits], root / "params.yaml")
    for result in ("dvc.lock", "metrics", "plots"):
        shutil.rmtree(root / result) if (root / result).is_dir() else (root / result).unlink()
    with (root / ".git/info/exclude").open("a", encoding="utf-8") as file:
        file.write("/images/\n")
    identity = ["-c", "user.name=services", "-c", "user.email=services@localhost"]
    subprocess.run(["git", "-C", str(root), *identity, "commit", "--quiet", "--all", "--message", "small"], check=True)
    give(root)
    return root


def give(root: Path) -> None:
    """Let a workspace, which was made here, belong to the user."""
    for path in (root, *root.rglob("*")):
        os.chown(path, USER, GROUP, follow_symlinks=False)


def reset(root: Path) -> None:
    """Take a workspace back to its beginning: no results, nothing in DVC's cache, files as they were committed."""
    for result in ("artifacts", "metrics", "plots", ".dvc/cache", ".dvc/tmp"):
        shutil.rmtree(root / result, ignore_errors=True)
    (root / "dvc.lock").unlink(missing_ok=True)
    for state in (root / "state").glob("*"):
        if state.name != "serve":  # the server and the worker that run
            shutil.rmtree(state) if state.is_dir() else state.unlink()
    run(root, "git", "worktree", "prune")
    run(root, "git", "checkout", "--quiet", ".")
