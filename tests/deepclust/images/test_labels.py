"""Tables of labels as people and spreadsheets write them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from deepclust.errors import DataError
from tests.deepclust.images.test_folders import labelled, load, touch


def read(root: Path, text: str | bytes, name: str = "labels.csv") -> tuple[dict[str, str | None], list[str]]:
    """Labels and warnings of a folder with such a table."""
    (root / name).write_bytes(text.encode() if isinstance(text, str) else text)
    found = load(root)
    return labelled(found), found.warnings


def test_a_table_decides_and_what_it_leaves_open_is_unlabelled_and_counted(tmp_path: Path) -> None:
    touch(tmp_path, "x/1.png", "x/2.png", "y/ü, 3.png", "y/4.png", "5.png")
    text = 'label,path,note\ncat,x/1.png,\n dog ,./x/2.png,\ncat,"y/ü, 3.png",\n,y/4.png,\n'
    expected = {"x/1.png": "cat", "x/2.png": "dog", "y/ü, 3.png": "cat", "y/4.png": None, "5.png": None}
    warning = "labels.csv: 2 of 5 images have no label: not listed (1), empty (1)"
    assert read(tmp_path, text) == (expected, [warning])


LINES = "path,label\nx/1.png,cat\nx/2.png,dog\n"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("labels.csv", LINES),
        ("Labels.CSV", LINES),
        ("labels.csv", LINES.replace(",", ";")),
        ("labels.tsv", LINES.replace(",", "\t")),
        ("labels.csv", "sep=;\n" + LINES.replace(",", ";")),
        ("labels.csv", "\ufeff" + LINES.replace("\n", "\r\n")),
        ("labels.csv", LINES.replace("\n", "\r")),
        ("labels.csv", LINES.replace(",", "\t").encode("utf-16")),
        ("labels.csv", LINES.replace("/", "\\")),
        ("labels.csv", LINES.replace(".png", "")),
        ("labels.csv", LINES + "\n,\n ,\n\n"),
        ("labels.csv", LINES.replace("x/", "folder/x/")),
        ("labels.csv", LINES.replace("x/", "")),  # all images lie in x/
        ("labels.csv", LINES.replace("path,label", " File_Name ,Class")),
        ("labels.csv", "image,width,category\nx/1.png,5,cat\nx/2.png,6,dog\n"),
        ("x/labels.csv", LINES.replace("x/", "")),
        ("x/labels.csv", LINES),
    ],
)
def test_usual_ways_to_write_the_same_table_are_read_alike(tmp_path: Path, name: str, text: str | bytes) -> None:
    root = touch(tmp_path / "folder", "x/1.png", "x/2.png")
    assert read(root, text, name) == ({"x/1.png": "cat", "x/2.png": "dog"}, [])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,kind\n", "expected the columns path and label in its first line, found path, kind; rename or add label"),
        ("", "found nothing; rename or add path and label"),
        ("1.png,cat\n", "found 1.png, cat; rename or add path and label"),
        ("file,image,label\n", "expected one column path, found file and image; call one of them path"),
        (
            "path,label\n1.png,a\nnone.png,a\n2.png,b\nmore.png,b\n",
            "line 3: expected an image of the folder, found no ",
        ),
        ("path,label\n1.png,a\nnone.png,a\nmore.png,b\n", "found no 'none.png', and of 1 more lines (more.png); mend"),
        ("path,label\n../1.png,a\n", "line 2: expected a path inside the folder"),
        ("path,label\n..\\1.png,a\n", "line 2: expected a path inside the folder"),
        ("path,label\nC:\\1.png,a\n", "line 2: expected a path inside the folder"),
        ("path,label\n1.png,a\n./1.png,b\n", "line 3: expected each image once"),
        ("path,label\n1.png,a\n1,b\n", "line 3: expected each image once"),
        ("path,label\n3,a\n", "line 2: expected one image, '3' may be 3.jpg, 3.png; complete it"),
        ("path,label\n1.png\n", "line 2: expected a path and a label"),
        ("path,label\n1.png,cat, dog\n", "line 2: expected 2 columns, got 3; put quotation marks"),
        ('path,label\n1.png,"cat\n', "expected a CSV file in UTF-8, got"),
        (b"path,label\n\xff\xfe,a\n", "expected a CSV file in UTF-8"),
        ("path,label\n1.png,a\n".encode("utf-16-le"), "got bytes that are no text"),
    ],
)
def test_a_table_that_does_not_fit_is_one_line_of_error(tmp_path: Path, text: str | bytes, message: str) -> None:
    touch(tmp_path, "1.png", "2.png", "3.png", "3.jpg")
    with pytest.raises(DataError, match=rf"^[^\n]*{re.escape(message)}[^\n]*$"):
        read(tmp_path, text)


@pytest.mark.parametrize(
    ("labels", "expected", "warning"),
    [
        (
            ["a", "b", "nan", "-1", "None"],
            ["a", "b", None, None, None],
            "3 of 5 images have no label: 'nan' (1), '-1' (1), 'None' (1)",
        ),
        (
            ["a", "b", "?", "N/A", "unlabeled"],
            ["a", "b", None, None, None],
            "have no label: '?' (1), 'N/A' (1), 'unlabeled' (1)",
        ),
        (["a", "b", "NaN", "Null", "unknown"], ["a", "b", None, None, None], "'NaN' (1), 'Null' (1), 'unknown' (1)"),
        (["1", "-1", "1", "-1", "-1"], ["1", "-1", "1", "-1", "-1"], None),  # two classes of their own
        (
            ["1", "1.0", "2", "1", "2"],
            ["1", "1", "2", "1", "2"],
            "labels that are taken as one class: '1' = '1.0'; spell",
        ),
        (["1", "1.0", "unsure", "1", "unsure"], ["1", "1", "unsure", "1", "unsure"], "'1' = '1.0'; spell"),
        (["10", "1_0", "1e1", "2", "2"], ["10", "1_0", "1e1", "2", "2"], None),
        (["9007199254740992", "9007199254740993", "3", "3", "3"],) * 2 + (None,),  # one number as floats
        (["Cat", "cat ", "cat", "dog", "dog"], ["cat", "cat", "cat", "dog", "dog"], "'cat' = 'Cat'; spell them alike"),
        (["hot dog", "Hot  Dog", "x", "x", "x"], ["hot dog", "hot dog", "x", "x", "x"], "'hot dog' = 'Hot  Dog'"),
        (["caf\u00e9", "cafe\u0301", "x", "x", "x"], ["caf\u00e9"] * 2 + ["x"] * 3, "taken as one class"),
    ],
)
def test_spellings_that_mean_none_or_the_same_are_no_classes_of_their_own_and_it_is_said(
    tmp_path: Path, labels: list[str], expected: list[str | None], warning: str | None
) -> None:
    touch(tmp_path, *(f"{index}.png" for index in range(5)))
    lines = [f"{index}.png,{label}" for index, label in enumerate(labels)]
    found, said = read(tmp_path, "\n".join(["path,label", *lines]))
    assert list(found.values()) == expected
    assert len(said) == (warning is not None)
    assert warning is None or warning in said[0]


def test_of_several_tables_one_is_read_and_the_others_are_named(tmp_path: Path) -> None:
    touch(tmp_path, "x/1.png", "y/2.png", "x/labels.tsv")
    (tmp_path / "Labels.tsv").write_text("path\tlabel\n")
    found, said = read(tmp_path, "path,label\nx/1.png,a\ny/2.png,b\n")
    assert found == {"x/1.png": "a", "y/2.png": "b"}
    assert len(said) == 1
    assert said[0].startswith("not used beside labels.csv: Labels.tsv, x/labels.tsv; put all labels into one table")


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (Path.mkdir, "a folder"),
        (lambda path: path.symlink_to("nowhere"), "a broken link"),
        (lambda path: path.symlink_to(path.name), "a broken link"),
        (os.mkfifo, "no file"),
    ],
)
def test_a_table_that_is_no_file_is_one_line_and_nobody_waits_for_a_pipe(
    tmp_path: Path, make: Callable[[Path], None], found: str
) -> None:
    touch(tmp_path, "x/1.png", "x/2.png")
    make(tmp_path / "labels.csv")
    with pytest.raises(DataError, match=rf"^labels\.csv: expected a table, got {found}; replace or remove [^\n]*$"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["label.csv", "Labels.xlsx", "labels.csv.txt"])
def test_a_table_under_nearly_the_right_name_is_no_silent_loss_of_labels(tmp_path: Path, name: str) -> None:
    touch(tmp_path, "1.png", "2.png")
    text = "path,label\n1.png,a\n2.png,b\n"
    found, said = read(tmp_path, text, name)
    assert set(found.values()) == {None}
    assert said == [f"not read as a table of labels: {name}; save it as labels.csv"]
    assert read(tmp_path, text) == ({"1.png": "a", "2.png": "b"}, [])
