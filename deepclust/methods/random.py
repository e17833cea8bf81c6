"""The network before any training: the baseline that says what training adds."""

from __future__ import annotations

from typing import Any

from deepclust import config
from deepclust.models import encoder


@config.config
class Config(config.Config):
    """No options."""


def random(*, seed: int, **options: Any) -> encoder.Encoder:
    """The network that every trained method begins with at the same seed; see `encoder.untrained`."""
    return encoder.untrained(seed=seed, **options)
