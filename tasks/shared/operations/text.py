"""Text that comes from data, names and addresses, made fit to be printed."""

from __future__ import annotations

import re
import unicodedata

# What stands between scheme and host of an address before an `@`, and the values of parameters that are secrets.
_USER = re.compile(r"(?<=://)[^\s/?#]*@")
_SECRET = re.compile(r"(?i)(?<=[?&])([\w-]*(?:password|passwd|pwd|token|secret|key|sig(?:nature)?)=)[^\s&#]+")


def printable(text: str) -> str:
    """The text with characters that control a terminal, or reorder what it shows, as escapes such as `\\x1b`.

    Line breaks are escaped too: what is printed of data is never more than one line.
    """
    return "".join(_escape(char) if _controls(char) else char for char in text)


def masked(text: str) -> str:
    """The text with user, password and tokens of every address in it replaced by `***`."""
    return _SECRET.sub(r"\1***", _USER.sub("***@", text))


def _controls(char: str) -> bool:
    """Control, format and surrogate characters, and separators of lines; but not the joiners, which scripts need."""
    return unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp") and char not in "\u200c\u200d"


def _escape(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")
