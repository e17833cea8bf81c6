"""The credential of this workspace's Prefect servers: whoever does not hold it is refused. See docs/security.md."""

from __future__ import annotations

import base64
import contextlib
import os
import secrets
import stat
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

from tasks.shared.operations.lock import locked
from tasks.shared.operations.processes.dvc_runner import StageError

HOME = Path(".prefect")  # PREFECT_HOME of the servers that are started here: the runs of this workspace
FILE = HOME / "auth"


def credential() -> str:
    """The string that this workspace's servers ask for, `user:password`; the first call makes it.

    Raises:
        StageError: If the file that holds it is not a file of this user's that nobody else can read.
    """
    with locked("credential"):
        if not os.path.lexists(FILE):
            _make()
        return _read()


def server_environment(url: str) -> dict[str, str]:
    """What a server of this workspace at `url` (`…/api`) is started with: it refuses strangers and other pages.

    A page is the server's own under both names of the loopback device.
    """
    port = urlsplit(url).port
    return {
        "PREFECT_HOME": str(HOME.resolve()),
        "PREFECT_SERVER_API_AUTH_STRING": credential(),
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS": f"http://127.0.0.1:{port},http://localhost:{port}",
    }


def authorization(auth: str) -> str:
    """The header `Authorization` of a request by who holds the string."""
    return "Basic " + base64.b64encode(auth.encode()).decode()


def _make() -> None:
    """Write the file whole or not at all, never readable by others, not even for a moment."""
    HOME.mkdir(mode=0o700, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=HOME)  # O_EXCL, mode 0600
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(f"deepclust:{secrets.token_urlsafe(32)}\n")
        Path(name).replace(FILE)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(name).unlink()
        raise


def _read() -> str:
    try:
        # A link is not followed, and a pipe is not waited for.
        descriptor = os.open(FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise _unfit(error.strerror or "an error") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.getuid():
            raise _unfit("something else")
        if stat.S_IMODE(status.st_mode) & 0o077:
            raise _unfit(f"mode {stat.S_IMODE(status.st_mode):04o}, by which others may have read it")
        user, _, password = os.read(descriptor, 1000).decode("utf-8", "replace").strip().partition(":")
    finally:
        os.close(descriptor)
    if not user or len(password) < 20 or not password.isascii() or not password.isprintable():
        raise _unfit("no `user:password` of 20 characters or more")
    return f"{user}:{password}"


def _unfit(got: str) -> StageError:
    return StageError(
        f"expected {FILE} to be a file of yours with mode 0600 that holds Prefect's auth string, got {got}; "
        f"remove it: the next start makes a new one"
    )
