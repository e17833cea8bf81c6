"""Several processes for one stage: torchrun starts them, and starts them again when one is lost.

    PET_NPROC_PER_NODE=2 python -m tasks.pretrain swav

becomes torchrun's launcher, with `-m tasks.pretrain swav` as its program. No exit status gets through torchrun, which
also takes every status but 0 for a loss. So a process that ends on purpose, by a user's mistake or a preemption, leaves
an outcome in a file and exits with 0; the launcher reads it, says its line and exits with its status.

Decides where a stage runs and how it ends, never what it writes.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from deepclust.errors import ConfigError, DeepclustError, PeerError, StageError
from tasks import children, environment

STAGES = ("pretrain", "embed", "cluster")  # those that know how to share their work
JOIN_SECONDS = 300  # for all machines to come; PET_RDZV_CONF=join_timeout=… says otherwise
RESTARTS = 3  # of the group; PET_MAX_RESTARTS says otherwise
PORT = 29400  # torchrun's own default
_OUTCOME = "DEEPCLUST_OUTCOME"  # path of the file by which processes tell the launcher
_PARENT_DEATH_SIGNAL = 1  # prctl(2); Linux only


def wanted(stage: str) -> bool:
    """Whether this process is to become the launcher of several."""
    several = _several("PET_NPROC_PER_NODE") or _several("PET_NNODES")
    return stage in STAGES and several and not is_worker()


def _several(variable: str) -> bool:
    return os.environ.get(variable, "").strip() not in ("", "1", "1:1")


def is_worker() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_main() -> bool:
    """Whether this is the process that writes files and speaks for all."""
    return not is_worker() or os.environ.get("RANK", "0") == "0"


# In a process that torchrun started.


@contextmanager
def joined() -> Iterator[None]:
    """Work together with the other processes; only the main one writes to the terminal. Alone, do nothing."""
    if not is_worker():
        yield
        return
    if _read():  # ended on purpose while torchrun was starting the group again
        sys.exit(0)
    _die_with_the_launcher()
    if is_main() and (count := int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))):
        most = os.environ["TORCHELASTIC_MAX_RESTARTS"]
        print(f"warning: a process was lost; all start again ({count} of at most {most} times)", file=sys.stderr)
    _never_only_once()
    from deepclust import distributed

    try:
        with _silent_unless_main(), distributed.group(seconds=environment.collective_seconds()):
            yield
    except KeyboardInterrupt:
        _leave(128 + signal.SIGINT)
    except SystemExit as stop:
        _leave(stop.code if isinstance(stop.code, int) else 1)
    except (DeepclustError, OSError):
        raise
    except Exception as error:
        if not _is_loss(error):
            sys.excepthook(*sys.exc_info())
        elif _wait_for_outcome(seconds=2):
            _leave(0)
        else:
            print(f"warning: process {os.environ['RANK']} lost the others: {_in_one_line(error)}", file=sys.stderr)
        _leave(1)


def _never_only_once() -> None:
    """A run that is to begin anew does so once: when torchrun starts it again, it goes on from what it saved since."""
    if is_main() and _OUTCOME in os.environ:
        begun = Path(os.environ[_OUTCOME]).with_suffix(".begun")
        if begun.exists():
            os.environ["DEEPCLUST_RESUME"] = "auto"
        begun.touch()


def _leave(status: int) -> NoReturn:
    """End this process; at once if it still belongs to a group, with which an interpreter can not end in peace."""
    from deepclust import distributed

    if distributed.processes() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


@contextmanager
def together() -> Iterator[None]:
    """Fail on all processes if the body fails on one. Alone, do nothing."""
    if not is_worker():
        yield
        return
    from deepclust import distributed

    with distributed.together():
        yield


def end(status: int, line: str, error: BaseException) -> NoReturn:
    """End this process on purpose: alone with a line on stderr and a status, else with an outcome for the launcher."""
    if not is_worker() or _OUTCOME not in os.environ:
        print(line, file=sys.stderr)
        sys.exit(status)
    _write(status, line, weak=isinstance(error, PeerError))
    _leave(0)


def _path(*, weak: bool = False) -> Path:
    path = Path(os.environ[_OUTCOME])
    return path.with_suffix(".peer") if weak else path


def _write(status: int, line: str, *, weak: bool) -> None:
    """Leave an outcome, whole; the first one stays. A weak one counts only where there is no other."""
    path = _path(weak=weak)
    mine = path.with_name(f"{path.name}.{os.getpid()}")
    mine.write_text(json.dumps({"status": status, "line": line}), encoding="utf-8")
    with contextlib.suppress(FileExistsError):
        os.link(mine, path)
    mine.unlink()


def _read() -> tuple[int, str] | None:
    """Status and line of the outcome, or None if nobody ended on purpose."""
    if _OUTCOME not in os.environ:
        return None
    for weak in (False, True):
        with contextlib.suppress(FileNotFoundError):
            found: dict[str, Any] = json.loads(_path(weak=weak).read_text(encoding="utf-8"))
            return found["status"], found["line"]
    return None


def _wait_for_outcome(*, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not _read():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _is_loss(error: Exception) -> bool:
    """Whether an error says that another process does not answer. Gloo's have no class of their own."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _in_one_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0].rpartition("] ")[2][:300] or type(error).__name__


@contextmanager
def _silent_unless_main() -> Iterator[None]:
    if is_main():
        yield
        return
    with (
        Path(os.devnull).open("w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def _die_with_the_launcher() -> None:
    """Ask the kernel for it: an orphan would go on writing beside the run that takes its place."""
    launcher = os.getppid()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != launcher:
            sys.exit(1)


# In the launcher.


def start(module: str, arguments: Sequence[str]) -> int:
    """Run a module in several processes; the exit status, after one line on stderr if it is not 0.

    Args:
        module: As after `python -m`.
        arguments: What follows it.
    """
    from torch.distributed.elastic.multiprocessing import SignalException

    def stop(number: int, _: object) -> None:
        raise SignalException("told to stop", signal.Signals(number))

    logging.disable(logging.CRITICAL)  # torchrun's tables; what matters of them is said below
    for number in (signal.SIGTERM, signal.SIGINT):  # until torchrun sets handlers of the same kind
        signal.signal(number, stop)
    with tempfile.TemporaryDirectory(prefix="deepclust-") as folder:
        os.environ[_OUTCOME] = str(Path(folder) / "outcome")
        threading.Thread(target=_end_after_outcome, daemon=True).start()
        try:
            status, line = 0, ""
            _torchrun(module, arguments)
        except SignalException as told:
            status = 128 + told.sigval
        except DeepclustError as error:
            status, line = 2, f"error: {error}"
        finally:
            _kill_what_is_left()
        status, line = _read() or (status, line)
    if line:
        print(line, file=sys.stderr)
    return status


def _torchrun(module: str, arguments: Sequence[str]) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import (
        RendezvousClosedError,
        RendezvousConnectionError,
        RendezvousError,
        RendezvousTimeoutError,
    )
    from torch.distributed.launcher.api import elastic_launch

    config, command, rest = _configuration(module, arguments)
    patience = int(config.rdzv_configs["join_timeout"])
    where = f"{config.min_nodes} machines at {config.rdzv_endpoint}"
    given_up = begin = time.monotonic()
    while True:
        try:
            elastic_launch(config, command)(*rest)
            return
        except RendezvousConnectionError as error:
            # One attempt takes as long as the store's time-out; what lasted longer was a run that was cut off.
            if time.monotonic() - begin > 60 + patience:
                given_up = time.monotonic()
            if config.rdzv_endpoint == "localhost:0" or time.monotonic() - given_up > patience:
                raise StageError(
                    f"expected to meet {where}, but nobody answers there; start the same line on that machine, open "
                    "the port, or mend PET_RDZV_ENDPOINT"
                ) from error
            begin = time.monotonic()
            time.sleep(1)
        except RendezvousTimeoutError as error:
            raise StageError(
                f"expected {where} within {patience} s, fewer came; start the same line on the others, mend "
                f"PET_NNODES, or wait longer: PET_RDZV_CONF=join_timeout={2 * patience}"
            ) from error
        except RendezvousClosedError as error:
            raise StageError(
                f"expected to meet {where}, but the run has ended there; its message says why, run again on all"
            ) from error
        except RendezvousError as error:
            raise StageError(f"expected to meet {where}, got: {_in_one_line(error)}; run again") from error
        except ChildFailedError as error:
            first = min(error.failures.values(), key=lambda failure: failure.timestamp)
            how = f"signal {-first.exitcode}" if first.exitcode < 0 else f"status {first.exitcode}"
            raise StageError(
                f"expected the processes to finish, but process {first.local_rank} of this machine ended by {how} "
                f"after {config.max_restarts} restarts; see above, mend it and run again"
            ) from error


def _configuration(module: str, arguments: Sequence[str]) -> tuple[Any, Any, list[str]]:
    """What torchrun makes of the `PET_*` variables and of our defaults: configuration, program and its arguments.

    Raises:
        ConfigError: If they make no sense.
    """
    import torch
    from torch.distributed import run

    parser: Any = run.get_args_parser()
    parser.error = _refuse
    options = ["--module", *_rendezvous(f"{module}-{'-'.join(arguments)}")]
    if not os.environ.get("PET_MAX_RESTARTS"):
        options.append(f"--max-restarts={RESTARTS}")
    try:
        config, command, rest = run.config_from_args(parser.parse_args([*options, module, *arguments]))
        int(config.rdzv_configs["join_timeout"])
    except (ValueError, RuntimeError, AssertionError) as error:
        _refuse(_in_one_line(error))
    processes, gpus = config.nproc_per_node, torch.cuda.device_count()
    if processes < 1 or (gpus and processes > gpus):
        raise ConfigError(
            f"PET_NPROC_PER_NODE: expected {f'1 to {gpus}' if gpus else '1 or more'} processes, got {processes}; "
            + ("set it to `gpu`, or CUDA_VISIBLE_DEVICES= to compute on the CPU" if gpus else "mend or unset it")
        )
    # torchrun's own store outlives a restart, with the addresses of the dead, where gloo then looks for the living.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # host names that can not be looked up
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    os.environ["LOCAL_WORLD_SIZE"] = str(processes)  # for the number of threads, which libraries read when loading
    environment.prepare()
    return config, command, rest


def _rendezvous(name: str) -> list[str]:
    """Where the processes meet: on a free port of this machine, or where the user says.

    Each stage has an identity of its own there, so that two at once are not taken for one run.
    """
    said = os.environ.get
    conf = f"join_timeout={JOIN_SECONDS}"
    endpoint = said("PET_RDZV_ENDPOINT", "")
    if not endpoint and said("PET_MASTER_ADDR") and _several("PET_NNODES"):
        endpoint = f"{said('PET_MASTER_ADDR')}:{said('PET_MASTER_PORT') or PORT}"
        if said("PET_NODE_RANK"):
            conf += f",is_host={int(said('PET_NODE_RANK') == '0')}"
    if not endpoint and _several("PET_NNODES"):
        raise ConfigError(
            f"PET_RDZV_ENDPOINT: expected host:port of the first machine where PET_NNODES={said('PET_NNODES')}, got "
            f"nothing; set it to the same value on all of them, such as PET_RDZV_ENDPOINT=10.0.0.1:{PORT}"
        )
    if said("PET_RDZV_CONF"):
        conf += f",{said('PET_RDZV_CONF')}"
    options = ["--rdzv-backend=c10d", f"--rdzv-conf={conf}"]
    if endpoint:
        return [*options, f"--rdzv-endpoint={endpoint}", f"--rdzv-id={said('PET_RDZV_ID') or 'deepclust'}-{name}"]
    options += [] if said("PET_LOCAL_ADDR") else ["--local-addr=localhost"]
    return [*options, "--rdzv-endpoint=localhost:0", f"--rdzv-id={uuid.uuid4()}"]


def _refuse(message: str) -> NoReturn:
    settings = " ".join(f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("PET_"))
    raise ConfigError(
        f"expected PET_* variables that torchrun understands, got {settings}: {message}; mend or unset them"
    )


def _end_after_outcome() -> None:
    """Stop the processes that wait for one that ended on purpose, which they may do until a collective's time-out."""
    while not _read():
        time.sleep(0.5)
    time.sleep(children.GRACE)
    os.kill(os.getpid(), signal.SIGTERM)


def _kill_what_is_left() -> None:
    """After a second signal torchrun no longer waits for its processes."""
    import psutil

    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            process.kill()
