"""A user's mistake is one line in place of a traceback."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from deepclust.errors import DeepclustError, PreemptedError
from tasks.shared.operations.processes import launcher, preemption
from tasks.shared.operations.text import show_traceback

# torch has a type of its own for a GPU's memory only.
_OUT_OF_MEMORY = re.compile(r"can't allocate memory|CUDA out of memory|not enough memory")


@contextmanager
def errors_as_one_line() -> Iterator[None]:
    """Turn a user's mistake into one line and status 2, a preemption into one line and the signal's status.

    Any other exception is a bug and keeps its traceback, without the passwords in it.
    """
    try:
        yield
    except PreemptedError as error:
        launcher.end(preemption.status(), f"preempted: {error}", error)
    except DeepclustError as error:
        launcher.end(2, f"error: {error}", error)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not _OUT_OF_MEMORY.search(str(error)):
            sys.excepthook = show_traceback
            raise
        wanted = " ".join(str(error).split())[:200]
        launcher.end(2, f"error: expected the work to fit into memory, it does not ({wanted}); lower the sizes", error)
    except OSError as error:
        if error.errno is None or os.environ.get("DEEPCLUST_TRACEBACK"):
            sys.excepthook = show_traceback
            raise
        where = f": {error.filename}" if error.filename else ""
        launcher.end(2, f"error: {error.strerror}{where}; make room or repair it and run again", error)
    except Exception:
        sys.excepthook = show_traceback
        raise
