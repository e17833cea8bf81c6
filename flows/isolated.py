"""Runs beside others: each in a git worktree of its own, `state/isolated/NAME`, made from the workspace as it is.

    with isolated.worktree("brave-otter", values):
        ...  # the current folder is the worktree

python -m flows.isolated list
python -m flows.isolated remove NAME

The worktree shares the workspace's DVC cache, MLflow store, Prefect server and images; code, params.yaml, dvc.lock,
artifacts/ and state/ are its own. It stays after the run. See docs/operations.md, "Several runs at once".
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, chdir, contextmanager
from pathlib import Path

from flows.servers import access
from tasks.shared.operations.lock import locked
from tasks.shared.operations.messages import errors_as_one_line
from tasks.shared.operations.params.schema import Params
from tasks.shared.operations.processes import dvc_runner
from tasks.shared.operations.processes.dvc_runner import StageError, Workspace
from tasks.shared.operations.text import say
from tasks.shared.outputs import layout

FOLDER = layout.STATE / "isolated"
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,80}")
# Links to the workspace's: the server and its credential, the tracking store, and the locks of both.
_SHARED = (
    *(str(access.HOME), "mlflow.db", "mlartifacts"),
    *(f"{layout.STATE}/{lock}.lock" for lock in ("credential", "server", "tracking", "tracking-store", "registry")),
)
# What an isolated run would miss if git did not track it.
_SOURCES = ("deepclust", "tasks", "flows", "dvc.yaml", "params.yaml", ".dvc/config")


def current() -> str:
    """The name of the isolated run whose worktree is the current folder; empty elsewhere."""
    here = Path.cwd()
    return here.name if here.parts[-3:-1] == FOLDER.parts and (here / ".git").is_file() else ""


def names() -> list[str]:
    """The isolated runs of this workspace, sorted."""
    found = (path for path in FOLDER.glob("*") if _NAME.fullmatch(path.name) and not path.is_symlink())
    return sorted(path.name for path in found if (path / ".git").is_file())


def folder(name: str) -> Path:
    """The worktree of an isolated run, relative to the workspace; of the empty name the workspace itself.

    Raises:
        StageError: If there is no such run.
    """
    return _named(name) if name else Path()


@contextmanager
def worktree(name: str, values: Params) -> Iterator[Path]:
    """Make a worktree, and the current folder of the body of it.

    Args:
        name: Such as a flow run's; what a path can not hold is replaced, and a number is added if it is taken.
        values: Parameters of the run; folders and weights that they name by relative paths are found under the same.

    Raises:
        StageError: If it can not be made; then nothing is left of it.
    """
    path = _create(name, values)
    with chdir(path):
        yield path


def next_steps(name: str) -> str:
    """What to do with an isolated run that has ended, as commands."""
    where = FOLDER / name
    kept = " ".join(str(where / part) for part in (layout.PARAMS, "dvc.lock", layout.METRICS, layout.PLOTS))
    return "\n".join(
        [
            f"isolated run {name} is in {where}",
            f"compare:    cd {where} && dvc params diff && dvc metrics diff",
            f"take over:  cp -r {kept} . && dvc checkout dvc.yaml",
            f"remove:     python -m flows.isolated remove {name}",
        ]
    )


def remove(name: str) -> None:
    """Delete an isolated run's worktree. What it computed stays in DVC's cache until `dvc gc`.

    Raises:
        StageError: If there is none of this name, or a flow runs in it.
    """
    path = _named(name).absolute()
    with locked("isolated"), _alone(path):
        _delete(path)
    if path.exists():
        raise StageError(f"expected to remove {path}, but files are left; mend its permissions and remove it again")


def _named(name: str) -> Path:
    if name not in names():
        raise StageError(f"expected an isolated run ({', '.join(names()) or 'there is none'}), got {name!r}")
    return FOLDER / name


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Lock out flows from a worktree."""
    with ExitStack() as stack:
        with chdir(path):
            stack.enter_context(Workspace())
        yield


def _create(name: str, values: Params) -> Path:
    root = Path.cwd()
    _check(root)
    with locked("isolated"):
        path = root / FOLDER / _free(name)
        try:
            with dvc_runner.at_rest():
                changes = _snapshot()
            _git("worktree", "prune")  # else a worktree that was deleted by hand keeps its path
            _git("worktree", "add", "--quiet", "--detach", "--", str(path), "HEAD")
            if changes:  # over the commit, so that the tracking names it, and says that there are changes
                _git("read-tree", "-u", "--reset", changes, at=path)
            for folder in sorted(_paths(values)):  # a folder before those in it
                _link_data(root, path, folder)
            _link_shared(root, path)
            dvc_runner.share_cache(path)
        except OSError as error:
            _delete(path)
            raise StageError(f"expected room for a worktree in {path}, got: {error.strerror}; make room") from error
        except BaseException:
            _delete(path)
            raise
    return path


def _check(root: Path) -> None:
    """Refuse a workspace of which git can not make a worktree that has all that runs."""
    if current():
        raise StageError(f"expected a workspace, got the isolated run {current()} in {root}; run it without isolated")
    try:
        top = _git("rev-parse", "--show-toplevel")
        _git("rev-parse", "--verify", "--quiet", "HEAD^{commit}")
    except StageError as error:
        raise StageError(
            f"expected a git repository with a commit in {root}, of which an isolated run makes a worktree; commit, or "
            f"run without isolated ({error})"
        ) from error
    if Path(top) != root.resolve():
        raise StageError(
            f"expected the workspace to be the whole of its git repository, which is {top}; clone it alone"
        )
    if (root / ".gitmodules").exists():
        raise StageError(
            f"expected no submodules in {root}, since a worktree has none of their files; run without isolated"
        )
    if missing := _git("ls-files", "--others", "--exclude-standard", "--", *_SOURCES).splitlines():
        raise StageError(
            f"expected git to track all code, since an isolated run has only that; it does not know {missing[0]}"
            f"{f' and {len(missing) - 1} more' if missing[1:] else ''}; git add {missing[0]}"
        )


def _free(name: str) -> str:
    """A name that a path can hold and no isolated run has."""
    name = re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")[:60].rstrip("-") or "run"
    taken = {path.name for path in FOLDER.glob("*")}
    numbered = (f"{name}-{number}" for number in range(2, len(taken) + 3))
    return next(each for each in (name, *numbered) if each not in taken)


def _snapshot() -> str:
    """A commit of all tracked files as they are, which changes neither them nor the index; empty if HEAD is that."""
    done = _run("stash", "create")
    nothing = done.returncode == 1 and not done.stderr.strip()  # to commit; other versions of git end with 0
    return "" if nothing else _checked(done)


def _paths(values: Params) -> set[str]:
    """Folders and files that the parameters name."""
    weights = (getattr(values.options(encoder), "weights", "") for encoder in values.encoders)
    return {values.data.folder, values.adapt.domains, *(path for path in weights if Path(path).suffix)}


def _link_data(root: Path, worktree: Path, path: str) -> None:
    """Make what git does not track be found under the same relative path: by a link, which DVC and stages follow."""
    if Path(path).is_absolute():
        return
    parts = Path(os.path.normpath(path)).parts
    if beside := parts[0] == "..":
        parts = parts[:2]  # of what lies beside the workspace, all becomes a link beside the worktree
    place, target = (Path(os.path.normpath(base.joinpath(*parts))) for base in (worktree, root))
    if place.resolve() == target.resolve() or not target.exists():
        return
    home = worktree.parent if beside else worktree
    if place.parent.resolve() != home.resolve().joinpath(*parts[beside:-1]) or (beside and os.path.lexists(place)):
        raise StageError(f"expected a path that can be the same in a worktree, got {path!r}; write it as {root / path}")
    if not beside:
        untracked = _git("ls-files", "--others", "--directory", "--", path)
        if place.exists() and not target.is_symlink() and not untracked:
            return
        tracked = _git("ls-files", "-z", "--", path, at=worktree)
        _git("update-index", "-z", "--skip-worktree", "--stdin", at=worktree, stdin=tracked)  # else they count as gone
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place)
        place.unlink(missing_ok=True)
        place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(target)


def _link_shared(root: Path, worktree: Path) -> None:
    access.HOME.mkdir(mode=0o700, exist_ok=True)
    (worktree / layout.STATE).mkdir(exist_ok=True)
    for name in _SHARED:
        (worktree / name).symlink_to(root / name)
    costs = layout.cost("any").parent
    if costs.is_dir():  # of the encoders that are not trained again
        shutil.copytree(costs, worktree / costs)


def _delete(path: Path) -> None:
    _run("worktree", "remove", "--force", "--force", "--", str(path))  # also one that was killed while it was made
    shutil.rmtree(path, ignore_errors=True)
    _run("worktree", "prune")


def _git(*arguments: str, at: Path | None = None, stdin: str = "") -> str:
    """What a git command prints. Raises: StageError with git's own words if it fails."""
    return _checked(_run(*arguments, at=at, stdin=stdin))


def _checked(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or [f"status {done.returncode}"]
        raise StageError(f"git failed: {said[-1]}")
    return done.stdout.strip("\n")


def _run(*arguments: str, at: Path | None = None, stdin: str = "") -> subprocess.CompletedProcess[str]:
    # No hook of the repository's runs in a worktree that nobody works in.
    command = ["git", "--literal-pathspecs", "-c", "core.hooksPath=/dev/null", *arguments]
    try:
        return subprocess.run(command, cwd=at, input=stdin, capture_output=True, text=True, errors="surrogateescape")
    except FileNotFoundError as error:
        raise StageError("expected the command git, found none; install it, or run without isolated") from error


def _line(name: str, width: int) -> str:
    """A run's name, whether a flow runs in it, and what differs in its params.yaml."""
    try:
        with _alone(folder(name).absolute()):
            state = "ended"
    except StageError:
        state = "running"
    changes = _git("diff", "--no-color", "--unified=0", "HEAD", "--", str(layout.PARAMS), at=folder(name)).splitlines()
    added = [line[1:].partition(" #")[0].strip() for line in changes if re.match(r"\+(?!\+)", line)]
    return f"{name:<{width}}  {state:<7}  {', '.join(added)}".rstrip()


def main() -> None:
    """List or remove isolated runs."""
    parser = argparse.ArgumentParser(prog="python -m flows.isolated", description="Runs in worktrees of their own.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="a line each: whether a flow runs in it, and what differs in params.yaml")
    removal = commands.add_parser("remove", help="delete worktrees; what they computed stays in DVC's cache")
    removal.add_argument("names", nargs="+", metavar="NAME")
    arguments = parser.parse_args()
    with errors_as_one_line():
        if arguments.command == "list":
            found = names()
            say(*[_line(name, max(map(len, found))) for name in found] or ["no isolated runs here"])
        else:
            for name in arguments.names:
                remove(name)
                say(f"removed {FOLDER / name}")


if __name__ == "__main__":
    main()
