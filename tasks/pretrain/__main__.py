"""Train one encoder on the prepared training images, never on labels.

python -m tasks.pretrain swav
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deepclust import seeding
from deepclust.config import Config, as_dict
from deepclust.errors import ConfigError, TrainingError
from deepclust.methods import method_class
from deepclust.methods.parts.base import Method
from deepclust.methods.parts.options import TrainedConfig
from deepclust.models import backbones, encoder, weights
from deepclust.models.devices import default_device
from deepclust.training import loop
from tasks.pretrain import history
from tasks.shared.operations.observers import callbacks, checkpoints, progress
from tasks.shared.operations.processes import launcher, preemption
from tasks.shared.operations.text import say, warn
from tasks.shared.outputs import prepared, stage

CURVE = ["step", "epoch", "loss", "rate"]
CURVE_EVERY = 20  # steps that one row of the curve averages


def main() -> None:
    """Run the stage."""
    run: checkpoints.Run | None = None
    with stage.running("pretrain") as here:
        assert here.encoder
        options = here.params.options(here.encoder)
        trained = _untrained(here, options, prepared.statistics(here.encoder))
        past = history.History()
        exported: dict[str, dict[str, Tensor]] = {}
        if isinstance(options, TrainedConfig):
            run = checkpoints.Run(here)
            exported = _train(here, options, trained, run, past)
        with launcher.together():
            if launcher.is_main():
                _write(here, trained, exported, past.rows)
    if run and launcher.is_main():  # not before the outputs are in their place
        run.clear()


def _write(
    here: stage.Here,
    trained: encoder.Encoder,
    exported: dict[str, dict[str, Tensor]],
    past: list[dict[str, Any]],
) -> None:
    """The encoder, what else the method gives to later stages, the metrics and the history."""
    assert here.encoder
    method = here.params.method(here.encoder)
    encoder.save(trained.eval().cpu(), here.folder, method=method, seed=here.params.seed)
    for name, tensors in exported.items():
        weights.save(tensors, here.folder / f"{name}.safetensors")
    ended = {"steps": len(past), "final_loss": history.mean(past[-100:], "loss")} if past else {}
    here.metrics({"method": method} | ended)
    rows = _averaged(past)
    logged = sorted({name for row in rows for name in row}.difference(CURVE))
    here.curve([{name: row[name] for name in CURVE} for row in rows], CURVE)
    stage.write_text(here.folder / "history.csv", stage.table(rows, [*CURVE, *logged]))


def _untrained(here: stage.Here, options: Config, statistics: dict[str, Any]) -> encoder.Encoder:
    """The encoder before any training: from a seed, or with the weights of a file."""
    assert here.encoder
    method, shared = here.params.method(here.encoder), here.params.pretrain.shared
    data = {"image_size": statistics["image_size"], "channels": statistics["channels"]}
    if method == "pixels":
        from deepclust.methods.pixels import pixels

        return pixels(**data)
    if method == "pretrained":
        from deepclust.methods import pretrained

        assert isinstance(options, pretrained.Config)
        found = pretrained.pretrained(options, **data)
        if line := pretrained.repeated(found):
            say(f"{here.encoder}: {line}")
        if line := pretrained.enlarged(options, found):
            warn(f"{here.encoder}: {line}")
        return found
    data |= {"backbone": shared.backbone, "stem": shared.stem, "mean": statistics["mean"], "std": statistics["std"]}
    if method == "random":
        from deepclust.methods.random import random

        return random(seed=here.params.seed, **data)
    return encoder.untrained(seed=here.params.seed, **data)


def _train(
    here: stage.Here, stated: TrainedConfig, trained: encoder.Encoder, run: checkpoints.Run, past: history.History
) -> dict[str, dict[str, Tensor]]:
    """Train the encoder's backbone in place, from where the run stands, and note its updates; returns the exports."""
    assert here.encoder
    images = prepared.images("train", here.encoder)
    image_size = trained.description["image_size"]
    try:
        config = stated.sized(images=len(images), image_size=image_size)
    except ConfigError as error:
        raise ConfigError(f"pretrain.{here.encoder}: {error}") from error
    device = default_device()
    with seeding.seeded(here.params.seed, "heads"):
        build: Callable[..., Method] = method_class(here.params.method(here.encoder))
        method = build(trained.backbone, trained.feature_dim, config).to(device)
    method.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
    trained.to(device)
    sizes = [crop.pixels(image_size) for crop in config.crops]
    backbones.check_crops(trained.backbone, sizes, channels=trained.description["channels"])
    if launcher.is_main():
        decided = {name: value for name, value in as_dict(config).items() if getattr(stated, name) == "auto"}
        _announce(here, config, decided, images=len(images), image_size=image_size, device=device)
        if run.step:
            say(f"{here.encoder}: goes on after update {run.step}")

    def normalise(crops: Tensor) -> Tensor:
        normalised: Tensor = (crops - trained.mean) / trained.std
        return normalised

    # One process observes the run for all.
    observer = None
    if launcher.is_main():
        observer = callbacks.Watch(
            here, method, trained, images, normalise=normalise, device=device, run=run.name, fresh=not run.step
        )
    total = len(images) // config.batch_size * config.batch_size * config.epochs
    with (
        progress.Progress(total, here.encoder, done=run.step * config.batch_size) as bar,
        preemption.deferred() as told,
    ):

        def on_step(done: loop.Step) -> None:
            bar.update(config.batch_size, done.loss)
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
                seed=here.params.seed,
                precision=here.params.pretrain.shared.precision,
                normalise=normalise,
                device=device,
                on_step=on_step,
                on_epoch=on_epoch,
                saving=run.saving(
                    {"history": past, "watch": observer, "clock": here.clock} if observer else {}, stop=told
                ),
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
    config: TrainedConfig,
    decided: dict[str, Any],
    *,
    images: int,
    image_size: int,
    device: torch.device,
) -> None:
    """Say what is about to run, and record in MLflow what the data and the device decided."""
    wanted = here.params.pretrain.shared.precision
    precision = loop.effective_precision(wanted, device)
    if precision != wanted:
        say(f"{here.encoder}: {device.type} has no {wanted} worth using, training in {precision}")
    say(
        f"{here.encoder}: {images} images of {image_size} px, {config.epochs} epochs of "
        f"{images // config.batch_size} steps on {device.type} in {precision}, {torch.get_num_threads()} thread(s)"
    )
    if decided:
        say(f"{here.encoder}: automatic sizes: {', '.join(f'{name} {value}' for name, value in decided.items())}")
    sys.stdout.flush()
    here.run.log_params({f"auto.{name}": value for name, value in decided.items()} | {"precision_used": precision})


def _averaged(past: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each `CURVE_EVERY` steps, with the last step's number and the means of the rest."""
    rows = []
    for start in range(0, len(past), CURVE_EVERY):
        part = past[start : start + CURVE_EVERY]
        rows.append({"step": part[-1]["step"], "epoch": part[-1]["epoch"]} | history.means(part))
    return rows


if __name__ == "__main__":
    main()
