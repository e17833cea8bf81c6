#!/usr/bin/env bash
# pydantic 2.14.3: a subclass of a pydantic dataclass loses the descriptions that its base's fields have from their docstrings; of a model it
# keeps them.
#
# With `use_attribute_docstrings=True` the string below a field becomes its description, in the JSON schema and wherever options are explained.
# Expected: the same for `BaseModel` and for `pydantic.dataclasses.dataclass`, in subclasses too: an inherited field has its base's description.
# Seen: a subclass of a model describes all fields; a subclass of a dataclass only its own, and the inherited ones have no description.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check 'pydantic==2.14.3'
cat >"$folder/options.py" <<'PYTHON'
from pydantic import BaseModel, ConfigDict, TypeAdapter
from pydantic.dataclasses import dataclass

DOCUMENTED = ConfigDict(use_attribute_docstrings=True)


class Model(BaseModel):
    model_config = DOCUMENTED
    rate: float = 0.1
    """Learning rate."""


class SubModel(Model):
    momentum: float = 0.9
    """Share of the last step that is kept."""


@dataclass(config=DOCUMENTED)
class Options:
    rate: float = 0.1
    """Learning rate."""


@dataclass(config=DOCUMENTED)
class SubOptions(Options):
    momentum: float = 0.9
    """Share of the last step that is kept."""


def described(kind: type) -> dict[str, bool]:
    fields = TypeAdapter(kind).json_schema()["properties"]
    return {name: "description" in field for name, field in fields.items()}


for kind in (Model, SubModel, Options, SubOptions):
    print(kind.__name__, described(kind))
assert described(SubModel) == {"rate": True, "momentum": True}
assert described(Options) == {"rate": True}
assert described(SubOptions) == {"rate": False, "momentum": True}
PYTHON
"$folder/venv/bin/python" "$folder/options.py"
echo "as described: a dataclass's subclass describes its own fields only"
