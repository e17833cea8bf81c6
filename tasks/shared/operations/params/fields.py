"""What the sections of params.yaml are made of: the frozen base class, kinds of numbers, the hint at a near word."""

from __future__ import annotations

import difflib
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Share = Annotated[float, Field(strict=True, ge=0, le=1)]
Positive = Annotated[float, Field(strict=True, gt=0)]
Count = Annotated[int, Field(strict=True, ge=1)]
Natural = Annotated[int, Field(strict=True, ge=0)]
Auto = Literal["auto"]
Flag = Annotated[bool, Field(strict=True)]
EncoderName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]


def hint(word: str, known: list[str]) -> str:
    """The nearest known word, as the end of a message; empty if none is near."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


class Section(BaseModel):
    """A frozen mapping without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, allow_inf_nan=False)
