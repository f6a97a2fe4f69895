"""Whatever becomes of a checkpoint's bytes is found before a variable changes."""

from __future__ import annotations

import contextlib
import itertools
import pathlib
import random
from collections.abc import Iterable, Iterator

import keras
import pytest

import keras_ckpt as kc
from keras_ckpt.errors import CheckpointError, DamagedCheckpointError, FormatVersionError
from keras_ckpt.store.checks import check_files
from keras_ckpt.store.files import Folder
from keras_ckpt.store.record import SIZE_LIMIT, decode
from support.models import fit, values

PAGE = 4096
NAME = "ckpt-5"
SIDECAR, INDEX, DATA = (f"{NAME}.{ending}" for ending in ("json", "index", "data-00000-of-00001"))


def wide_model() -> keras.Model:
    """A model whose data file has some pages."""
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(64), keras.layers.Dense(64), keras.layers.Dense(1)])
    model.compile("adam", "mse", run_eagerly=True)
    return model


class Checkpoint:
    """A checkpoint on disk whose files can be changed for a while, and the model that would be restored from it."""

    def __init__(self, path: pathlib.Path) -> None:
        fit(wide_model(), kc.ModelCheckpoint(path), epochs=2)
        self.path = path
        self.model = wide_model()
        fit(self.model)
        self.sound = {file.name: file.read_bytes() for file in path.glob("ckpt-*")}
        self.record = decode(self.sound[SIDECAR], NAME)
        self._before = self._bits()

    @contextlib.contextmanager
    def changed(self, **files: bytes) -> Iterator[None]:
        """Has other bytes in its files, by their endings."""
        for name, content in files.items():
            (self.path / name).write_bytes(content)
        try:
            yield
        finally:
            for name in files:
                (self.path / name).write_bytes(self.sound[name])

    def is_refused(self) -> bool:
        """Whether `restore` refuses it and leaves the model as it was."""
        try:
            kc.restore(self.model, self.path / NAME)
        except (DamagedCheckpointError, FormatVersionError):
            return self._bits() == self._before
        return False

    def is_found(self) -> bool:
        """Whether the look at all bytes that `restore` begins with finds something."""
        with Folder(self.path) as folder:
            try:
                check_files(folder, decode(folder.read(SIDECAR, SIZE_LIMIT), NAME))
            except CheckpointError:
                return True
        return False

    def _bits(self) -> list[bytes]:
        return [value.tobytes() for value in values(self.model)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    checkpoint = Checkpoint(tmp_path_factory.mktemp("rot") / "run")
    assert not checkpoint.is_found()
    return checkpoint


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def refuse_all(checkpoint: Checkpoint, tally, trials: Iterable[dict[str, bytes]], every: int) -> None:
    """Has each change found, and one of so many refused by `restore`."""
    for number, files in enumerate(trials):
        with checkpoint.changed(**files):
            tally["trials"] += 1
            tally["invalid"] += not checkpoint.is_found()
            if number % every == 0:
                tally["restores"] += 1
                tally["invalid"] += not checkpoint.is_refused()


def test_each_bit_of_a_sidecar(checkpoint, long, tally) -> None:
    """One that is flipped is found, unless it means the same: digests may be written in capitals."""
    sidecar = checkpoint.sound[SIDECAR]
    for bit in range(8 * len(sidecar)):
        tally["trials"] += 1
        changed = flipped(sidecar, bit)
        try:
            record = decode(changed, NAME)
        except CheckpointError:
            if bit % (8 if long else 300) == 0:
                with checkpoint.changed(**{SIDECAR: changed}):
                    tally["restores"] += 1
                    tally["invalid"] += not checkpoint.is_refused()
        else:
            tally["the same"] += 1
            tally["invalid"] += record != checkpoint.record or changed.lower() != sidecar.lower()


def test_each_bit_of_an_index(checkpoint, long, tally) -> None:
    """Any that is flipped is found."""
    index = checkpoint.sound[INDEX]
    bits = range(0, 8 * len(index), 1 if long else 5)  # some of each byte, and each of its places

    refuse_all(checkpoint, tally, ({INDEX: flipped(index, bit)} for bit in bits), every=20 if long else 200)


def test_bits_of_a_data_file(checkpoint, long, tally) -> None:
    """Any that is flipped is found."""
    data = checkpoint.sound[DATA]
    bits = random.Random(0).sample(range(8 * len(data)), 100_000 if long else 2000)

    refuse_all(checkpoint, tally, ({DATA: flipped(data, bit)} for bit in bits), every=100)


def test_cut_zeroed_and_longer_files(checkpoint, tally) -> None:
    """As a crash of the machine or a full disk leave them."""
    changes = []
    for name in (SIDECAR, INDEX, DATA):
        content = checkpoint.sound[name]
        pages = range(0, len(content), PAGE)
        cuts = {page + by for page in (*pages, len(content)) for by in (-1, 0, 1) if 0 <= page + by < len(content)}
        changes += [(name, content[:cut]) for cut in sorted(cuts)]
        changes += [
            (name, content[:page] + bytes(len(content[page : page + PAGE])) + content[page + PAGE :]) for page in pages
        ]
        changes += [(name, content + more) for more in (b"\0", b"x", bytes(PAGE), content)]
    # The end of a sidecar's last line is of no meaning.
    changes = [(name, content) for name, content in changes if content.strip() != checkpoint.sound[name].strip()]

    refuse_all(checkpoint, tally, ({name: content} for name, content in changes), every=1)


def test_files_of_another_checkpoint(checkpoint, tally) -> None:
    """TensorFlow reads the index and the data of another step, of the same sizes, and says nothing."""
    others = {name: checkpoint.sound[name.replace("-5.", "-10.")] for name in (SIDECAR, INDEX, DATA)}
    assert all(len(others[name]) == len(checkpoint.sound[name]) for name in (INDEX, DATA))
    subsets = itertools.chain.from_iterable(itertools.combinations(others, count) for count in (1, 2, 3))
    swaps = [{name: others[name] for name in subset} for subset in subsets]

    refuse_all(checkpoint, tally, swaps, every=1)
