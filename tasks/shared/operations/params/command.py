"""Checks or shows params.yaml, points it at a folder, changes it by a recipe, or brings an earlier one up to date.

python -m tasks.params check
python -m tasks.params show [swav]
python -m tasks.params folder path/to/images
python -m tasks.params apply recipes/cifar10-resnet18.yaml
python -m tasks.params migrate [recipe.yaml …]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tasks.shared.operations import params
from tasks.shared.operations.messages import errors_as_one_line
from tasks.shared.operations.params import folder, migration, overrides, showing
from tasks.shared.operations.text import say
from tasks.shared.outputs import layout


def main() -> None:
    """Do what the command line says, and show what changed as a diff."""
    parser = argparse.ArgumentParser(prog="python -m tasks.params", description="Check, show or change params.yaml.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check", help="say whether params.yaml is valid")
    shown = commands.add_parser("show", help="print every value that holds, with its meaning")
    shown.add_argument("encoder", nargs="?", help="only what holds for this encoder's pretraining")
    own = commands.add_parser("folder", help="take a folder of images, and the encoders that suit them")
    own.add_argument("folder", type=Path, help="the images; docs/data.md says what is read")
    recipe = commands.add_parser("apply", help="change params.yaml as a recipe says, and show what changed")
    recipe.add_argument("recipe", type=Path, help="such as recipes/cifar10-resnet18.yaml")
    earlier = commands.add_parser("migrate", help="bring an earlier params.yaml, or recipes, to the keys of today")
    earlier.add_argument("files", nargs="*", type=Path, default=[layout.PARAMS], help="params.yaml by default")
    arguments = parser.parse_args()
    with errors_as_one_line():
        if arguments.command == "apply":
            say(*(overrides.apply_recipe(arguments.recipe) or f"{layout.PARAMS} says so already").split("\n"))
        elif arguments.command == "folder":
            say(*folder.point_at(arguments.folder))
        elif arguments.command == "show":
            showing.show(params.load(), arguments.encoder, sys.stdout)
        elif arguments.command == "migrate":
            for file in arguments.files:
                lines, difference = migration.migrate(file)
                say(*(lines or [f"{file} is of today already"]), *difference.splitlines())
        else:
            params.load()
            say(f"{layout.PARAMS} is valid")
