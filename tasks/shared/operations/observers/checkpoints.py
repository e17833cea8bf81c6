"""The saved state of an unfinished pretraining run, under state/: which run it is of, whether to go on from it.

A folder is named after a fingerprint of all that defines a run, so no run goes on from another one's state. Decides how
a run gets to its end, never what it writes there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from deepclust import distributed
from deepclust.errors import CheckpointError, ConfigError
from deepclust.training import checkpoint, resume
from tasks.shared.operations import provenance
from tasks.shared.operations.observers import earlier_run
from tasks.shared.operations.processes import launcher
from tasks.shared.operations.text import say, warn
from tasks.shared.outputs import layout, prepared, stage

MODES = ("auto", "require", "never")
_MODE = "DEEPCLUST_RESUME"  # overrides pretrain.resume
_STALE_SECONDS = 60  # by which a network file system may lag
_OBSERVERS = ("deepclust/evaluation/watchdog.py", "tasks/shared/operations/observers/callbacks.py")
_KEPT = 3  # unfinished runs of an encoder; older ones are removed


class Run:
    """The saved state of this run of `pretrain`.

    Args:
        here: The stage.

    Raises:
        CheckpointError: If the run is required to go on and there is nothing to go on from, or all of it is damaged.
        ConfigError: If the environment asks for a mode that does not exist.
    """

    def __init__(self, here: stage.Here) -> None:
        assert here.encoder
        self._settings = here.params.pretrain.checkpoint
        parts = fingerprint(here)
        self._all = layout.runs(here.encoder)
        self._folder = self._all / _sha(parts)[:12]
        self._store = checkpoint.Store(self._folder, fingerprint=parts, keep=self._settings.keep)
        mode = os.environ.get(_MODE) or here.params.pretrain.resume
        if mode not in MODES:
            raise ConfigError(f"{_MODE}: expected one of {', '.join(MODES)}; got {mode!r}; mend or unset it")
        with launcher.together():
            if launcher.is_main():
                if mode == "never" and not launcher.has_begun():
                    self._store.clear()
                self._remove_old()
        launcher.note_begun()
        self._found = self._newest()
        if mode == "require" and self._found is None:
            found = self._misfit(parts) or f"expected a state to go on from in {self._folder}, found none"
            raise CheckpointError(f"{found}; or set pretrain.resume to auto to begin anew")
        if self._found is None and launcher.is_main():
            if line := earlier_run.difference(here.encoder):
                say(line)
            if mode == "auto" and (misfit := self._misfit(parts)):
                say(f"{here.encoder}: begins anew, beside an unfinished run: {misfit}")
        self.step = self._found.step if self._found else 0
        """Updates made so far."""

    def saving(self, parts: Mapping[str, resume.Stateful], *, stop: Callable[[], int]) -> resume.Saving:
        """What the training loop needs to save, and to go on; `parts` belong to the state too."""
        return resume.Saving(
            store=self._store,
            found=self._take,
            every_steps=self._settings.every_steps,
            every_seconds=self._settings.every_seconds,
            parts=parts,
            stop=lambda: bool(stop()),
        )

    @property
    def name(self) -> str:
        """Name that no other run of the encoder has."""
        return self._folder.name

    def clear(self) -> None:
        """Remove the state of a run that has ended well; what cannot be removed is only warned of."""
        try:
            self._store.clear()
        except CheckpointError as error:
            warn(str(error))
            return
        shutil.rmtree(self._folder, ignore_errors=True)

    def _newest(self) -> checkpoint.Saved | None:
        """The newest state that the main process finds; another machine may see the shared folder later."""
        found = self._store.newest()
        step = int(distributed.broadcast(torch.tensor(found.step if found else 0)))
        deadline = time.monotonic() + _STALE_SECONDS
        while (found.step if found else 0) != step and time.monotonic() < deadline:
            time.sleep(1)
            found = self._store.newest()
        return found  # if it is still not the main process's, restoring it is refused

    def _take(self) -> checkpoint.Saved | None:
        found, self._found = self._found, None  # it is not kept, for it may be as large as the model
        return found

    def _others(self) -> list[Path]:
        """Folders of other unfinished runs of this encoder, the newest first."""
        folders = [path for path in self._all.glob("[!.]*") if path.is_dir() and path != self._folder]
        return sorted(folders, key=lambda path: path.stat().st_mtime, reverse=True)

    def _remove_old(self) -> None:
        """Rename, then remove: half a folder is not taken for a damaged state."""
        for path in self._others()[_KEPT - 1 :]:
            path.rename(path.with_name(f".{path.name}"))
        for path in self._all.glob(".*"):
            shutil.rmtree(path, ignore_errors=True)

    def _misfit(self, parts: Mapping[str, str]) -> str:
        """What differs between this run and the newest other unfinished one; empty if there is none."""
        for other in self._others():
            try:
                checkpoint.Store(other, fingerprint=parts, keep=1).newest()
            except CheckpointError as error:
                return str(error)
        return ""


def fingerprint(here: stage.Here) -> dict[str, str]:
    """All that defines a run of `pretrain`, in named parts."""
    assert here.encoder
    method = here.params.method(here.encoder)
    parameters = provenance.stage_params("pretrain", here.encoder, here.params)
    return {
        "method": method,
        "parameters": _sha(parameters),
        "data": _sha([prepared.meta()["content_hash"], prepared.statistics(here.encoder)]),
        # The observers' state is saved too, so they have to be able to read it.
        "code": provenance.code_hash(*provenance.code_deps("pretrain", method), *_OBSERVERS),
    }


def _sha(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
