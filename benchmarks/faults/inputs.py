"""Faults of what users give: parameters, folders, names, image files, tables of labels, arguments and outputs."""

from __future__ import annotations

import io
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.faults.cases import ANSWER, DONE, EITHER, LINE, SPOILT, Case, Ended, Reference
from benchmarks.faults.damage import broken_link, empty, folder, junk, link, link_loop, missing, put
from benchmarks.faults.workspace import ENCODER, NEW

PARAMS = Path("params.yaml")
SHELL = f"touch {SPOILT}"


# Parameters.


def _lines(pattern: str, replacement: str) -> Callable[[], None]:
    """Replace what a pattern finds in params.yaml, which has to be there."""

    def make() -> None:
        text = PARAMS.read_text(encoding="utf-8")
        changed, count = re.subn(pattern, lambda _: replacement, text, count=1, flags=re.MULTILINE)
        assert count, pattern
        put(PARAMS, changed)

    return make


def key(name: str, value: str, section: str = "") -> Callable[[], None]:
    """Give a key another value, in YAML; the first key of that name after the section's line."""
    start = rf"(?<=\n){re.escape(section)}:[\s\S]*?\n" if section else ""

    def make() -> None:
        text = "\n" + PARAMS.read_text(encoding="utf-8")
        found = re.search(rf"{start}?(?P<line> *{name}: .*)$" if section else rf"^(?P<line>{name}: .*)$", text, re.M)
        assert found, name
        line = found["line"]
        indent = line[: len(line) - len(line.lstrip())]
        put(PARAMS, text[1 : found.start("line")] + f"{indent}{name}: {value}" + text[found.end("line") :])

    return make


def _content(value: bytes | str) -> Callable[[], None]:
    return lambda: put(PARAMS, value)


def _more(text: str) -> Callable[[], None]:
    return lambda: put(PARAMS, PARAMS.read_text(encoding="utf-8") + text)


def _bomb(depth: int) -> str:
    """Aliases that stand for 10^depth texts."""
    lines = ["bomb0: &b0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"bomb{n}: &b{n} [{', '.join([f'*b{n - 1}'] * 10)}]" for n in range(1, depth)]
    return "\n" + "\n".join(lines) + "\n"


# The whole file: every command that reads it says so.
FILE: Mapping[str, Callable[[], Any]] = {
    "is empty": _content(""),
    "is a list": _content("- seed\n- 0\n"),
    "is a text": _content("seed"),
    "is null": _content("null\n"),
    "is not UTF-8": lambda: put(PARAMS, PARAMS.read_bytes() + b"# \xff\xfe\n"),
    "is UTF-16 without a mark": lambda: put(PARAMS, PARAMS.read_text(encoding="utf-8").encode("utf-16-le")),
    "has NUL bytes": _more("\0\0"),
    "has a bracket too many": _more("\nembed: [1, 2\n"),
    "has a key twice": _more("\nseed: 1\n"),
    "names a Python object": _more("\nextra: !!python/object/apply:os.getpid []\n"),
    "refers to itself": _more("\nextra: &a [*a]\n"),
    "has aliases for 10^7 texts": _more(_bomb(7)),
    "is nested 5,000 deep": _more("\nextra: " + "[" * 5000 + "]" * 5000 + "\n"),
    "is nested 2,000 blocks deep": _more("\nextra:\n" + "".join(" " * (n + 1) + "a:\n" for n in range(2000))),
    "is missing": lambda: missing(PARAMS),
    "is a folder": lambda: folder(PARAMS),
    "is a broken link": lambda: broken_link(PARAMS),
    "is a link loop": lambda: link_loop(PARAMS),
    "is junk": lambda: junk(PARAMS),
}
_FILE_READERS = "check show migrate overrides prepare embed assign report prune flow"
# A value, which every command refuses.
VALUES: Mapping[str, Callable[[], Any]] = {
    "unknown section": _more("\nextra: 1\n"),
    "seed: text": key("seed", "abc"),
    "seed: 10^30": key("seed", str(10**30)),
    "seed: 2^64": key("seed", str(2**64)),
    "seed: -1": key("seed", "-1"),
    "seed: 1.5": key("seed", "1.5"),
    "seed: .nan": key("seed", ".nan"),
    "seed: true": key("seed", "true"),
    "seed: a date": key("seed", "2026-01-05"),
    "encoders: null": key("encoders", "null"),
    "encoders: a list": key("encoders", "[swav]"),
    "encoders: none": key("encoders", "{}"),
    "encoders: a number": key("encoders", "{1: random}"),
    "encoders: a command": key("encoders", f'{{"a; {SHELL}": random}}'),
    "encoders: $()": key("encoders", f'{{"$({SHELL})": random}}'),
    "encoders: backticks": key("encoders", f'{{"`{SHELL}`": random}}'),
    "encoders: a line break": key("encoders", f'{{"a\\n{SHELL}\\n": random}}'),
    "encoders: a way out": key("encoders", "{../../out: random}"),
    "encoders: an option": key("encoders", "{--help: random}"),
    "encoders: a blank": key("encoders", '{"a b": random}'),
    "encoders: no name": key("encoders", '{"": random}'),
    "encoders: a long name": key("encoders", f"{{{'a' * 300}: random}}"),
    "data.source unknown": key("source", "nowhere", "data"),
    "data.test_fraction: 2": key("test_fraction", "2", "data"),
    "data.test_fraction: .nan": key("test_fraction", ".nan", "data"),
    "data.test_fraction: .inf": key("test_fraction", ".inf", "data"),
    "data.max_skipped: -1": key("max_skipped", "-1", "data"),
    "data.max_pixels: 0": key("max_pixels", "0", "data"),
    "data.white: text": key("white", "bright", "data"),
    "data.pages: -1": key("pages", "-1", "data"),
    "data.bands: two": key("bands", "[0, 1]", "data"),
    "data.folder: a list": key("folder", "[images]", "data"),
    "data.folder: null": key("folder", "null", "data"),
    "cluster.k: 0": key("k", "0", "cluster"),
    "cluster.seeds: 0": key("seeds", "0", "cluster"),
    "cluster.algorithms: none": key("algorithms", "[]", "cluster"),
    "cluster.primary unknown": key("primary", "ward", "cluster"),
    "cluster.k: words": key("k", "many", "cluster"),
    "cluster.reject: all": key("reject", "1.0", "cluster"),
    "cluster.normalise: a number": key("normalise", "7", "cluster"),
    "embed.batch_size: -5": key("batch_size", "-5", "embed"),
    "linear.neighbours: none": key("neighbours", "[]", "linear"),
    "linear.temperatures: .nan": key("temperatures", "[.nan]", "linear"),
    "linear.iterations: text": key("iterations", "many", "linear"),
    "report.map_images: 0": key("map_images", "0", "report"),
    "adapt.severities: 9": key("severities", "[9]", "adapt"),
    "adapt.batch_sizes twice the same": key("batch_sizes", "[16, 16]", "adapt"),
}
_VALUE_READERS = "check overrides prepare embed report assign flow"
# A value of a section that `prepare` has no business with.
SECTIONS: Mapping[str, Callable[[], Any]] = {
    "encoders: an unknown method": key("encoders", "{swav: magic}"),
    "encoders: no section": key("encoders", "{nobody: random}"),
    "pretrain.swav.epochs: 0": key("epochs", "0", "  swav"),
    "pretrain.swav.epochs: text": key("epochs", "many", "  swav"),
    "pretrain.swav.temperature: .nan": key("temperature", ".nan", "  swav"),
    "pretrain.swav.temperature: .inf": key("temperature", ".inf", "  swav"),
    "pretrain.swav.epsilon: 0": key("epsilon", "0", "  swav"),
    "pretrain.swav.prototypes: -5": key("prototypes", "-5", "  swav"),
    "pretrain.swav.assign_crops: a third": key("assign_crops", "[0, 9]", "  swav"),
    "pretrain.swav: an unknown key": _lines(r"^    temperature: ", "    temprature: 0.1\n    temperature: "),
    "pretrain.shared.backbone unknown": key("backbone", "huge", "  shared"),
    "pretrain.shared.backbone: a path": key("backbone", "timm/../../x", "  shared"),
    "pretrain.shared.image_size: 0": key("image_size", "0", "  shared"),
    "pretrain.shared.image_size: text": key("image_size", "large", "  shared"),
    "pretrain.shared.image_size: 10^9": key("image_size", str(10**9), "  shared"),
    "pretrain.shared.precision unknown": key("precision", "float7", "  shared"),
    "cluster.engine: an earlier key": key("seeds", "2\n  engine: faiss", "cluster"),
    "cluster.algorithms unknown": key("algorithms", "[kmeens]", "cluster"),
    "cluster.spectral: a list": key("spectral", "[15]", "cluster"),
    "cluster.how_many.least: 1": key("how_many", "{least: 1}", "cluster"),
    "adapt.adapters unknown": key("adapters", "[source, magic]", "adapt"),
    "adapt.corruptions unknown": key("corruptions", "[rain]", "adapt"),
    "adapt.settings unknown": key("settings", "[later]", "adapt"),
    "adapt.t3a: an unknown key": _lines(r"^  t3a: \{", "  t3a: {filter: 1, "),
}
# A value that is fine in itself and does not fit the data.
UNFIT: Mapping[str, tuple[str, Callable[[], Any]]] = {
    "cluster.k: 10^9": ("cluster", key("k", str(10**9), "cluster")),
    "cluster.k: 60": ("cluster", key("k", "60", "cluster")),
    "pretrain.swav.batch_size: 10^9": ("pretrain", key("batch_size", str(10**9), "  swav")),
    "pretrain.swav.prototypes: 10^12": ("pretrain", key("prototypes", str(10**12), "  swav")),
    "data.test_fraction: almost all": ("prepare", key("test_fraction", "0.999999", "data")),
    "data.max_pixels: 1": ("prepare", key("max_pixels", "1", "data")),
    "pretrain.resume: require": ("pretrain", _lines(r"^  resume: \w+", "  resume: require")),
}


def _parameters() -> Iterator[Case]:
    for name, make in FILE.items():
        for command in _FILE_READERS.split():
            yield Case(fault=f"parameters: params.yaml {name}", command=command, make=make, right=_of_file(name))
    for name, make in VALUES.items():
        for command in _VALUE_READERS.split():
            right = ANSWER if name in ("encoders: a long name", "encoders: a list") else LINE
            yield Case(fault=f"parameters: {name}", command=command, make=make, right=right)
    for name, make in SECTIONS.items():
        for command in ("check", "overrides", "prepare", "pretrain", "assign", "flow"):
            right = EITHER if command == "prepare" else LINE
            yield Case(fault=f"parameters: {name}", command=command, make=make, right=right)
    for name, (command, make) in UNFIT.items():
        yield Case(fault=f"parameters: {name}", command=command, make=make)


def _of_file(name: str) -> str:
    return ANSWER if "aliases" in name else LINE


# Folders.

PLACES: Mapping[str, tuple[str, Callable[[], Any]]] = {
    "nothing": ('""', lambda: None),
    "blanks": ('"  "', lambda: None),
    "not there": ("nowhere", lambda: None),
    "~": ("'~'", lambda: None),
    "~nouser": ("~nouser/images", lambda: None),
    "a file": ("params.yaml", lambda: None),
    "an image": ("images/kind0/000.png", lambda: None),
    "a broken link": ("link", lambda: link(Path("link"), "nowhere")),
    "a link loop": ("link", lambda: link(Path("link"), "link")),
    "an empty folder": ("bare", lambda: Path("bare").mkdir()),
    "a command": (f'"x; {SHELL}"', lambda: None),
    "$()": (f'"$({SHELL})"', lambda: None),
    "a line break": ('"a\\nb"', lambda: None),
    "a control character": ('"a\\eb"', lambda: None),
    "NUL": ('"a\\0b"', lambda: None),
    "a name of 5,000 letters": ("a" * 5000, lambda: None),
    "/dev/null": ("/dev/null", lambda: None),
}


def _folders() -> Iterator[Case]:
    for name, (value, before) in PLACES.items():
        for last, section, commands in (("folder", "data", "prepare flow"), ("domains", "adapt", "prepare adapt flow")):

            def make(last: str = last, section: str = section, value: str = value, before: Any = before) -> None:
                before()
                key(last, value, section)()

            for command in commands.split():
                # An empty folder of domains is fine, and one without images is for the stage to find.
                if name != "an empty folder" or (command, last) == ("prepare", "folder"):
                    yield Case(fault=f"folder: {section}.{last} is {name}", command=command, make=make)


# Image files.


def _png(size: tuple[int, int] = (18, 18), mode: str = "RGB", fmt: str = "PNG", **options: Any) -> bytes:
    random = np.random.default_rng(7)
    shape = (size[1], size[0], *([3] if mode == "RGB" else []))
    picture = Image.fromarray(random.integers(0, 255, shape, dtype=np.uint8))
    out = io.BytesIO()
    picture.save(out, fmt, **options)
    return out.getvalue()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _vast_png(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = {b"IHDR": header, b"IDAT": zlib.compress(b"\0" * 64), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks.items())


def _text_bomb() -> bytes:
    """A comment that is 64 MiB when it is unpacked."""
    whole = _png()
    return whole[:33] + _chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(1 << 26))) + whole[33:]


def _tiff_loop() -> bytes:
    """A TIFF whose first page says that the next one is itself."""
    whole = bytearray(_png(fmt="TIFF"))
    offset = struct.unpack("<I", whole[4:8])[0]
    count = struct.unpack("<H", whole[offset : offset + 2])[0]
    end = offset + 2 + 12 * count
    whole[end : end + 4] = struct.pack("<I", offset)
    return bytes(whole)


def _device(path: Path, minor: int) -> None:
    os.mknod(path, 0o600 | 0o020000, os.makedev(1, minor))


# Of each, one file lies among whole ones: it is skipped, named, and changes nothing else.
BAD_IMAGES: Mapping[str, tuple[str, bytes | Callable[[Path], None]]] = {
    "empty": ("bad.png", b""),
    "junk": ("bad.jpg", np.random.default_rng(0).bytes(3000)),
    "a cut PNG": ("bad.png", _png((200, 200))[:900]),
    "a cut JPEG": ("bad.jpg", _png((200, 200), fmt="JPEG")[:300]),
    "a cut TIFF": ("bad.tif", _png((200, 200), fmt="TIFF")[:900]),
    "a cut WebP": ("bad.webp", _png((200, 200), fmt="WEBP")[:300]),
    "a cut GIF": ("bad.gif", _png((64, 64), fmt="GIF")[:100]),
    "a signature alone": ("bad.png", b"\x89PNG\r\n\x1a\n"),
    "text": ("bad.png", b"no image\n"),
    "HTML": ("bad.jpg", b"<html><body>404</body></html>"),
    "said to be 100,000 pixels wide": ("bad.png", _vast_png(100_000, 100_000)),
    "said to be 2^31 pixels wide": ("bad.png", _vast_png(2**31 - 1, 2**31 - 1)),
    "said to be 0 pixels wide": ("bad.png", _vast_png(0, 0)),
    "junk named DICOM": ("bad.dcm", bytes(128) + b"DICM" + b"\xff" * 60),
    "junk named HEIC": ("bad.heic", b"\0\0\0\x18ftypheic" + bytes(40)),
    "junk named JPEG XL": ("bad.jxl", b"\xff\x0a" + bytes(40)),
    "junk named AVIF": ("bad.avif", b"\0\0\0\x18ftypavif" + bytes(40)),
    "junk named JPEG 2000": ("bad.jp2", b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(40)),
    "a NumPy array": ("bad.npy", b"\x93NUMPY\x01\x00" + bytes(60)),
    "a camera's raw file": ("bad.nef", b"II*\0" + bytes(60)),
    "a broken link": ("bad.png", lambda path: path.symlink_to("nowhere")),
    "a link loop": ("bad.png", lambda path: path.symlink_to(path.name)),
    "a link out of the folder": ("bad.png", lambda path: path.symlink_to("/etc/hostname")),
}
# What is neither an image nor a fault: ignored, or read.
ODD_IMAGES: Mapping[str, tuple[str, bytes | Callable[[Path], None]]] = {
    "a PNG named JPEG": ("odd.jpg", _png()),
    "of 16 bits": ("odd.png", lambda path: Image.fromarray(np.arange(324, dtype=np.uint16).reshape(18, 18)).save(path)),
    "with a comment of 64 MiB": ("odd.png", _text_bomb()),
    "a TIFF that is its own next page": ("odd.tif", _tiff_loop()),
    "one pixel": ("odd.png", _png((1, 1))),
    "5,000 pixels wide and one high": ("odd.png", _png((5000, 1))),
    "a folder named as an image": ("odd.png", lambda path: path.mkdir()),
    "a pipe": ("odd.png", os.mkfifo),
    "an endless device": ("odd.png", lambda path: _device(path, 5)),
    "hidden": (".odd.png", b"no image"),
}
NAMES: Mapping[str, str] = {
    "$ $": "a$b$c",
    "maths": "$\\frac{",
    "= ": "=1+1",
    "+ - @": "+-@x",
    "a tab": "a\tb",
    "a line break": "a\nb",
    "an escape": "a\x1b[31mb",
    "a bell and backspaces": "a\x07\b\bb",
    "a change of direction": "a\u202egnp.b",
    "markup": "<b>a&amp;",
    "quotes": "a'b\"c",
    "braces": "{a}{0}%s%n",
    "no UTF-8": "a\udcffb",
    "a command": f"$({SHELL})",
    "a comma": "a,b;c",
    "an option": "--help",
    "a hash": "#a",
    "Markdown": "[a](b)|*c*`d`",
    "200 letters": "ü" * 100,
}


def _images() -> Iterator[Case]:
    places = {"prepare": Path("images/kind0"), "assign": Path(NEW)}
    for command, place in places.items():
        for name, (file, what) in BAD_IMAGES.items():
            yield Case(
                fault=f"image: {name}",
                command=command,
                make=_put(place / file, what),
                right=DONE,
                check=_skipped(command, file),
            )
        for name, (file, what) in ODD_IMAGES.items():
            yield Case(fault=f"image: {name}", command=command, make=_put(place / file, what), right=DONE)
        for name, text in NAMES.items():
            make = _put(place / f"{text}.png", _png())
            yield Case(fault=f"name: an image with {name}", command=command, make=make, right=DONE)


def _put(path: Path, what: bytes | Callable[[Path], None]) -> Callable[[], None]:
    return lambda: put(path, what) if isinstance(what, bytes) else what(path)


def _skipped(command: str, file: str) -> Callable[[Path, Ended, Reference | None], str]:
    def check(work: Path, ended: Ended, reference: Reference | None) -> str:
        assert reference
        if command == "assign":
            if ended.out != reference.out:
                return "the other images' rows are not the same"
            return "" if f"skipped {file}: " in ended.err else f"{file} is not named on stderr"
        arrays = {name: value for name, value in reference.files.items() if name.endswith((".npy", ".csv"))}
        from benchmarks.faults import workspace

        now = workspace.hashes(work, arrays)
        if now != arrays:
            return "the other images are not the same"
        named = (work / "artifacts/prepare/meta.json").read_text(encoding="utf-8")
        return "" if f"/{file}" in named else f"{file} is not named in meta.json"

    return check


def _renamed(text: str) -> Callable[[], None]:
    """The class `kind0` under another name, in every file that names it, and hashes that fit."""

    def make() -> None:
        import csv
        import json

        from benchmarks.faults.damage import sign

        def replaced(value: Any) -> Any:
            if isinstance(value, list):
                return [replaced(item) for item in value]
            if isinstance(value, dict):
                return {key: replaced(item) for key, item in value.items()}
            return text if value == "kind0" else value

        paths = [*Path("artifacts").rglob("meta.json"), *Path("artifacts").rglob("classifier.json")]
        for path in paths:
            path.write_text(json.dumps(replaced(json.loads(path.read_text(encoding="utf-8")))), encoding="utf-8")
        for path in Path("artifacts/prepare").rglob("items.csv"):
            with path.open(encoding="utf-8", newline="") as file:
                rows = [[cell.replace("kind0", text) for cell in row] for row in csv.reader(file)]
            with path.open("w", encoding="utf-8", newline="", errors="surrogateescape") as file:
                csv.writer(file, lineterminator="\n").writerows(rows)
        sign()

    return make


def _classes() -> Iterator[Case]:
    for name, text in NAMES.items():
        if name == "no UTF-8":
            continue  # refused by `prepare`, so that no later stage meets it

        def make(text: str = text) -> None:
            Path("images/kind0").rename(Path("images", text))

        yield Case(fault=f"name: a class with {name}", command="prepare", make=make, right=ANSWER)
        for command in ("cluster", "linear", "adapt", "report", "assign"):
            yield Case(fault=f"name: a class with {name}", command=command, make=_renamed(text), right=ANSWER)


# Tables of labels.

_PATHS = [f"kind{index % 3}/{index:03}.png" for index in range(72)]
_ROWS = "".join(f"{path},{path[:5]}\n" for path in _PATHS)
LABELS: Mapping[str, tuple[str, str | bytes | Callable[[Path], Any]]] = {
    "a folder": (LINE, lambda path: path.mkdir()),
    "a broken link": (LINE, lambda path: path.symlink_to("nowhere")),
    "a link loop": (LINE, lambda path: path.symlink_to(path.name)),
    "a pipe": (LINE, os.mkfifo),
    "empty": (LINE, ""),
    "junk": (LINE, np.random.default_rng(0).bytes(600)),
    "NUL bytes": (LINE, "path,label\n" + _ROWS + "\0\0\0\n"),
    "not UTF-8": (LINE, b"path,label\n" + _ROWS.encode() + b"kind0/\xff.png,a\n"),
    "without a header": (LINE, _ROWS),
    "other columns": (LINE, "a,b\n" + _ROWS),
    "one column": (LINE, "path\n" + "\n".join(_PATHS)),
    "a row twice, alike": (LINE, "path,label\n" + _ROWS + _ROWS[:20].splitlines()[0] + "\n"),
    "a row twice, differently": (LINE, "path,label\n" + _ROWS + f"{_PATHS[0]},other\n"),
    "an unknown file": (LINE, "path,label\n" + _ROWS + "kind0/999.png,kind0\n"),
    "a way out": (LINE, "path,label\n" + _ROWS + "../domains/dark/kind0/000.png,kind0\n"),
    "an absolute path": (LINE, "path,label\n" + _ROWS + "/etc/hostname,kind0\n"),
    "a huge cell": (LINE, "path,label\n" + _ROWS + f"{_PATHS[0]},{'x' * 200_000}\n"),
    "an open quote": (LINE, "path,label\n" + '"' + _ROWS),
    "too few cells": (LINE, "path,label\n" + "\n".join(_PATHS)),
    "the header alone": (DONE, "path,label\n"),
    "semicolons": (DONE, ("path,label\n" + _ROWS).replace(",", ";")),
    "a label for one image": (ANSWER, f"path,label\n{_PATHS[0]},kind0\n"),
    "labels that say none": (DONE, "path,label\n" + "".join(f"{path},nan\n" for path in _PATHS)),
}


def _labels() -> Iterator[Case]:
    for name, (right, what) in LABELS.items():
        path = Path("images/labels.csv")
        make = (
            (lambda what=what, path=path: what(path))
            if callable(what)
            else (lambda what=what, path=path: put(path, what))
        )
        yield Case(fault=f"labels: labels.csv is {name}", command="prepare", make=make, right=right)


# Arguments.


def _arguments() -> Iterator[Case]:
    names = {
        "an unknown encoder": "nobody",
        "a way out": "../swav",
        "a command": f"$({SHELL})",
        "no name": "",
        "another's shared section": "shared",
        "a line break": "a\nb",
    }
    for name, text in names.items():
        for stage in ("pretrain", "embed", "cluster", "linear", "adapt"):
            yield Case(fault=f"argument: {name}", command=stage, argv=[f"tasks.{stage}", text])
        yield Case(fault=f"argument: {name}", command="assign", argv=["tasks.assign", "--encoder", text, NEW])
        yield Case(fault=f"argument: {name}", command="register", argv=["tasks.register", f"--encoder={text}"])
        if name != "no name":
            for option in ("stages", "encoders"):
                argv = ["flows.pipeline", f"--{option}", text]
                yield Case(fault=f"argument: {name} for {option}", command="flow", argv=argv)
    paths: dict[str, tuple[str, Callable[[], Any]]] = {
        "not there": ("nowhere", lambda: None),
        "nothing": ("", lambda: None),
        "~nouser": ("~nouser/x", lambda: None),
        "a text file": ("params.yaml", lambda: None),
        "an empty folder": ("bare", lambda: Path("bare").mkdir()),
        "a broken link": ("link", lambda: link(Path("link"), "nowhere")),
        "a link loop": ("link", lambda: link(Path("link"), "link")),
        "an empty image": ("bad.png", lambda: empty(Path("bad.png"))),
        "a pipe": ("pipe.png", lambda: os.mkfifo("pipe.png")),
        "/dev/null": ("/dev/null", lambda: None),
        "a line break": ("a\nb", lambda: None),
    }
    for name, (text, make) in paths.items():
        argv = ["tasks.assign", "--encoder", ENCODER, text]
        yield Case(fault=f"argument: the path is {name}", command="assign", argv=argv, make=make)
    for text in ("nan", "-1", "2", "many", "1e400"):
        argv = [*_ASSIGN, "--max-skipped", text]
        yield Case(fault=f"argument: --max-skipped {text}", command="assign", argv=argv)
    edits = {
        "no value": "seed",
        "an unknown key": "pretrain.swav.epoch=2",
        "a key below a number": "seed.a=1",
        "an index that is none": "adapt.severities.x=1",
        "an open bracket": "encoders=[a",
        "a command for a name": f"encoders={{'a; {SHELL}': random}}",
        "a way out for a name": "encoders=[../x]",
        "10^30": f"seed={10**30}",
        "nan": "data.test_fraction=.nan",
        "5,000 brackets": "encoders=" + "[" * 5000 + "]" * 5000,
        "nothing": "",
        "no UTF-8": "data.folder=a\udcff",
    }
    for name, text in edits.items():
        yield Case(fault=f"override: {name}", command="overrides", argv=["tasks.overrides", text], check=_untouched)
        flow = ["flows.pipeline", "--override", text]
        yield Case(fault=f"override: {name}", command="flow", argv=flow, check=_untouched)
    for name in ("nowhere.yaml", "images", "dvc.yaml", "artifacts/prepare/images/16/train.npy"):
        argv = ["tasks.params", "apply", name]
        yield Case(fault=f"argument: the recipe is {name}", command="overrides", argv=argv, check=_untouched)


_ASSIGN = ["tasks.assign", "--encoder", ENCODER, NEW]


def _untouched(work: Path, _: Ended, __: Reference | None) -> str:
    text = (work / PARAMS).read_text(encoding="utf-8", errors="replace")
    return "" if "encoders: {pixels: pixels, swav: swav}" in text and "seed: 0\n" in text else "changed"


# Where `assign` writes.


def _fifo() -> None:
    """A pipe, and a process that reads it into a file beside the workspace."""
    os.mkfifo("pipe")
    if not os.fork():
        with open("pipe", "rb") as source:  # noqa: PTH123
            content = source.read()
        Path("../piped").write_bytes(content)
        os._exit(0)


def _piped(work: Path, ended: Ended, reference: Reference | None) -> str:
    import time

    assert reference
    if not (work / "pipe").is_fifo():
        return "the pipe was replaced"
    deadline = time.monotonic() + 5
    got = work.parent / "piped"
    while not got.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    return "" if got.exists() and got.read_text(encoding="utf-8") == reference.out else "the table did not come through"


def _kept(name: str, content: str) -> Callable[[Path, Ended, Reference | None], str]:
    def check(work: Path, *_: Any) -> str:
        now = (work / name).read_text(encoding="utf-8", errors="replace")
        return "" if now == content else f"{name} was overwritten"

    return check


def _outputs() -> Iterator[Case]:
    def of(name: str, *options: str, **more: Any) -> Case:
        return Case(fault=f"output: {name}", command="assign", argv=[*_ASSIGN, *options], **more)

    old = lambda: put(Path("old"), "old")  # noqa: E731
    for option in ("--out", "--embeddings"):
        yield of(f"{option} is there already", option, "old", make=old, check=_kept("old", "old"))
        yield of(f"{option} is a folder", option, "images")
        yield of(f"{option} lies below a file", option, "params.yaml/x")
        yield of(f"{option} is nothing", option, "")
        yield of(f"{option} is one of the images", option, f"{NEW}/000.png")
        yield of(f"{option} is params.yaml", option, "params.yaml", check=_untouched)
        yield of(
            f"{option} is a link to a folder that is not there",
            option,
            "link",
            make=lambda: link(Path("link"), "no/where"),
            right=ANSWER,
            check=lambda work, *_: "" if (work / "link").is_symlink() else "the link was replaced",
        )
        yield of(f"{option} is a link loop", option, "link", make=lambda: link(Path("link"), "link"))
        yield of(f"{option} on a full disk", option, "table", limit=256)
    yield of("--out is a pipe", "--out", "pipe", make=_fifo, right=DONE, check=_piped)
    yield of(
        "--out is a device",
        "--out",
        "device",
        make=lambda: _device(Path("device"), 3),
        right=ANSWER,
        check=lambda work, *_: "" if (work / "device").is_char_device() else "the device was replaced",
    )
    yield of(
        "--out is a link to a new file",
        "--out",
        "link",
        make=lambda: link(Path("link"), "target"),
        right=ANSWER,
        check=lambda work, *_: "" if (work / "link").is_symlink() else "the link was replaced",
    )
    yield of("--out and --embeddings are the same", "--out", "x", "--embeddings", "x")
    yield of("--out and --embeddings are the same by another way", "--out", "x", "--embeddings", "images/../x")
    yield of("--out and --export are the same", "--out", "x", "--export", "x")
    yield of("--export is a folder with files", "--export", "images")
    yield of("--export is the folder of images", "--export", NEW)
    yield of("--export is a file", "--export", "params.yaml")
    yield of("--export is nothing", "--export", "")
    yield of("--link without --export", "--link")
    yield of("--export on a full disk", "--export", "sorted", limit=100)
    for command, argv in (
        ("assign", _ASSIGN),
        ("show", ["tasks.params", "show"]),
        ("check", ["tasks.params", "check"]),
    ):
        yield Case(
            fault="output: standard output is a full disk", command=command, argv=argv, stdout="/dev/full", real=True
        )


def cases() -> Iterator[Case]:
    """All of them."""
    for part in (_parameters, _folders, _images, _classes, _labels, _arguments, _outputs):
        yield from part()
