"""Features of all prepared images by one encoder.

python -m tasks.embed swav
"""

from __future__ import annotations

import numpy as np
import torch

from deepclust import encoder, features, metrics
from deepclust.devices import default_device
from tasks import layout, prepared, stage


def main() -> None:
    """Run the stage."""
    with stage.running("embed") as here:
        device = default_device()
        trained = encoder.load(layout.out("pretrain", here.encoder)).to(device)
        # Up to three times faster convolutions on a CPU; torch's stub lacks the overload.
        trained.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        for split in layout.SPLITS:
            images = prepared.images(split)
            embedded = features.extract(trained, images, batch_size=here.params.embed.batch_size, device=device)
            np.save(here.folder / f"{split}.npy", embedded)
            print(
                f"{here.encoder}: {len(embedded)} {split} images embedded in {embedded.shape[1]} dimensions", flush=True
            )
        here.metrics({"dim": trained.feature_dim, "rankme": metrics.rankme(embedded)})


if __name__ == "__main__":
    main()
