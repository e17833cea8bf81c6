"""Runs one stage through DVC's Python API: its command line says only in sentences what came of the stage.

python repro.py STAGE run|force

A child process of the flow (dvc_runner.py), so that stopping it stops the stage. The exit status is one of `WHAT`, or 1
after a line that begins with `ERROR: `.
"""

from __future__ import annotations

import io
import logging
import sys
import time

WHAT = {0: "run", 10: "unchanged", 11: "restored"}
_ATTEMPTS = 60  # of getting the lock for files that another DVC process works on


def main(stage: str, *, force: bool) -> int:
    """Bring a stage up to date; the exit status."""
    from dvc import cli
    from dvc.exceptions import DvcException
    from dvc.lock import LockError

    log = io.StringIO()  # DVC logs here when it starts the stage's command
    logging.getLogger("dvc.stage.run").addHandler(logging.StreamHandler(log))
    logging.getLogger("dvc.dvcfile").setLevel(logging.WARNING)
    # The command's options are the public way to wait for the repository's lock as long as it takes.
    options = cli.parse_args(["--wait-for-lock", "repro"])
    attempts = 0
    while True:
        attempts += 1
        try:
            with options.func(options).repo as repo:
                repo.scm_context.quiet = True
                changed = repo.reproduce(stage, single_item=True, force=force)
        except DvcException as error:
            if isinstance(error.__cause__ or error, LockError) and attempts < _ATTEMPTS:
                time.sleep(1)
                continue
            print("ERROR:", in_one_line(error))
            return 1
        return 0 if log.getvalue() else 11 if changed else 10


def in_one_line(error: BaseException) -> str:
    """An error's message and those of its causes."""
    causes = [error]
    while cause := causes[-1].__cause__:
        causes.append(cause)
    return " ".join(": ".join(str(cause) for cause in causes).split())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], force=sys.argv[2] == "force"))
