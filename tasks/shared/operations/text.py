"""Text that comes from data, names and addresses, made fit to be printed: all lines about them are printed here."""

from __future__ import annotations

import re
import sys
import traceback
import unicodedata
from types import TracebackType
from typing import TextIO

# What stands between scheme and host of an address: user and password, in which SQLAlchemy allows a slash, or a token.
_USER = re.compile(r"(?<=://)(?:[^\s/?#:@]*:\S*|[^\s/?#]*)@")
# The values of parameters that are secrets.
_SECRET = re.compile(r"(?i)(?<=[?&])([\w-]*(?:password|passwd|pwd|token|secret|key|sig(?:nature)?)=)[^\s&#]+")


def printable(text: str) -> str:
    """The text with characters that control a terminal, or reorder what it shows, as escapes such as `\\x1b`.

    Line breaks are escaped too: what is printed of data is never more than one line.
    """
    return text if text.isprintable() else "".join(_escape(char) if _controls(char) else char for char in text)


def masked(text: str) -> str:
    """The text with user, password and tokens of every address in it replaced by `***`."""
    return _SECRET.sub(r"\1***", _USER.sub("***@", text))


def safe(text: str) -> str:
    """A line that neither controls a terminal nor shows a password."""
    return printable(masked(text))


def safe_lines(text: str) -> str:
    """The same for a text of several lines, which we wrote as such."""
    return "\n".join(map(safe, text.split("\n")))


def say(*lines: str, file: TextIO | None = None) -> None:
    """Print each line, safe, at once; to stdout by default."""
    print(*map(safe, lines), sep="\n", file=file, flush=True)


def warn(line: str) -> None:
    """Print a warning to stderr."""
    say(f"warning: {line}", file=sys.stderr)


def show_traceback(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    """Print a traceback to stderr, as `sys.excepthook`."""
    print(safe_lines("".join(traceback.format_exception(kind, error, where))), end="", file=sys.stderr)


def _controls(char: str) -> bool:
    """Control, format and surrogate characters, and separators of lines; but not the joiners, which scripts need."""
    return unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp") and char not in "\u200c\u200d"


def _escape(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")
