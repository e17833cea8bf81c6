"""Text from outside can neither control a terminal nor show a password."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException

from tasks.shared.operations import store
from tasks.shared.operations.text import masked, printable, safe_lines
from tests.paths import ROOT

SECRET = "s3cr3t"


def test_what_controls_a_terminal_is_shown_as_escapes_and_all_else_stays() -> None:
    assert printable("a\x1b[2J\r\n\x9b\u202eb\u2028\udcff") == r"a\x1b[2J\r\n\x9b\u202eb\u2028\udcff"
    assert printable("Größe 猫 e\u0301 می\u200cخواهم \\n") == "Größe 猫 e\u0301 می\u200cخواهم \\n"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("no store at http://ann:s3cr:et@host:5000/api?x=1", "no store at http://***@host:5000/api?x=1"),
        ("postgresql+psycopg2://u:p@s?s/w#@db/x", "postgresql+psycopg2://***@db/x"),
        ("http://h:5000/#/x http://***@h:5000", "http://h:5000/#/x http://***@h:5000"),
        ("two: https://t0ken@a/b, s3://k:v@c", "two: https://***@a/b, s3://***@c"),
        ("https://h/p?a=1&api_token=abc&b=2", "https://h/p?a=1&api_token=***&b=2"),
        ("mail a@b.c, sqlite:////x/mlflow.db", "mail a@b.c, sqlite:////x/mlflow.db"),
    ],
)
def test_no_password_or_token_of_an_address_is_shown(text: str, shown: str) -> None:
    assert masked(text) == shown


def test_half_an_address_is_masked_too_and_lines_of_ours_stay_lines() -> None:
    failure = MlflowException(f"{'x' * 280} http://ann:{SECRET}-longer@host failed")
    assert SECRET not in store.line(failure)
    assert len(store.line(failure)) == 300
    assert safe_lines("a\tb\n  | http://t@h\x07") == "a\\tb\n  | http://***@h\\x07"


def ended(root: Path, *command: str, **environment: str) -> tuple[int, str]:
    """Exit status and output of a command in a folder."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW", "DEEPCLUST", "PREFECT"))
    }
    kept |= {"PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(
        [sys.executable, *command], cwd=root, env=kept, text=True, capture_output=True, timeout=120, check=False
    )
    return done.returncode, done.stdout + done.stderr


_CONNECT = """
from tasks.shared.operations import messages, tracking
with messages.errors_as_one_line():
    tracking.connect()
"""


@pytest.mark.parametrize(
    ("variable", "command"),
    [("MLFLOW_TRACKING_URI", ("-c", _CONNECT)), ("PREFECT_API_URL", ("-m", "flows.serve"))],
    ids=["mlflow", "prefect"],
)
def test_a_server_that_is_not_there_is_named_without_its_password(
    variable: str, command: tuple[str, str], tmp_path: Path
) -> None:
    status, said = ended(tmp_path, *command, **{variable: f"http://ann:{SECRET}@127.0.0.2:1/api"})
    assert status == 2
    assert said.count("\n") == 1
    assert "http://***@127.0.0.2:1/api" in said
    assert SECRET not in said


def test_no_password_is_printed_with_a_traceback_or_stored_with_a_run(empty_store: Path, tmp_path: Path) -> None:
    shutil.copy(ROOT / "params.yaml", tmp_path)
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    code = f"""
from tasks.shared.operations import messages, params, tracking
address = "http://ann:{SECRET}@host/\x1b[31m"
with messages.errors_as_one_line(), tracking.stage_run("embed", "swav", params.load()) as run:
    run.log_params({{"data.folder": address}})
    run.set_tags({{"note": address}})
    raise RuntimeError(address)
""".replace(SECRET, f'{SECRET[:3]}" + "{SECRET[3:]}')  # the traceback shows the line that raises
    status, said = ended(tmp_path, "-c", code)
    assert status == 1
    assert said.rstrip().endswith("RuntimeError: http://***@host/\\x1b[31m")
    assert SECRET not in said
    stored = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert stored.count(b"http://***@host/") >= 3
    assert SECRET.encode() not in stored
