"""The kinds of parameters that the flows take. Prefect's UI makes a form of them, and refuses what does not fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import Field, TypeAdapter, ValidationError

from tasks.shared.operations.processes.dvc_runner import StageError

Stage = Literal["sizes", "prepare", "pretrain", "embed", "cluster", "linear", "adapt", "report"]
RunOn = Literal["here", "process", "docker", "kubernetes"]
EncoderName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")]
Override = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_.-]*=", max_length=10_000)]
OneStage = Annotated[str, Field(pattern=r"^[a-z]+(@[A-Za-z0-9][A-Za-z0-9_-]{0,63})?$")]
Machines = Annotated[int, Field(ge=1, le=64)]
IsolatedName = Annotated[str, Field(pattern=r"^([a-z0-9][a-z0-9-]{0,80})?$")]  # empty: the workspace itself
RunId = Annotated[str, Field(pattern=r"^[0-9a-f]{0,64}$")]


def check(function: Callable[..., Any], parameters: Mapping[str, Any]) -> None:
    """Refuse in one line what a flow would refuse with a traceback. Raises: StageError if a value does not fit."""
    kinds = get_type_hints(function, include_extras=True)
    for name, value in parameters.items():
        try:
            TypeAdapter(kinds[name]).validate_python(value)
        except ValidationError as error:
            wrong = error.errors()[0]
            raise StageError(f"{name}: {wrong['msg'][0].lower()}{wrong['msg'][1:]}, got {wrong['input']!r}") from error
