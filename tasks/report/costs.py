"""What training and embedding took, in a script beside the report.

Two runs write the same report.html, so it holds no clock reading, but the hashes of the outputs that its cells are of.
costs.js knows readings by these hashes and fills the cells in; without it they stay dashes. DVC ignores it
(.dvcignore).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tasks.report.comparison import COSTS, shown
from tasks.report.verdict import listed
from tasks.shared.operations import costs

STAGE = dict(zip(COSTS, ("pretrain", "embed"), strict=True))
_SCRIPT = """"use strict";
const texts = %s;
for (const place of document.querySelectorAll("[data-outputs]")) {
  const text = texts[place.dataset.outputs];
  if (text) place.textContent = text;
}
"""


def script(rows: Sequence[Mapping[str, Any]]) -> str:
    """costs.js for rows that have costs."""
    texts: dict[str, str] = {}
    machines: dict[str, None] = {}
    for row in rows:
        for column, stage in STAGE.items():
            reading = costs.reading(stage, row["encoder"])
            if reading and row[column] is not None:
                texts[reading["outputs"]] = shown(row, column)
                machines[f"{reading['processor']}, {reading['threads']} thread(s)"] = None
    if machines:
        texts["note"] = f"Minutes of training, and images embedded in a second, on: {listed(list(machines))}."
    return _SCRIPT % json.dumps(texts).replace("<", "\\u003c")
