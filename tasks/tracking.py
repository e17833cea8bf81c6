"""Deliver to MLflow what runs logged while the tracking server did not answer.

python -m tasks.tracking sync
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

from tasks.shared.operations import outbox, store, tracking
from tasks.shared.operations.messages import errors_as_one_line
from tasks.shared.operations.text import say


def main() -> None:
    """Deliver every file under state/tracking/, in one line each; status 1 if one that could be sent stays."""
    parser = argparse.ArgumentParser(prog="python -m tasks.tracking", description=__doc__.partition("\n")[0])
    parser.add_argument("command", choices=["sync"])
    parser.parse_args()
    with errors_as_one_line():
        if not store.enabled():
            say(f"tracking is off ({store.SWITCH}), nothing is delivered")
            return
        send = partial(tracking.send, tracking.connect()[0])
        with store.errors():
            found = []
            for line, delivered in outbox.deliver(send):
                say(line)
                found.append(delivered)
        running = outbox.in_use()
        for path in running:
            say(f"{path} is of a run that goes on and delivers it itself")
        if not found and not running:
            say("nothing is left to deliver")
    sys.exit(0 if all(found) else 1)


if __name__ == "__main__":
    main()
