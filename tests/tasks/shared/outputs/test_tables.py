"""Tables keep every name as it is; those for spreadsheets hold no formulas."""

from __future__ import annotations

import csv
import io

import pytest

from tasks.shared.outputs import stage, tables

NAMES = ["a\nb", "a\rb", "a\r\nb", "\r", 'a"b,c', "=1+1", "é 猫", "\x1b[2J", " a ", "'"]


def test_every_name_comes_back_and_lines_end_in_one_way() -> None:
    text = stage.table([{"n": 0.12345678, "name": name} for name in NAMES], ["name", "n"])
    assert [row["name"] for row in csv.DictReader(io.StringIO(text, newline=""))] == NAMES
    assert stage.table([{"a": "x", "b": -1.5}], ["a", "b"]) == "a,b\nx,-1.5\n"


@pytest.mark.parametrize(
    ("cell", "shown"),
    [
        *[(f"{sign}1+1", f"'{sign}1+1") for sign in "=+-@\t\r\n＝＋－＠"],
        *[(number, number) for number in ("-1.5", "+2", "-1e-05", "0")],
        *[(text, text) for text in ("a=1", "1-2", "'=1", "")],
        ("-", "'-"),
        ("-1.5\n", "'-1.5\n"),
    ],
)
def test_a_spreadsheet_gets_an_apostrophe_before_what_it_would_compute(cell: str, shown: str) -> None:
    file = io.StringIO()
    tables.Writer(file, ["x"], spreadsheet=True).add([{"x": cell}])
    (found,) = csv.reader(io.StringIO(file.getvalue(), newline=""))
    assert found == [shown]
