"""Train one encoder on the prepared training images, never on labels.

python -m tasks.pretrain swav
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from deepclust import seeding
from deepclust.errors import TrainingError
from deepclust.methods import method_class
from deepclust.methods.parts.base import Method
from deepclust.models import backbones, encoder
from deepclust.models.devices import default_device
from deepclust.training import loop, optim, views
from tasks.pretrain import history, sizing
from tasks.shared.operations.observers import callbacks, checkpoints, progress
from tasks.shared.operations.params import pretrain as sections
from tasks.shared.operations.processes import launcher, preemption
from tasks.shared.outputs import prepared, stage

CURVE = ["step", "epoch", "loss", "rate"]
CURVE_EVERY = 20  # steps that one row of the curve averages


def main() -> None:
    """Run the stage."""
    run: checkpoints.Run | None = None
    with stage.running("pretrain") as here:
        assert here.encoder
        section = here.params.method(here.encoder)
        trained = _untrained(here, section, prepared.statistics())
        past = history.History()
        exported: dict[str, dict[str, Tensor]] = {}
        if isinstance(section, sections.Trained):
            run = checkpoints.Run(here)
            exported = _train(here, section, trained, run, past)
        with launcher.together():
            if launcher.is_main():
                _write(here, section, trained, exported, past.rows)
    if run and launcher.is_main():  # not before the outputs are in their place
        run.clear()


def _write(
    here: stage.Here,
    section: sections.Method,
    trained: encoder.Encoder,
    exported: dict[str, dict[str, Tensor]],
    past: list[dict[str, Any]],
) -> None:
    """The encoder, what else the method gives to later stages, the metrics and the history."""
    encoder.save(trained.eval().cpu(), here.folder, method=section.method, seed=here.params.seed)
    for name, tensors in exported.items():
        save_file(tensors, here.folder / f"{name}.safetensors")
    ended = {"steps": len(past), "final_loss": history.mean(past[-100:], "loss")} if past else {}
    here.metrics({"method": section.method} | ended)
    rows = _averaged(past)
    logged = sorted({name for row in rows for name in row}.difference(CURVE))
    here.curve([{name: row[name] for name in CURVE} for row in rows], CURVE)
    stage.write_text(here.folder / "history.csv", stage.table(rows, [*CURVE, *logged]))


def _untrained(here: stage.Here, section: sections.Method, statistics: dict[str, Any]) -> encoder.Encoder:
    """The encoder before any training: from a seed, or with the weights of a file."""
    data = {"image_size": statistics["image_size"], "channels": statistics["channels"]}
    if section.method == "pixels":
        from deepclust.methods.pixels import pixels

        return pixels(**data)
    if isinstance(section, sections.Pretrained):
        from deepclust.methods.pretrained import pretrained

        return pretrained(**section.model_dump(exclude={"method"}), **data)
    shared = here.params.pretrain.shared
    data |= {"backbone": shared.backbone, "stem": shared.stem, "mean": statistics["mean"], "std": statistics["std"]}
    if section.method == "random":
        from deepclust.methods.random import random

        return random(seed=here.params.seed, **data)
    return encoder.untrained(seed=here.params.seed, **data)


def _train(
    here: stage.Here, section: sections.Trained, trained: encoder.Encoder, run: checkpoints.Run, past: history.History
) -> dict[str, dict[str, Tensor]]:
    """Train the encoder's backbone in place, from where the run stands, and note its updates; returns the exports."""
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
    if launcher.is_main():
        _announce(here, section, options, plan, images=len(images), image_size=image_size, device=device)
        if run.step:
            print(f"{here.encoder}: goes on after update {run.step}", flush=True)

    def normalise(crops: Tensor) -> Tensor:
        normalised: Tensor = (crops - trained.mean) / trained.std
        return normalised

    # What follows a run follows it on the main process.
    observer = None
    if launcher.is_main():
        observer = callbacks.Watch(
            here, method, trained, images, normalise=normalise, device=device, run=run.name, fresh=not run.step
        )
    total = len(images) // plan.batch_size * plan.batch_size * plan.epochs
    with progress.Progress(total, here.encoder, done=run.step * plan.batch_size) as bar, preemption.deferred() as told:

        def on_step(done: loop.Step) -> None:
            bar.update(section.batch_size, done.loss)
            past.add(done)
            if observer:
                observer.step(done)

        def on_epoch(done: loop.Epoch) -> None:
            if observer:
                observer.epoch(done, history.means([row for row in past.rows if row["epoch"] == done.epoch]))

        try:
            loop.train(
                method,
                images,
                plan,
                normalise=normalise,
                device=device,
                on_step=on_step,
                on_epoch=on_epoch,
                saving=run.saving({"history": past, "watch": observer} if observer else {}, stop=told),
            )
        except TrainingError as error:
            if observer is None:
                raise
            raise TrainingError(f"{error}; {observer.kept()}") from error
    if observer:
        observer.clear()
    return method.exported()


def _announce(
    here: stage.Here,
    section: sections.Trained,
    options: dict[str, Any],
    plan: loop.Recipe,
    *,
    images: int,
    image_size: int,
    device: torch.device,
) -> None:
    """Say what is about to run, and record in MLflow what the data and the device decided."""
    precision = loop.effective_precision(plan.precision, device)
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


def build(section: sections.Trained, options: dict[str, Any], trained: encoder.Encoder, *, seed: int) -> Method:
    """The method around an encoder's backbone, with seeded weights.

    Raises:
        ConfigError: If the method can not be built from the options.
    """
    with seeding.seeded(seed, "heads"):
        return method_class(section_name(section))(trained.backbone, trained.feature_dim, **options)


def section_name(section: Any) -> str:
    """Name of the section's method."""
    name: str = section.method
    return name


def recipe(shared: sections.Shared, section: sections.Trained, *, image_size: int, seed: int) -> loop.Recipe:
    """The section as the training loop wants it; shares of the side become pixels."""
    common = set(sections.Optimiser.model_fields) | {"name"}
    stated = dict(section.optimiser)
    return loop.Recipe(
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


def _averaged(past: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each `CURVE_EVERY` steps, with the last step's number and the means of the rest."""
    rows = []
    for start in range(0, len(past), CURVE_EVERY):
        part = past[start : start + CURVE_EVERY]
        rows.append({"step": part[-1]["step"], "epoch": part[-1]["epoch"]} | history.means(part))
    return rows


if __name__ == "__main__":
    main()
