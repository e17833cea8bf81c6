"""What a run of `pretrain` that begins anew says of the last finished one, whose encoder it does not continue.

DVC removes a stage's outputs before it starts the stage, so the parameters of the last run come from dvc.lock. Where
the stage is started by hand, the encoder's folder is still there and tells its epochs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deepclust.errors import ConfigError, DataError
from tasks.shared.operations import params, provenance
from tasks.shared.operations.params.schema import merged
from tasks.shared.outputs import layout, read

_LOCK = Path("dvc.lock")
_SHOWN = 5  # changed parameters that are named


def difference(encoder: str) -> str:
    """The parameters that have changed since the last finished run, and what becomes of its encoder, in one line.

    Empty if there was no earlier run or none of its parameters has changed.
    """
    raw, folder = params.read(), layout.out("pretrain", encoder)
    sections = {f"pretrain.{name}": raw["pretrain"].get(name, {}) for name in ("shared", encoder)}
    now, before = _flat({"seed": raw["seed"]} | sections, encoder), _locked(encoder)
    if epochs := _epochs(folder / "history.csv"):
        before = (before or now) | {"epochs": epochs}
    names = [name for name in now | before if before and before.get(name) != now.get(name)]
    if not names:
        return ""
    changes = ", ".join(f"{name} {before.get(name, 'unset')} → {now.get(name, 'unset')}" for name in names[:_SHOWN])
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    schedule, replaced = "", ""
    if "epochs" in names and "epochs" in before:  # not so after a baseline
        trained = f"the encoder of {before['epochs']} epochs is not continued"
        schedule = f" (the learning-rate schedule spans all epochs, so {trained})"
    if folder.exists():
        replaced = f"the encoder in {folder} is replaced at the end; "
    return (
        f"{encoder}: begins anew with {changes}{more} since the last finished run{schedule}; {replaced}"
        "what `dvc repro` made here stays in DVC's cache, and the earlier values restore it in seconds"
    )


def _locked(encoder: str) -> dict[str, str]:
    """The parameters of DVC's last run; empty without one."""
    try:
        stage = params.read(_LOCK)["stages"][f"pretrain@{encoder}"]
        return _flat(stage["params"][layout.PARAMS.name], encoder)
    except (ConfigError, KeyError, TypeError):
        return {}


def _flat(stated: dict[str, Any], encoder: str) -> dict[str, str]:
    """Seed and options of an encoder, with those that it inherits."""
    options = merged(stated["pretrain.shared"], stated[f"pretrain.{encoder}"])
    return provenance.flatten({"seed": stated["seed"]} | options)


def _epochs(history: Path) -> str:
    """How many epochs an encoder was trained for; empty if it is not there or damaged."""
    try:
        rows = read.table(history, {"epoch": int})
    except (DataError, OSError):
        return ""
    return str(int(rows[-1]["epoch"]) + 1) if rows else ""
