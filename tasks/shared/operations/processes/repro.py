"""Runs one stage through DVC's Python API: its command line says only in sentences what came of the stage.

python repro.py STAGE run|force

A child process of the flow (dvc_runner.py), so that stopping it stops the stage. The exit status is one of `WHAT`, or 1
after a line that begins with `ERROR: `.
"""

from __future__ import annotations

import logging
import sys
import time

WHAT = {0: "run", 10: "unchanged", 11: "restored"}
_PATIENCE = 60.0  # seconds to wait for another DVC process that works on the same files


def main(stage: str, *, force: bool) -> int:
    """Bring a stage up to date; the exit status."""
    from dvc import cli
    from dvc.exceptions import DvcException
    from dvc.lock import LockError

    started: list[logging.LogRecord] = []  # what DVC logs when it starts the stage's command
    logging.getLogger("dvc.stage.run").addFilter(lambda record: started.append(record) or True)
    logging.getLogger("dvc.dvcfile").setLevel(logging.WARNING)
    # The command's options are the public way to wait for the repository's lock as long as it takes.
    options = cli.parse_args(["--wait-for-lock", "repro"])
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            with options.func(options).repo as repo:
                repo.scm_context.quiet = True
                changed = repo.reproduce(stage, single_item=True, force=force)
        except DvcException as error:
            if isinstance(error.__cause__ or error, LockError) and time.monotonic() < deadline:
                time.sleep(1)
                continue
            print("ERROR:", in_one_line(error))
            return 1
        return 0 if started else 11 if changed else 10


def in_one_line(error: BaseException) -> str:
    causes = [error]
    while cause := causes[-1].__cause__:
        causes.append(cause)
    return " ".join(": ".join(str(cause) for cause in causes).split())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], force=sys.argv[2] == "force"))
