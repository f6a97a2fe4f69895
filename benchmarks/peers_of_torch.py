"""PyTorch's own savers, to be measured beside this package."""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import keras
import torch
import torch.distributed.checkpoint as dcp
from savers import Every, Saver, sync

VERSION = str(torch.__version__)


def state_of(model: keras.Model) -> dict[str, torch.Tensor]:
    """The tensors of a model and its optimizer, by their places."""
    variables = [*model.variables, *model.optimizer.variables]
    return {str(place): each.value.detach() for place, each in enumerate(variables)}


class Save(Every):
    """`torch.save`, and a sync."""

    def save(self, number: int) -> None:
        torch.save(state_of(self.model), self.path / f"{number}.pt")
        sync(self.path)
        (self.path / f"{number - self.keep * self.every}.pt").unlink(missing_ok=True)


class AsyncSave(Every):
    """`torch.distributed.checkpoint.async_save`."""

    future: Any = None

    def save(self, number: int) -> None:
        if self.future is not None:
            self.future.result()
        self.future = dcp.async_save(state_of(self.model), checkpoint_id=str(self.path / f"{number}"), no_dist=True)
        shutil.rmtree(self.path / f"{number - self.keep * self.every}", ignore_errors=True)


SAVERS = {
    "torch.save, sync": Saver(Save, syncs=True),
    "dcp.async_save": Saver(AsyncSave, lambda callback: callback.future.result() and None),
}


def restores(model: keras.Model, other: keras.Model, path: pathlib.Path) -> dict[str, Callable[[], object]]:
    """Saves a model, and returns the ways to restore it into another."""
    torch.save(state_of(model), path / "model.pt")

    def load() -> None:
        found = torch.load(path / "model.pt")
        with torch.no_grad():
            for name, target in state_of(other).items():
                target.copy_(found[name])

    return {"torch.load, copy": load}
