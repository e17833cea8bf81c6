"""Train one encoder on the prepared training images, never on labels.

python -m tasks.pretrain swav
"""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from deepclust import encoder, seeding, training, views
from deepclust.devices import default_device
from deepclust.methods import METHODS
from deepclust.methods.base import Method
from deepclust.methods.swav import SwAV
from tasks import params, prepared, probe, progress, stage

CURVE = ["step", "epoch", "loss", "rate"]
CURVE_EVERY = 20  # steps that one row of the curve averages
_OF_THE_RECIPE = {"method", "epochs", "batch_size", "optimiser", "crops", "colour"}


def main() -> None:
    """Run the stage."""
    with stage.running("pretrain") as here:
        assert here.encoder
        section = here.params.method(here.encoder)
        statistics = prepared.statistics()
        device = default_device()
        # `pixels` is the image itself: no network, and no normalisation either.
        pixels_only = section.method == "pixels"
        channels = statistics["channels"]
        with seeding.seeded(here.params.seed, "weights"):
            trained = encoder.Encoder(
                backbone="pixels" if pixels_only else here.params.pretrain.shared.backbone,
                image_size=statistics["image_size"],
                channels=channels,
                mean=[0.0] * channels if pixels_only else statistics["mean"],
                std=[1.0] * channels if pixels_only else statistics["std"],
            )
        if isinstance(section, params.Frozen):
            trained.eval()
            history: list[dict[str, Any]] = []
            here.metrics({"method": section.method})
        else:
            history = _train(here, section, trained, device)
        encoder.save(trained.cpu(), here.folder, method=section.method, seed=here.params.seed)
        rows = _averaged(history)
        logged = sorted({name for row in rows for name in row}.difference(CURVE))
        here.curve([{name: row[name] for name in CURVE} for row in rows], CURVE)
        stage.write_text(here.folder / "history.csv", stage.table(rows, [*CURVE, *logged]))


def _train(
    here: stage.Here, section: params.Trained, trained: encoder.Encoder, device: torch.device
) -> list[dict[str, Any]]:
    """Train the encoder's backbone in place; returns one row a step."""
    statistics = trained.description
    images = prepared.images("train")
    method = build(section, trained, seed=here.params.seed).to(device)
    method.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
    trained.to(device)
    history: list[dict[str, Any]] = []
    watch = probe.Probe(here.run, trained, device)
    steps = len(images) // section.batch_size * section.epochs
    print(
        f"{here.encoder}: {len(images)} images of {statistics['image_size']} px, {section.epochs} epochs of "
        f"{len(images) // section.batch_size} steps on {device.type}, {torch.get_num_threads()} thread(s)",
        flush=True,
    )
    with progress.Progress(steps * section.batch_size, str(here.encoder)) as bar:

        def on_step(done: training.Step) -> None:
            bar.update(section.batch_size, done.loss)
            history.append({"step": done.step, "epoch": done.epoch, "loss": done.loss, "rate": done.rate} | done.logged)

        def on_epoch(done: training.Epoch) -> None:
            of_epoch = [row for row in history if row["epoch"] == done.epoch]
            watch(done, {name: mean(of_epoch, name) for name in of_epoch[-1] if name not in ("step", "epoch")})

        training.train(
            method,
            images,
            recipe(section, image_size=statistics["image_size"], seed=here.params.seed),
            normalise=lambda crops: (crops - trained.mean) / trained.std,
            device=device,
            on_step=on_step,
            on_epoch=on_epoch,
        )
    here.metrics({"method": section_name(section), "steps": len(history), "final_loss": mean(history[-100:], "loss")})
    if isinstance(method, SwAV):
        save_file({"prototypes": _unit_rows(method)}, here.folder / "prototypes.safetensors")
        save_file(
            {name: value.contiguous().cpu() for name, value in method.head.state_dict().items()},
            here.folder / "head.safetensors",
        )
    return history


def build(section: params.Trained, trained: encoder.Encoder, *, seed: int) -> Method:
    """The method around an encoder's backbone, with seeded weights.

    Raises:
        ConfigError: If the method can not be built from the section.
    """
    options = {name: value for name, value in section if name not in _OF_THE_RECIPE}
    with seeding.seeded(seed, "heads"):
        return METHODS[section_name(section)](trained.backbone, trained.feature_dim, **options)


def section_name(section: Any) -> str:
    """Name of the section's method."""
    name: str = section.method
    return name


def recipe(section: params.Trained, *, image_size: int, seed: int) -> training.Recipe:
    """The section as the training loop wants it; shares of the side become pixels."""
    return training.Recipe(
        epochs=section.epochs,
        batch_size=section.batch_size,
        **dict(section.optimiser),
        crops=[
            views.Crop(count=crop.count, size=pixels(crop.size, image_size), scale=crop.scale, ratio=crop.ratio)
            for crop in section.crops
        ],
        colour=views.Colour(**dict(section.colour)),
        seed=seed,
    )


def pixels(size: float, image_size: int) -> int:
    """Side of a crop: whole pixels, or a share of the image's side rounded to a whole pixel, at least 8."""
    return int(size) if size > 1 else max(8, round(size * image_size))


def mean(rows: list[dict[str, Any]], name: str) -> float:
    """Mean of a column over the rows that have it."""
    values: list[float] = [row[name] for row in rows if name in row]
    return sum(values) / len(values)


def _averaged(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each `CURVE_EVERY` steps, with the last step's number and the means of the rest."""
    rows = []
    for start in range(0, len(history), CURVE_EVERY):
        part = history[start : start + CURVE_EVERY]
        names = {name for row in part for name in row} - {"step", "epoch"}
        rows.append({"step": part[-1]["step"], "epoch": part[-1]["epoch"]} | {name: mean(part, name) for name in names})
    return rows


def _unit_rows(method: SwAV) -> Tensor:
    method.prototypes.normalise()
    return method.prototypes.weight.detach().cpu()


if __name__ == "__main__":
    main()
