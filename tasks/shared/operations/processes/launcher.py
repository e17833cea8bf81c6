"""Several processes for one stage: torchrun starts them, and restarts all when one is lost.

    PET_NPROC_PER_NODE=2 python -m tasks.pretrain swav

becomes a launcher: torchrun's agent, with `-m tasks.pretrain swav` as its program. How its processes end on purpose is
in worker.py; the launcher reads their outcomes, prints the line of the one that counts and exits with its status.

Decides where a stage runs and how it ends, never what it writes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from typing import Any, NoReturn

import psutil

from deepclust import temporary
from deepclust.errors import ConfigError, DeepclustError, StageError
from tasks.shared.operations.processes import child_processes, worker
from tasks.shared.operations.processes.worker import end, has_begun, is_main, is_worker, joined, note_begun, together
from tasks.shared.operations.text import say
from tasks.shared.outputs import environment

__all__ = ["end", "has_begun", "is_main", "is_worker", "joined", "note_begun", "start", "together", "wanted"]

STAGES = ("prepare", "pretrain", "embed", "cluster")  # those that can run on several processes
JOIN_SECONDS = 300  # for all machines to come; PET_RDZV_CONF=join_timeout=… says otherwise
RESTARTS = 3  # of the group; PET_MAX_RESTARTS says otherwise
MACHINES = 10_000  # more are a mistyped number
PORT = 29400  # torchrun's own default


def wanted(stage: str) -> bool:
    """Whether the environment asks for several processes, so that this one becomes their launcher."""
    several = _several("PET_NPROC_PER_NODE") or _several("PET_NNODES")
    return stage in STAGES and several and not is_worker()


def _several(variable: str) -> bool:
    return os.environ.get(variable, "").strip() not in ("", "1", "1:1")


def start(module: str, arguments: Sequence[str]) -> int:
    """Run a module in several processes; the exit status, after one line on stderr if it is not 0.

    Args:
        module: As after `python -m`.
        arguments: What follows it.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch warns of host names that it can not look up
    from torch.distributed.elastic.multiprocessing import SignalException

    def stop(number: int, _: object) -> None:
        raise SignalException("told to stop", signal.Signals(number))

    logging.disable(logging.CRITICAL)  # torchrun's tables; what matters of them is printed below
    for number in (signal.SIGTERM, signal.SIGINT):  # until torchrun sets handlers that do the same
        signal.signal(number, stop)
    with temporary.everything() as folder:
        os.environ |= {worker.FOLDER: str(folder), worker.LAUNCHER: str(os.getpid())}
        ended = threading.Event()
        threading.Thread(target=_end_after_outcome, args=(ended,), daemon=True).start()
        status, line, told = 0, "", False
        try:
            _torchrun(module, arguments)
        except SignalException as signalled:
            status, told = 128 + signalled.sigval, not ended.is_set()
        except DeepclustError as error:
            status, line = 2, f"error: {error}"
        finally:
            for process in psutil.Process().children(recursive=True):  # after a second signal torchrun leaves some
                with contextlib.suppress(psutil.Error):
                    process.kill()
        found = worker.outcome()
    if found and not (found.order == 2 and told):
        status, line = found.status, found.line
    if line:
        say(line, file=sys.stderr)
    return status


def _torchrun(module: str, arguments: Sequence[str]) -> None:
    """Start the processes, and all again when one is lost, until they have ended.

    Raises:
        ConfigError: If the `PET_*` variables make no sense.
        StageError: If the machines do not meet, or a process was lost too often.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import api
    from torch.distributed.launcher.api import elastic_launch

    config, command, rest = _configuration(module, arguments)
    patience = int(config.rdzv_configs["join_timeout"])
    where = f"{config.min_nodes} machines at {config.rdzv_endpoint}"
    deadline = (begin := time.monotonic()) + patience
    while True:
        try:
            elastic_launch(config, command)(*rest)
            return
        except api.RendezvousConnectionError as error:
            if (found := worker.outcome()) and not found.status:
                return
            # An attempt to connect takes a minute, the store's time-out; what lasted longer was a run that was cut off.
            if time.monotonic() - begin > 60 + patience:
                deadline = time.monotonic() + patience
            if config.rdzv_endpoint == "localhost:0" or time.monotonic() > deadline:
                raise StageError(
                    f"expected to meet {where}, but nobody answers there; start the same line on that machine, open "
                    "the port, or mend PET_RDZV_ENDPOINT"
                ) from error
            begin = time.monotonic()
            time.sleep(1)
        except api.RendezvousTimeoutError as error:
            raise StageError(
                f"expected {where} within {patience} s, fewer came; start the same line on the others, mend "
                f"PET_NNODES, or wait longer: PET_RDZV_CONF=join_timeout={2 * patience}"
            ) from error
        except api.RendezvousError as error:
            closed = isinstance(error, api.RendezvousClosedError)
            why = "the run has ended there; see its message" if closed else worker.in_one_line(error)
            raise StageError(f"expected to meet {where}, but {why}; run again on all") from error
        except ChildFailedError as error:
            _, first = error.get_first_failure()
            how = f"signal {-first.exitcode}" if first.exitcode < 0 else f"status {first.exitcode}"
            raise StageError(
                f"expected the processes to finish, but process {first.local_rank} of this machine ended by {how} "
                f"after {config.max_restarts} restarts; see above, mend it and run again"
            ) from error


def _configuration(module: str, arguments: Sequence[str]) -> tuple[Any, Any, list[str]]:
    """torchrun's configuration by the `PET_*` variables and our defaults, the program, and its arguments.

    Raises:
        ConfigError: If they make no sense.
    """
    import torch
    from torch.distributed import run
    from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

    parser: Any = run.get_args_parser()
    parser.error = _refuse
    options = ["--module", *_rendezvous(f"{module}-{'-'.join(arguments)}")]
    if not os.environ.get("PET_MAX_RESTARTS"):
        options.append(f"--max-restarts={RESTARTS}")
    try:
        config, command, rest = run.config_from_args(parser.parse_args([*options, module, *arguments]))
        parse_rendezvous_endpoint(config.rdzv_endpoint, default_port=PORT)
        for name, value in config.rdzv_configs.items():
            if name.endswith(("timeout", "interval")) and not 0 <= int(value) <= environment.WEEK:
                raise ValueError(f"{name} is not 0 to {environment.WEEK} seconds")
    except (ValueError, RuntimeError, AssertionError) as error:
        _refuse(worker.in_one_line(error))
    processes, gpus = config.nproc_per_node, torch.cuda.device_count()
    largest = gpus or environment.most()
    if not 1 <= processes <= largest:
        raise ConfigError(
            f"PET_NPROC_PER_NODE: expected 1 to {largest} processes, got {processes}; "
            + ("set it to `gpu`, or CUDA_VISIBLE_DEVICES= to compute on the CPU" if gpus else "mend or unset it")
        )
    if config.max_nodes > MACHINES:
        raise ConfigError(f"PET_NNODES: expected 1 to {MACHINES} machines, got {config.max_nodes}; mend or unset it")
    # torchrun's own store outlives a restart, with the addresses of lost processes, where gloo would look for new ones.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    os.environ["LOCAL_WORLD_SIZE"] = str(processes)  # for the number of threads, which libraries read when loading
    environment.prepare()
    return config, command, rest


def _rendezvous(name: str) -> list[str]:
    """torchrun's options for where the processes meet: a free port of this machine, or where the user says.

    Each stage has a rendezvous of its own, so that two at once are not taken for one run.
    """
    said, several = os.environ.get, _several("PET_NNODES")
    if (backend := said("PET_RDZV_BACKEND") or "c10d") != "c10d":
        raise ConfigError(f"PET_RDZV_BACKEND: expected c10d, got {backend}; mend or unset it")
    conf = f"--rdzv-conf=join_timeout={JOIN_SECONDS}"
    endpoint = said("PET_RDZV_ENDPOINT")
    if several and not endpoint and (first := said("PET_MASTER_ADDR")):
        endpoint = f"{first}:{said('PET_MASTER_PORT') or PORT}"
        if rank := said("PET_NODE_RANK"):
            conf += f",is_host={int(rank == '0')}"
    if several and not endpoint:
        raise ConfigError(
            f"PET_RDZV_ENDPOINT: expected host:port of the first machine where PET_NNODES={said('PET_NNODES')}, got "
            f"nothing; set it to the same value on all of them, such as PET_RDZV_ENDPOINT=10.0.0.1:{PORT}"
        )
    if said("PET_RDZV_CONF"):
        conf += f",{said('PET_RDZV_CONF')}"
    options = ["--rdzv-backend=c10d", conf, f"--rdzv-endpoint={endpoint or 'localhost:0'}"]
    if endpoint:
        return [*options, f"--rdzv-id={said('PET_RDZV_ID') or 'deepclust'}-{name}"]
    return [*options, f"--rdzv-id={uuid.uuid4()}", *([] if said("PET_LOCAL_ADDR") else ["--local-addr=localhost"])]


def _refuse(message: str) -> NoReturn:
    settings = " ".join(f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("PET_"))
    raise ConfigError(
        f"expected PET_* variables that torchrun understands, got {settings}: {message}; mend or unset them"
    )


def _end_after_outcome(ended: threading.Event) -> None:
    """Stop what waits for a process that ended on purpose, until a collective's or torchrun's own time-out.

    But not torchrun while it waits for the machines of a new group: it told the old one's processes to stop, and they
    are gone.

    Args:
        ended: Set before the signal.
    """
    while True:
        found = worker.outcome()
        if found and found.status:
            time.sleep(child_processes.GRACE)
            new_group = found.told and not psutil.Process().children()
            if not new_group and worker.outcome() == found:
                break
        time.sleep(0.5)
    ended.set()
    os.kill(os.getpid(), signal.SIGTERM)
