"""Tables as CSV: for programs, with all names as they are, or for spreadsheets, where no cell is a formula.

A spreadsheet computes a cell that begins with one of `= + - @`, a tab or a line break, or with the first four in full
width, although it is only the name of a file. There such a cell gets an apostrophe in front, unless it is a number
(https://owasp.org/www-community/attacks/CSV_Injection).
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TextIO

_FORMULA = tuple("=+-@\t\r\n＝＋－＠")
_NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?")


class Writer:
    """Writes rows.

    Args:
        file: Opened with `newline=""`.
        columns: Names of the columns.
        spreadsheet: Whether a spreadsheet is to open it.
    """

    def __init__(self, file: TextIO, columns: Sequence[str], *, spreadsheet: bool = False) -> None:
        # The writer quotes a cell only for the line breaks that end its rows, and the reader breaks lines at all.
        self._rows = csv.DictWriter(_LineFeeds(file), columns, lineterminator="\r\n")
        self._spreadsheet = spreadsheet

    def header(self) -> None:
        """Write the names of the columns."""
        self._rows.writeheader()

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write rows; a column that a row lacks is blank."""
        for row in rows:
            self._rows.writerow(
                {name: no_formula(str(cell)) for name, cell in row.items()} if self._spreadsheet else row
            )


def no_formula(cell: str) -> str:
    """A cell that a spreadsheet shows as it is."""
    return f"'{cell}" if cell.startswith(_FORMULA) and not _NUMBER.fullmatch(cell) else cell


class _LineFeeds:
    """Ends rows by a line feed alone."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, row: str) -> int:
        return self._file.write(row.removesuffix("\r\n") + "\n")
