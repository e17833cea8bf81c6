"""Where tensors live. The device is a fact of the machine, never a parameter."""

import torch

from deepclust import distributed


def default_device() -> torch.device:
    """The GPU of this process if there is one, else the CPU."""
    return torch.device("cuda", distributed.local_rank()) if torch.cuda.is_available() else torch.device("cpu")
