"""The rows that a pretraining run has logged, one an update, as a part of its state."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch

from deepclust.training import loop

_WHOLE = ("step", "epoch")


class History:
    """Rows in the order of the updates.

    Attributes:
        rows: For each update its step, epoch, loss, rate, gradient norm and the method's scalars.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, done: loop.Step) -> None:
        """Note an update."""
        self.rows.append(as_row(done))

    def state_dict(self) -> list[dict[str, Any]]:
        """Tables in float64, one for each run of rows with equal names: a method's change with its epochs."""
        return [
            {"names": list(names), "values": torch.tensor([list(row.values()) for row in rows], dtype=torch.float64)}
            for names, rows in groupby(self.rows, key=tuple)
        ]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        """Take over tables."""
        self.rows = [
            {name: int(value) if name in _WHOLE else value for name, value in zip(table["names"], values, strict=True)}
            for table in state
            for values in table["values"].tolist()
        ]


def as_row(done: loop.Step) -> dict[str, Any]:
    """An update as a row of the history."""
    return {
        "step": done.step,
        "epoch": done.epoch,
        "loss": done.loss,
        "rate": done.rate,
        "gradient_norm": done.gradient_norm,
    } | done.logged


def mean(rows: list[dict[str, Any]], name: str) -> float:
    """Mean of a column over the rows that have it."""
    values: list[float] = [row[name] for row in rows if name in row]
    return sum(values) / len(values)


def means(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Mean of every column but the counters."""
    names = sorted({name for row in rows for name in row} - set(_WHOLE))
    return {name: mean(rows, name) for name in names}
