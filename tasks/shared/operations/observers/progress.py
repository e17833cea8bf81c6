"""Progress of a long computation: a bar in a terminal, a plain line every ten seconds elsewhere."""

from __future__ import annotations

import math
import sys
import time
from typing import TextIO

from tqdm import tqdm


class Progress:
    """Shows images done, rate, loss and time left.

        with Progress(60_000, "swav") as progress:
            progress.update(256, loss)

    Args:
        total_images: Images of the whole computation, over all epochs.
        label: What is computed.
        done: Images that were done before.
        file: Where to write; standard error by default, as bars are.
    """

    def __init__(self, total_images: int, label: str, *, done: int = 0, file: TextIO | None = None) -> None:
        self._total = total_images
        self._label = label
        self._file = file or sys.stderr
        self._begun = self._done = self._shown = done
        self._loss = math.nan
        self._start = self._last = time.monotonic()
        self._bar = None
        if self._file.isatty():
            self._bar = tqdm(
                total=total_images,
                initial=done,
                desc=label,
                unit=" images",
                unit_scale=True,
                dynamic_ncols=True,
                file=self._file,
            )

    def __enter__(self) -> Progress:
        return self

    def update(self, images: int, loss: float) -> None:
        """Count images that are done, with the loss on them."""
        self._done += images
        self._loss = loss
        if self._bar is not None:
            self._bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            self._bar.update(images)
        elif time.monotonic() - self._last >= 10:
            self._line()

    def __exit__(self, *_: object) -> None:
        """Show how far it came."""
        if self._bar is not None:
            self._bar.close()
        elif self._done > self._shown:
            self._line()

    def _line(self) -> None:
        self._last = time.monotonic()
        self._shown = self._done
        elapsed = self._last - self._start
        rate = (self._done - self._begun) / elapsed if elapsed > 0 else 0.0
        left = max(0, self._total - self._done)
        rest = f"{_clock(left / rate)} left" if left and rate else f"{_clock(elapsed)} in all"
        share = self._done / self._total if self._total else 1.0
        print(
            f"{self._label}: {share:4.0%}, {self._done} of {self._total} images, {rate:.0f} images/s, "
            f"loss {self._loss:.4f}, {rest}",
            file=self._file,
            flush=True,
        )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
