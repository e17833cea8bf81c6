"""Assign new images to the clusters of a trained encoder: cluster, distance, how sure and, with a classifier, class.

python -m tasks.assign --encoder swav PATH [--out TABLE.csv] [--embeddings FILE.npy] [--export FOLDER [--link]]

The table goes to stdout without --out; all messages go to stderr. An image whose confidence is below the threshold of
the clusters has none: its cluster is -1. `--export` sorts the images into a folder for each cluster, and `no-cluster`.
`--spreadsheet` keeps names in the table from being formulas (tasks/shared/outputs/tables.py). A run that fails leaves
no table, embeddings or folder; a file that is there stays without `--overwrite`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
from numpy.typing import NDArray

from deepclust import config
from deepclust.errors import DataError
from deepclust.images import decode, formats, npy
from deepclust.images import find as finding
from tasks.model import export
from tasks.shared.operations import params
from tasks.shared.operations.messages import errors_as_one_line
from tasks.shared.operations.text import say, warn
from tasks.shared.outputs import environment, layout, lineage, tables

if TYPE_CHECKING:
    from deepclust import bundle

NO_CLUSTER = "no-cluster"  # the folder of what is rejected
_CHUNK_BYTES = 1 << 26  # pixels held at once


def main() -> None:
    """Assign all images that can be read."""
    arguments = _arguments()
    with errors_as_one_line(), ExitStack() as stack:
        environment.prepare()
        if arguments.max_skipped is not None:
            config.parse(config.Share, arguments.max_skipped, "--max-skipped")
        values = params.load()
        values.method(arguments.encoder)
        files_of = {"--out": arguments.out or Path("/dev/stdout"), "--embeddings": arguments.embeddings}
        export.check(files_of, {"--export": arguments.export}, overwrite=arguments.overwrite)
        root, files = find(arguments.path, values.data.follow_links)
        add, matrix = None, None
        file: TextIO = sys.stdout
        if arguments.export:
            add = stack.enter_context(export.sorted_folder(arguments.export, link=arguments.link))
        lineage.check(layout.predicting(arguments.encoder))
        from deepclust import bundle  # imports torch, which takes seconds: mistakes in the arguments come first

        model = bundle.load(
            layout.out("pretrain", arguments.encoder),
            clusters=layout.out("cluster", arguments.encoder),
            classifier=layout.out("linear", arguments.encoder),
            statistics=layout.statistics(arguments.encoder),
        )
        if arguments.embeddings:
            partial = stack.enter_context(export.whole(arguments.embeddings))
            matrix = stack.enter_context(npy.RowFile(partial, (model.encoder.feature_dim,), np.float32))
        if arguments.out:
            partial = stack.enter_context(export.whole(arguments.out))
            file = stack.enter_context(partial.open("w", encoding="utf-8", newline=""))
        sizes = values.embed.batch_size, values.data.max_pixels
        done = run(model, root, files.images, file, matrix, add, *sizes, spreadsheet=arguments.spreadsheet)
        file.flush()  # a full disk is an error before all is said to be well
        skipped, total = len(files.images) - done + len(files.skipped), len(files.images) + len(files.skipped)
        most = values.data.max_skipped if arguments.max_skipped is None else arguments.max_skipped
        if skipped > most * total:
            raise DataError(
                f"expected at most {most:g} of the images to be skipped (data.max_skipped), got {skipped} of {total}; "
                "see the reasons above, or give --max-skipped"
            )
    say(f"{done} images assigned, {skipped} skipped, {files.ignored} other files ignored", file=sys.stderr)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tasks.assign", description="Assign images to clusters.")
    parser.add_argument("path", type=Path, help="an image, or a folder of images")
    parser.add_argument("--encoder", required=True, help="an encoder of params.yaml whose clusters are made")
    parser.add_argument("--out", type=Path, help="write the table here (CSV)")
    parser.add_argument(
        "--spreadsheet", action="store_true", help="an apostrophe before cells that a spreadsheet would compute"
    )
    parser.add_argument("--embeddings", type=Path, help="write the embeddings here (.npy), rows as in the table")
    parser.add_argument("--export", type=Path, help="a new folder: the images, one folder a cluster")
    parser.add_argument("--overwrite", action="store_true", help="replace what --out and --embeddings name")
    parser.add_argument("--max-skipped", type=float, help="fraction in place of data.max_skipped, from 0 to 1")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--copy", action="store_true", help="with --export: copy the images (the default)")
    how.add_argument("--link", action="store_true", help="with --export: symbolic links to the images")
    arguments = parser.parse_args()
    if (arguments.copy or arguments.link) and not arguments.export:
        parser.error("expected --export FOLDER with --copy or --link, got none; add it")
    return arguments


def find(path: Path, follow_links: bool) -> tuple[Path, finding.Files]:
    """A folder and what lies in it, or a file's folder and that file alone; what is skipped is named on stderr.

    Raises:
        DataError: If there is no image.
    """
    if path.is_file():
        root, files = path.parent, finding.Files()
        files.add(path.name, formats.of(str(path)))
    else:
        root, files = path, finding.images(path, follow_links)
    files.skip_stacks("NumPy stack, which only prepare reads: save its images as PNG or TIFF")
    for warning in files.warnings:
        warn(warning)
    for item in files.skipped:
        say(f"skipped {item['path']}: {item['reason']}", file=sys.stderr)
    if not files.images:
        raise DataError(
            f"expected images in {path}, found none: {len(files.skipped)} skipped and {files.ignored} other files; "
            "check the path"
        )
    return root, files


def run(
    model: bundle.Bundle,
    root: Path,
    paths: list[str],
    table: TextIO,
    matrix: npy.RowFile | None,
    add: Callable[[Path, str, str], None] | None,
    batch_size: int,
    max_pixels: int,
    *,
    spreadsheet: bool,
) -> int:
    """Read, embed and assign, a chunk at a time.

    Returns:
        Number of images assigned. Those that can not be read are named on stderr.

    Raises:
        DataError: If none can be read.
    """
    step = max(1, min(batch_size, _CHUNK_BYTES // (model.image_size**2 * model.channels)))
    digits = max(2, len(str(model.clusters.k - 1)))
    columns = ["path", "cluster", "distance", "confidence", *(["class", "probability"] if model.classes else [])]
    writer = tables.Writer(table, columns, spreadsheet=spreadsheet)
    writer.header()
    done = 0
    for names, images in read(model, root, paths, step, max_pixels):
        found = model.assign(images)
        for index, name in enumerate(names):
            cluster = int(found.clusters[index])
            row = {"path": name, "cluster": cluster, "distance": f"{found.distances[index]:.6g}"}
            row["confidence"] = f"{found.confidences[index]:.6g}"
            if found.probabilities is not None:
                best = int(found.probabilities[index].argmax())
                row |= {"class": model.classes[best], "probability": f"{found.probabilities[index, best]:.6g}"}
            writer.add([row])
            if add:
                add(root / name, NO_CLUSTER if cluster < 0 else f"cluster-{cluster:0{digits}}", name)
        if matrix:
            matrix.append(found.features)
        done += len(names)
    if not done:
        raise DataError(f"expected images that can be read in {root}, got none of {len(paths)}; see the reasons above")
    return done


def read(
    model: bundle.Bundle, root: Path, paths: list[str], step: int, max_pixels: int
) -> Iterator[tuple[list[str], NDArray[np.uint8]]]:
    """Chunks of names and images (n, H, W, C) of the files that can be read; the others are named on stderr."""

    shape: Any = {"image_size": model.image_size, "channels": model.channels, "max_pixels": max_pixels}

    def attempt(name: str) -> NDArray[np.uint8] | str:
        try:
            return decode.read_image(root / name, model.reading, **shape)
        except DataError as error:
            return str(error)

    with ThreadPoolExecutor(environment.cores()) as pool:
        for start in range(0, len(paths), step):
            names, images = [], []
            chunk = paths[start : start + step]
            for name, result in zip(chunk, pool.map(attempt, chunk), strict=True):
                if isinstance(result, str):
                    say(f"skipped {name}: {result}", file=sys.stderr)
                else:
                    names.append(name)
                    images.append(result)
            if names:
                yield names, np.stack(images)
