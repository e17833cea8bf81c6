"""Two machines as network namespaces of this one: the second is cut off in mid-training, and the run ends well.

    python benchmarks/two_machines.py            # as root, on Linux with ip(8)

One stage runs under torchrun in both, joined by a veth pair: two machines of one process each. The one that does not
hold the rendezvous loses its link twice: once with its processes killed, which a new launcher replaces, once with them
alive. What comes out is compared with two processes of one machine that nothing happened to.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
from PIL import Image
from safetensors.numpy import load_file

from tasks.shared.operations.params import overrides
from tasks.shared.outputs import layout

ROOT = Path(__file__).resolve().parents[1]
MACHINES = {"first": "10.77.0.1", "second": "10.77.0.2"}  # the first's address sorts first, so rank 0 is there
PORT = 29400
COLLECTIVE_SECONDS = 5
OUTAGE_SECONDS = 12
PATIENCE = 300.0  # seconds that anything may take


def namespace(machine: str) -> str:
    """Name of a machine's network namespace."""
    return f"deepclust-{machine}"


def device(machine: str) -> str:
    """Name of a machine's end of the cable; Linux allows 15 letters."""
    return f"dc-{machine}"


def ip(*arguments: str) -> None:
    """Run ip(8)."""
    subprocess.run(["ip", *arguments], check=True)


@contextmanager
def cable() -> Iterator[None]:
    """Two namespaces, each with a loopback device and one end of a veth pair."""
    try:
        for machine in MACHINES:
            ip("netns", "add", namespace(machine))
        first, second = MACHINES
        ip("link", "add", device(first), "netns", namespace(first), "type", "veth", "peer", "name", device(second),
           "netns", namespace(second))  # fmt: skip
        for machine, address in MACHINES.items():
            ip("-n", namespace(machine), "address", "add", f"{address}/24", "dev", device(machine))
            ip("-n", namespace(machine), "link", "set", "lo", "up")
            link(machine, "up")
        yield
    finally:
        for machine in MACHINES:
            subprocess.run(["ip", "netns", "delete", namespace(machine)], check=False)


def link(machine: str, state: str) -> None:
    """Plug a machine in (`up`) or cut it off (`down`)."""
    ip("-n", namespace(machine), "link", "set", device(machine), state)


def workspace(root: Path, encoder: str, epochs: int) -> None:
    """A folder with params.yaml and prepared images of three kinds."""
    random = np.random.default_rng(0)
    for index in range(512):
        picture = random.integers(0, 60, (16, 16, 3))
        picture[:, 5 * (index % 3) : 5 * (index % 3) + 5] += 180
        path = root / f"images/{index:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.astype(np.uint8)).save(path)
    shutil.copy(ROOT / "params.yaml", root)
    edits = [
        "data.source=folder",
        "data.folder=images",
        "pretrain.shared.image_size=16",
        "pretrain.pixels.image_size=16",
        "pretrain.checkpoint.every_steps=10",
        f"encoders=[{encoder}]",
        f"pretrain.{encoder}.epochs={epochs}",
        f"pretrain.{encoder}.batch_size=64",
    ]
    overrides.apply(edits, root / "params.yaml")
    for stage in ("sizes", "prepare"):
        subprocess.run([sys.executable, "-m", f"tasks.{stage}"], cwd=root, env=environment(), check=True)


def environment(**variables: str) -> dict[str, str]:
    """One thread a process, so that all runs compute alike, and neither tracking nor GPU."""
    ours = {
        "PYTHONPATH": str(ROOT),
        "DEEPCLUST_TRACKING": "off",
        "DEEPCLUST_THREADS": "1",
        "DEEPCLUST_COLLECTIVE_SECONDS": str(COLLECTIVE_SECONDS),
        "CUDA_VISIBLE_DEVICES": "",
    }
    return {**os.environ, **ours, **variables}


def start(machine: str, root: Path, encoder: str) -> subprocess.Popen[bytes]:
    """The line that each machine runs."""
    first = next(iter(MACHINES))
    return subprocess.Popen(
        ["ip", "netns", "exec", namespace(machine), sys.executable, "-m", "tasks.pretrain", encoder],
        cwd=root,
        env=environment(
            PET_NNODES="2",
            PET_NPROC_PER_NODE="1",
            PET_RDZV_ENDPOINT=f"{MACHINES[first]}:{PORT}",
            PET_RDZV_CONF=f"is_host={int(machine == first)}",
            PET_LOCAL_ADDR=MACHINES[machine],
            GLOO_SOCKET_IFNAME=device(machine),
        ),
    )


def kill(process: subprocess.Popen[bytes]) -> None:
    """kill -9 to a launcher and to everything below it."""
    for one in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        with contextlib.suppress(psutil.Error):
            one.send_signal(signal.SIGKILL)
    process.wait()


def saved_steps(root: Path, encoder: str) -> set[str]:
    """The checkpoints of the unfinished run, by name."""
    return {path.parent.name for path in (root / layout.runs(encoder)).glob("*/step-*/manifest.json")}


def wait_for_new_state(root: Path, encoder: str, processes: list[subprocess.Popen[bytes]]) -> None:
    """Wait until training has saved twice from now on."""
    deadline = time.monotonic() + PATIENCE
    for _ in range(2):
        before = saved_steps(root, encoder)
        while not saved_steps(root, encoder) - before:
            if time.monotonic() > deadline or any(process.poll() is not None for process in processes):
                raise SystemExit("training ended or stood still before it was cut off; give it more --epochs")
            time.sleep(0.02)


def interrupted(root: Path, encoder: str) -> None:
    """Train on both machines, with two outages of the second."""
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"--- {time.monotonic() - began:6.1f} s  {text}", flush=True)

    with cable():
        first, second = (start(machine, root, encoder) for machine in MACHINES)
        try:
            wait_for_new_state(root, encoder, [first, second])
            say("the second machine is cut off and its processes are killed")
            link("second", "down")
            kill(second)
            time.sleep(OUTAGE_SECONDS)
            say("the second machine is back and runs the line again")
            link("second", "up")
            second = start("second", root, encoder)
            wait_for_new_state(root, encoder, [first, second])
            say("the second machine is cut off, its processes live on")
            link("second", "down")
            time.sleep(OUTAGE_SECONDS)
            say("the second machine is back")
            link("second", "up")
            statuses = [process.wait(PATIENCE) for process in (first, second)]
            say(f"exit statuses {statuses}")
            if statuses != [0, 0]:
                raise SystemExit(1)
        finally:
            for process in (first, second):
                if process.poll() is None:
                    kill(process)


def compare(one: Path, other: Path, encoder: str) -> bool:
    """Print how far the weights are apart; whether they and the history are the same bits."""
    folder = layout.out("pretrain", encoder)
    left, right = (load_file(root / folder / "encoder.safetensors") for root in (one, other))
    assert left.keys() == right.keys()
    apart = max(float(np.abs(left[name].astype(np.float64) - right[name]).max()) for name in left)
    names = ("encoder.safetensors", "history.csv")
    same = {name: (one / folder / name).read_bytes() == (other / folder / name).read_bytes() for name in names}
    print(f"largest difference of a weight {apart:g}; identical: {same}")
    return all(same.values())


def main() -> None:
    """Run both and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="simsiam")
    parser.add_argument("--epochs", type=int, default=30)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="two-machines-") as folder:
        whole, cut = Path(folder) / "whole", Path(folder) / "cut"
        workspace(whole, arguments.encoder, arguments.epochs)
        shutil.copytree(whole, cut)
        began = time.monotonic()
        command = [sys.executable, "-m", "tasks.pretrain", arguments.encoder]
        # Two threads for the stage are one for each of its two processes here.
        subprocess.run(command, cwd=whole, env=environment(PET_NPROC_PER_NODE="2", DEEPCLUST_THREADS="2"), check=True)
        print(f"--- two processes of one machine: {time.monotonic() - began:.1f} s")
        interrupted(cut, arguments.encoder)
        sys.exit(0 if compare(whole, cut, arguments.encoder) else 1)


if __name__ == "__main__":
    main()
