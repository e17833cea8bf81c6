"""Text from outside can neither control a terminal nor show a password."""

import pytest

from tasks.shared.operations.text import masked, printable


def test_what_controls_a_terminal_is_shown_as_escapes_and_all_else_stays() -> None:
    assert printable("a\x1b[2J\r\n\x9b\u202eb\u2028\udcff") == r"a\x1b[2J\r\n\x9b\u202eb\u2028\udcff"
    assert printable("Größe 猫 e\u0301 می\u200cخواهم \\n") == "Größe 猫 e\u0301 می\u200cخواهم \\n"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("no store at http://ann:s3cr:et@host:5000/api?x=1", "no store at http://***@host:5000/api?x=1"),
        ("postgresql+psycopg2://u:p@ss/w@db/x", "postgresql+psycopg2://***@ss/w@db/x"),
        ("two: https://t0ken@a/b, s3://k:v@c", "two: https://***@a/b, s3://***@c"),
        ("https://h/p?a=1&api_token=abc&b=2", "https://h/p?a=1&api_token=***&b=2"),
        ("mail a@b.c, sqlite:////x/mlflow.db", "mail a@b.c, sqlite:////x/mlflow.db"),
    ],
)
def test_no_password_or_token_of_an_address_is_shown(text: str, shown: str) -> None:
    assert masked(text) == shown
