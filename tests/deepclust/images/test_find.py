"""Which files of a folder are images, and what becomes of the others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deepclust.images import find, formats

TIFF = b"II*\0\x08\0\0\0"
FTYP = b"\0\0\0\x18ftyp"


def put(root: Path, *names: str, content: bytes = b"") -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def reasons(files: find.Files) -> dict[str, str]:
    return {item["path"]: item["reason"] for item in files.skipped}


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.JPG", b"", "JPEG"),
        ("a.ome.tif", b"", "TIFF"),
        ("a.avif", b"", "AVIF"),
        ("a.j2k", b"", "JPEG 2000"),
        ("a.NEF", TIFF, "camera raw"),
        ("a.dng", TIFF, "camera raw"),
        ("a.3fr", TIFF, "camera raw"),
        ("a.nii.gz", b"", "NIfTI"),
        ("a.svs", TIFF, "whole slide"),
        ("a.psd", b"", "Photoshop"),
        ("IM0001", bytes(128) + b"DICM", "DICOM"),
        ("1.2.840.113619.2", bytes(128) + b"DICM", "DICOM"),
        ("noname", b"\x89PNG\r\n\x1a\n", "PNG"),
        ("noname", b"\xff\xd8\xff\xe0", "JPEG"),
        ("noname", TIFF, "TIFF"),
        ("noname", TIFF + b"CR\2\0", "camera raw"),
        ("noname", FTYP + b"heic\0\0\0\0mif1heic", "HEIC"),
        ("noname", FTYP + b"mif1\0\0\0\0avifmif1", "AVIF"),
        ("noname", b"BM\x9a\0\0\0\0\0\0\0\x1a\0\0\0" + bytes(20), "BMP"),
        ("noname", b"P5\n3 3\n255\n123456789", "PPM"),
        ("brain.bak", bytes(344) + b"n+1\0", "NIfTI"),
        ("drawing", b'\xef\xbb\xbf<?xml version="1.0"?>\n<svg xmlns="', "SVG"),
        ("film", FTYP + b"isom\0\0\0\0isommp42", None),
        ("README", b"BMI and P5 are words\n", None),
        ("labels.txt", b"P2P\n", None),
        ("DICOMDIR", bytes(128) + b"DICM", None),
        ("Thumbs.db", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", None),
    ],
)
def test_a_file_is_what_its_suffix_says_and_without_one_what_it_begins_with(
    tmp_path: Path, name: str, content: bytes, expected: str | None
) -> None:
    found = formats.of(str(put(tmp_path, name, content=content) / name))
    assert (found.name if found else None) == expected


def test_known_images_without_a_reader_are_skipped_with_the_remedy_and_files_without_suffix_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, "a.cr2", "b.HEIC", "c.exr", "notes.txt", "d.webp", "e.dcm")
    Image.new("L", (4, 4)).save(tmp_path / "bare", "PNG")
    monkeypatch.setattr(formats, "_is_installed", lambda module: module in ("PIL", "numpy"))
    files = find.images(tmp_path)
    assert (files.images, files.ignored) == (["bare", "d.webp"], 1)
    assert reasons(files) == {
        "a.cr2": "camera raw: develop it to TIFF or JPEG",
        "b.HEIC": "HEIC: install deepclust[heic], or convert it to JPEG",
        "c.exr": "OpenEXR: convert it to TIFF",
        "e.dcm": "DICOM: install deepclust[dicom], or convert it to PNG",
    }


def test_folders_of_the_system_are_not_entered_and_their_images_counted(tmp_path: Path) -> None:
    put(tmp_path, "cat/1.jpg", "cat/@eaDir/1.jpg/SYNOPHOTO_THUMB_M.jpg", "dog/@EADIR/2.jpg/SYNOFILE_THUMB_S.png")
    put(
        tmp_path, "#recycle/old.jpg", "#recycle/old.txt", "__MACOSX/cat/._1.jpg", "lost+found/x", "lost and found/3.jpg"
    )
    files = find.images(tmp_path)
    assert (files.images, files.ignored, files.skipped) == (["cat/1.jpg", "lost and found/3.jpg"], 3, [])
    assert files.warnings == ["ignored images in folders of a NAS or desktop: 1 in #recycle, 1 in @EADIR, 1 in @eaDir"]


def test_stacks_are_listed_and_beside_image_files_skipped_but_tables_of_numbers_are_no_images(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", train_images=np.zeros((5, 4, 4), np.uint8), train_labels=np.zeros((5, 1), int))
    np.save(tmp_path / "b.npy", np.zeros((5, 4, 4, 3), np.uint8))
    np.save(tmp_path / "features.npy", np.zeros((5, 128), np.float32))
    np.savez(tmp_path / "labels.npz", labels=np.array(["x"], object))
    files = find.images(tmp_path)
    assert (files.images, files.stacks, files.ignored, files.skipped) == ([], ["a.npz", "b.npy"], 2, [])
    put(tmp_path, "sub/1.png")
    files = find.images(tmp_path)
    assert (files.images, files.stacks, files.ignored) == (["sub/1.png"], [], 2)
    reason = "NumPy stack beside image files: move it into a folder of its own"
    assert reasons(files) == {"a.npz": reason, "b.npy": reason}


def test_links_out_of_the_folder_are_taken_if_asked_for_each_real_folder_once(tmp_path: Path) -> None:
    store = put(tmp_path / "store", "md5/ab/cdef", "cats/1.png", "cats/kitten/2.png", "secret.txt")
    data = put(tmp_path / "data", "real/3.png")
    for link, target in {
        "blob.png": store / "md5/ab/cdef",  # as DVC links to its cache
        "b": store / "cats",
        "a": store / "cats",
        "again": data / "real",
        "real/up": data,
        "parent": tmp_path,
        "gone.png": store / "none",
        "circle.png": data / "circle.png",
        "notes.txt": store / "secret.txt",
    }.items():
        (data / link).symlink_to(target)
    files = find.images(data, follow_links=True)
    assert files.images == ["a/1.png", "a/kitten/2.png", "blob.png", "real/3.png"]
    # `parent` leads to all of it anew: only what has no other path is taken there.
    same = "the same folder as another one"
    assert reasons(files) == {
        **dict.fromkeys(("again", "b", "parent/data", "parent/store/cats", "real/up"), same),
        **dict.fromkeys(("circle.png", "gone.png"), "a broken link"),
    }
    assert files.linked == ["a", "parent"]
    assert "behind links to folders (a, parent); after a change, run dvc repro -f" in files.warnings_of_stage()[0]
    refused = find.images(data)
    assert refused.images == ["real/3.png"]
    leaves = "a link that leaves the folder; data.follow_links: true would take it"
    assert {path for path, reason in reasons(refused).items() if reason == leaves} == {"a", "b", "blob.png", "parent"}
