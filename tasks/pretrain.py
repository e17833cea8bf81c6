"""Train one encoder on the prepared training images, never on labels.

python -m tasks.pretrain swav
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from deepclust import backbones, encoder, optim, seeding, training, views
from deepclust.devices import default_device
from deepclust.errors import TrainingError
from deepclust.methods import METHODS
from deepclust.methods.base import Method
from tasks import prepared, progress, sizing, stage, watch
from tasks import pretrain_sections as sections

CURVE = ["step", "epoch", "loss", "rate"]
CURVE_EVERY = 20  # steps that one row of the curve averages


def main() -> None:
    """Run the stage."""
    with stage.running("pretrain") as here:
        assert here.encoder
        section = here.params.method(here.encoder)
        trained = _untrained(here, section, prepared.statistics())
        if isinstance(section, sections.Trained):
            history = _train(here, section, trained)
        else:
            trained.eval()
            history = []
            here.metrics({"method": section.method})
        encoder.save(trained.cpu(), here.folder, method=section.method, seed=here.params.seed)
        rows = _averaged(history)
        logged = sorted({name for row in rows for name in row}.difference(CURVE))
        here.curve([{name: row[name] for name in CURVE} for row in rows], CURVE)
        stage.write_text(here.folder / "history.csv", stage.table(rows, [*CURVE, *logged]))


def _untrained(here: stage.Here, section: sections.Method, statistics: dict[str, Any]) -> encoder.Encoder:
    """The encoder before any training: from a seed, or with the weights of a file."""
    data = {"image_size": statistics["image_size"], "channels": statistics["channels"]}
    if isinstance(section, sections.Pretrained):
        return encoder.pretrained(
            backbone=section.backbone,
            weights=section.weights,
            sha256=section.sha256,
            input_size=section.input_size,
            mean=None if section.mean is None else list(section.mean),
            std=None if section.std is None else list(section.std),
            **data,
        )
    # `pixels` is the image itself: no network, and no normalisation either.
    pixels_only = section.method == "pixels"
    shared = here.params.pretrain.shared
    with seeding.seeded(here.params.seed, "weights"):
        return encoder.Encoder(
            backbone="pixels" if pixels_only else shared.backbone,
            stem="auto" if pixels_only else shared.stem,
            mean=[0.0] * data["channels"] if pixels_only else statistics["mean"],
            std=[1.0] * data["channels"] if pixels_only else statistics["std"],
            **data,
        )


def _train(here: stage.Here, section: sections.Trained, trained: encoder.Encoder) -> list[dict[str, Any]]:
    """Train the encoder's backbone in place; returns one row a step."""
    assert here.encoder
    images = prepared.images("train")
    image_size = trained.description["image_size"]
    options = sizing.options(section, images=len(images), image_size=image_size)
    device = default_device()
    method = build(section, options, trained, seed=here.params.seed).to(device)
    method.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
    trained.to(device)
    plan = recipe(here.params.pretrain.shared, section, image_size=image_size, seed=here.params.seed)
    backbones.check_crops(
        trained.backbone, [crop.size for crop in plan.crops], channels=trained.description["channels"]
    )
    _announce(here, section, options, plan, images=len(images), image_size=image_size, device=device)
    history: list[dict[str, Any]] = []

    def normalise(crops: Tensor) -> Tensor:
        normalised: Tensor = (crops - trained.mean) / trained.std
        return normalised

    observer = watch.Watch(here, method, trained, images, normalise=normalise, device=device)
    with progress.Progress(len(images) // plan.batch_size * plan.batch_size * plan.epochs, here.encoder) as bar:

        def on_step(done: training.Step) -> None:
            bar.update(section.batch_size, done.loss)
            history.append(as_row(done))
            observer.step(done)

        def on_epoch(done: training.Epoch) -> None:
            observer.epoch(done, means([row for row in history if row["epoch"] == done.epoch]))

        try:
            training.train(
                method,
                images,
                plan,
                normalise=normalise,
                device=device,
                on_step=on_step,
                on_epoch=on_epoch,
            )
        except TrainingError as error:
            raise TrainingError(f"{error}; {observer.kept()}") from error
    observer.clear()
    here.metrics({"method": section_name(section), "steps": len(history), "final_loss": mean(history[-100:], "loss")})
    for name, tensors in method.exported().items():
        save_file(tensors, here.folder / f"{name}.safetensors")
    return history


def _announce(
    here: stage.Here,
    section: sections.Trained,
    options: dict[str, Any],
    plan: training.Recipe,
    *,
    images: int,
    image_size: int,
    device: torch.device,
) -> None:
    """Say what is about to run, and record in MLflow what the data and the device decided."""
    precision = training.effective_precision(plan.precision, device)
    if precision != plan.precision:
        print(f"{here.encoder}: {device.type} has no {plan.precision} worth using, training in {precision}")
    print(
        f"{here.encoder}: {images} images of {image_size} px, {plan.epochs} epochs of "
        f"{images // plan.batch_size} steps on {device.type} in {precision}, {torch.get_num_threads()} thread(s)"
    )
    decided = sizing.automatic(section, options)
    if decided:
        print(f"{here.encoder}: automatic sizes: {', '.join(f'{name} {value}' for name, value in decided.items())}")
    sys.stdout.flush()
    here.run.log_params({f"auto.{name}": value for name, value in decided.items()} | {"precision_used": precision})


def as_row(done: training.Step) -> dict[str, Any]:
    """An update as a row of the history."""
    return {
        "step": done.step,
        "epoch": done.epoch,
        "loss": done.loss,
        "rate": done.rate,
        "gradient_norm": done.gradient_norm,
    } | done.logged


def build(section: sections.Trained, options: dict[str, Any], trained: encoder.Encoder, *, seed: int) -> Method:
    """The method around an encoder's backbone, with seeded weights.

    Raises:
        ConfigError: If the method can not be built from the options.
    """
    with seeding.seeded(seed, "heads"):
        return METHODS[section_name(section)](trained.backbone, trained.feature_dim, **options)


def section_name(section: Any) -> str:
    """Name of the section's method."""
    name: str = section.method
    return name


def recipe(shared: sections.Shared, section: sections.Trained, *, image_size: int, seed: int) -> training.Recipe:
    """The section as the training loop wants it; shares of the side become pixels."""
    common = set(sections.Optimiser.model_fields) | {"name"}
    stated = dict(section.optimiser)
    return training.Recipe(
        epochs=section.epochs,
        batch_size=section.batch_size,
        accumulate=section.accumulate,
        precision=shared.precision,
        optimiser=optim.Optimiser(
            **{name: value for name, value in stated.items() if name in common},
            options={name: value for name, value in stated.items() if name not in common},
        ),
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


def means(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Mean of every column but the counters."""
    names = sorted({name for row in rows for name in row} - {"step", "epoch"})
    return {name: mean(rows, name) for name in names}


def _averaged(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each `CURVE_EVERY` steps, with the last step's number and the means of the rest."""
    rows = []
    for start in range(0, len(history), CURVE_EVERY):
        part = history[start : start + CURVE_EVERY]
        rows.append({"step": part[-1]["step"], "epoch": part[-1]["epoch"]} | means(part))
    return rows


if __name__ == "__main__":
    main()
