"""Saves a model as files in a format of Keras: its snapshots, and their writing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import keras
import msgspec

from keras_ckpt.model import building, model_state
from keras_ckpt.model.file_snapshot import FileSnapshot, FileState, Kind
from keras_ckpt.store import background, tails
from keras_ckpt.store.files import Folder
from keras_ckpt.store.notices import warn
from keras_ckpt.store.record import CheckpointFile, CheckpointRecord
from keras_ckpt.store.writer import SaveRequest, Writer


class KerasFiles:
    """A model that is saved as files in a format of Keras.

    Example:

    ```python
    files = KerasFiles(model, Writer(CheckpointDirectory("best.keras")), "keras")
    record = files.write(SaveRequest(step=10, name="best.keras"), files.snapshot(10), amends=False)
    ```

    Args:
        model: A built model.
        writer: The writer of the files.
        kind: The format.
    """

    def __init__(self, model: keras.Model, writer: Writer, kind: Kind) -> None:
        self._model = model
        self._kind = kind
        self._state = FileState(model, kind)
        self._writer = writer

    def snapshot(self, step: int) -> FileSnapshot:
        """The snapshot of the model as it is now."""
        return self._state.snapshot()

    def holds(self, snapshot: FileSnapshot) -> bool:
        """Whether all assumptions about the values hold: there are none."""
        return True

    def copy(self, snapshot: FileSnapshot) -> None:
        """Copies the values of a snapshot now, so that training need not copy values before it changes them."""
        snapshot.detach(background.is_idle())

    def preparation(self) -> Callable[[], str]:
        """A function that prepares nothing: Keras's own writer makes the first file. Warns of an unloadable loss.

        Raises:
            ValueError: Keras cannot save the model as a whole. Its own writer would tell after an epoch.
        """
        if self._kind == "keras" and (reason := building.obstacle(self._model)):
            raise ValueError(
                f"Keras cannot save {self._model.name!r} as a whole, because {reason}. Save its weights: give "
                "ModelCheckpoint a filepath that ends in .weights.h5 with save_weights_only=True, or a directory."
            )
        if self._kind == "legacy" and (names := _unloadable_losses(self._model)):
            warn(
                f"Keras cannot load {self._model.name!r} from its legacy .h5 files, because compile was given the loss "
                f"by a short name: {', '.join(names)}. Give ModelCheckpoint a filepath that ends in .keras. Or give "
                "compile the full name, such as 'mean_squared_error'. keras.models.load_model(path, compile=False) "
                "loads the files without the loss and the optimizer."
            )
        return lambda: ""

    def unsaved(self) -> list[str]:
        """The places of state that a file of Keras does not have. Keras's own files define what they have."""
        return []

    def write(self, request: SaveRequest, snapshot: FileSnapshot, amends: bool) -> CheckpointRecord | None:
        """Writes a snapshot, as `Form.write` in `session` says."""

        def write_file(stage: Folder, record: CheckpointRecord) -> Sequence[CheckpointFile]:
            written = 0, ""

            def tail(size: int, digest: str) -> bytes:
                nonlocal written
                written = size, digest
                return tails.tail(record, size, digest)

            snapshot.write(stage, record.name, tail)
            return [CheckpointFile(record.name, *written)]

        with self._writer.explaining(request.step):
            content = snapshot.content
        request = msgspec.structs.replace(
            request,
            size=snapshot.size,
            versions=model_state.versions(),
            weights=content.weights,
            seeds=content.seeds,
        )
        return self._writer.save(request, write_file)


def _unloadable_losses(model: keras.Model) -> list[str]:
    """The names of losses of `compile` that Keras 3.15 writes into a legacy file and cannot read: `mse`, `mae`."""

    def is_loadable(name: str) -> bool:
        with contextlib.suppress(TypeError, ValueError):
            keras.losses.deserialize(name)
            return True
        return False

    given = keras.tree.flatten(getattr(model, "loss", None))
    return [repr(name) for name in given if isinstance(name, str) and not is_loadable(name)]
