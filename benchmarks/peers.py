"""Tries which tool does what: each row of the README's comparison with each tool.

Run it from the top of the repository: `python benchmarks/peers.py`, in two minutes. It needs
`pip install '.[benchmarks]'`. The tools are tried as they come, without settings by hand or further packages. The
answers go to `benchmarks/peers.json`, with the versions of the tools.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import itertools
import json
import logging
import math
import os
import pathlib
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator

import keras
import lightning
import numpy as np
import orbax.checkpoint as ocp
import tensorflow as tf
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from orbax.checkpoint import checkpoint_managers as policies

import keras_ckpt as kc

RESULTS = pathlib.Path(__file__).with_name("peers.json")
TOOLS = ("this", "Keras", "tf.train.CheckpointManager", "Orbax", "Lightning")
PACKAGES = ("keras", "tensorflow", "orbax-checkpoint", "lightning")
YES, NO = "yes", "no"

ROWS: dict[str, dict[str, Callable[[pathlib.Path], str]]] = {}
"""For each row, the trial of each tool: it gets an empty folder, and answers."""


def trial(row: str, tool: str) -> Callable[[Callable[[pathlib.Path], str]], Callable[[pathlib.Path], str]]:
    """Registers a trial."""

    def register(function: Callable[[pathlib.Path], str]) -> Callable[[pathlib.Path], str]:
        ROWS.setdefault(row, {})[tool] = function
        return function

    return register


# A training in Keras, and the same in Lightning, whose metric `score` is given for each epoch.

X = np.random.default_rng(0).normal(size=(64, 8)).astype("float32")
Y = X[:, :1]


def keras_model(units: int = 4) -> keras.Model:
    keras.utils.set_random_seed(1)
    layers = [keras.Input((8,)), keras.layers.Dense(units), keras.layers.Dropout(0.5), keras.layers.Dense(1)]
    model = keras.Sequential(layers)
    model.compile("adam", "mse")
    return model


class Score(keras.callbacks.Callback):
    def __init__(self, scores: list[float]) -> None:
        super().__init__()
        self.scores = iter(scores)

    def on_epoch_end(self, epoch, logs=None) -> None:
        logs["score"] = next(self.scores)


def keras_fit(model: keras.Model, scores: list[float], *callbacks: keras.callbacks.Callback) -> None:
    model.fit(X, Y, epochs=len(scores), callbacks=[Score(scores), *callbacks], verbose=0)


class Module(lightning.LightningModule):
    def __init__(self, scores: list[float], crash: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 1))
        self.scores, self.crash = scores, crash

    def training_step(self, batch, batch_idx):
        if self.global_step == self.crash:
            raise KeyError("crash")
        return torch.nn.functional.mse_loss(self.layers(batch[0]), batch[1])

    def on_train_epoch_end(self) -> None:
        self.log("score", self.scores[self.current_epoch])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


def lightning_fit(module: Module, *callbacks: ModelCheckpoint, ckpt_path: str | None = None) -> None:
    torch.manual_seed(2)
    data = torch.utils.data.TensorDataset(torch.tensor(X), torch.tensor(Y))
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = lightning.Trainer(max_epochs=len(module.scores), callbacks=[*callbacks], **options)
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=8, shuffle=True), ckpt_path=ckpt_path)


def orbax_manager(path: pathlib.Path, **options: object) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(path, options=ocp.CheckpointManagerOptions(**options))


def arrays(seed: int) -> dict[str, np.ndarray]:
    return {"weights": np.random.default_rng(seed).normal(size=300_000).astype("float32")}


def orbax_save(manager: ocp.CheckpointManager, scores: list[float], first: int = 1) -> None:
    for step, score in enumerate(scores, first):
        manager.save(step, args=ocp.args.StandardSave(arrays(step)), metrics={"score": score})
    manager.wait_until_finished()


def score_of(metrics: dict[str, float]) -> float:
    return metrics["score"]


def epochs_in(path: pathlib.Path, pattern: str = "*.keras") -> set[int]:
    """The epochs of the files in a folder, which begin with the epoch."""
    return {int(file.name.split(".")[0]) for file in path.glob(pattern)}


# The best three and the newest two of six epochs.

UNION = "keeps the best three and the newest two"
SCORES, WANTED = [0.9, 0.8, 0.7, 0.1, 0.2, 0.3], {1, 2, 3, 5, 6}


@trial(UNION, "this")
def _(path: pathlib.Path) -> str:
    keep = kc.BestN(3) | kc.LatestN(2)
    keras_fit(keras_model(), SCORES, kc.ModelCheckpoint(path, "score", mode="max", keep=keep))
    return YES if {record.epoch for record in kc.CheckpointDirectory(path)} == WANTED else NO


@trial(UNION, "Keras")
def _(path: pathlib.Path) -> str:
    for best_only in (False, True):
        folder = path / str(best_only)
        folder.mkdir()
        file = folder / "{epoch}.keras"
        keras_fit(
            keras_model(), SCORES, keras.callbacks.ModelCheckpoint(file, "score", mode="max", save_best_only=best_only)
        )
    found = [epochs_in(path / name) for name in ("False", "True")]
    return "no: all, or improvements" if found == [{1, 2, 3, 4, 5, 6}, {1}] else YES


@trial(UNION, "tf.train.CheckpointManager")
def _(path: pathlib.Path) -> str:
    manager = tf.train.CheckpointManager(tf.train.Checkpoint(value=tf.Variable(0)), path, max_to_keep=5)
    found = [manager.save() for _ in SCORES] and {int(each.rsplit("-")[-1]) for each in manager.checkpoints}
    return "no: the newest only" if found == {2, 3, 4, 5, 6} else YES


@trial(UNION, "Orbax")
def _(path: pathlib.Path) -> str:
    best = policies.BestN(get_metric_fn=score_of, n=3)
    policy = policies.AnyPreservationPolicy([policies.LatestN(2), best])
    with orbax_manager(path, preservation_policy=policy) as manager:
        orbax_save(manager, SCORES)
        return YES if set(manager.all_steps()) == WANTED else NO


@trial(UNION, "Lightning")
def _(path: pathlib.Path) -> str:
    name = {"filename": "{epoch}", "auto_insert_metric_name": False, "mode": "max"}
    best = ModelCheckpoint(path / "best", monitor="score", save_top_k=3, **name)
    newest = ModelCheckpoint(path / "newest", monitor="epoch", save_top_k=2, **name)
    lightning_fit(Module(SCORES), best, newest)
    found = epochs_in(path, "*/*.ckpt")
    return "partly: two callbacks" if {epoch + 1 for epoch in found} == WANTED else NO


# The best of an earlier process, 0.9, against a first epoch of the next, 0.5.

RESTART = "a resumed run remembers the best"


@trial(RESTART, "this")
def _(path: pathlib.Path) -> str:
    file = path / "best.keras"

    def callback() -> keras.callbacks.Callback:
        return kc.ModelCheckpoint(file, "score", mode="max", save_best_only=True)

    keras_fit(keras_model(), [0.9], callback())
    before = file.read_bytes()
    keras_fit(kc.load_model(file), [0.5], callback())
    return YES if file.read_bytes() == before else NO


@trial(RESTART, "Keras")
def _(path: pathlib.Path) -> str:
    file = path / "best.keras"

    def callback() -> keras.callbacks.Callback:
        return keras.callbacks.ModelCheckpoint(file, "score", mode="max", save_best_only=True)

    keras_fit(keras_model(), [0.9], callback())
    before = file.read_bytes()
    keras_fit(keras.models.load_model(file), [0.5], callback())
    return YES if file.read_bytes() == before else "no: overwrites it"


def tensorflow_has_no_metrics(path: pathlib.Path) -> str:
    manager = tf.train.CheckpointManager(tf.train.Checkpoint(), path, max_to_keep=1)
    with contextlib.suppress(TypeError):
        manager.save(metrics={"score": 0.9})
        return YES
    return "no: knows no metrics"


trial(RESTART, "tf.train.CheckpointManager")(tensorflow_has_no_metrics)


@trial(RESTART, "Orbax")
def _(path: pathlib.Path) -> str:
    for first, score in ((1, 0.9), (2, 0.5)):
        with orbax_manager(path, best_fn=score_of, max_to_keep=1) as manager:
            orbax_save(manager, [score], first)
            steps = manager.all_steps()
    return YES if list(steps) == [1] else NO


@trial(RESTART, "Lightning")
def _(path: pathlib.Path) -> str:
    def callback() -> ModelCheckpoint:
        return ModelCheckpoint(path, monitor="score", mode="max", filename="best", enable_version_counter=False)

    lightning_fit(Module([0.9]), callback())
    before = (path / "best.ckpt").read_bytes()
    lightning_fit(Module([0.9, 0.5]), callback(), ckpt_path=str(path / "best.ckpt"))
    return YES if (path / "best.ckpt").read_bytes() == before else NO


# A first value that is not a number.

NAN = "a first NaN does not end the ranking"
NANS = [math.nan, 0.5, 0.9, 0.7]


@trial(NAN, "this")
def _(path: pathlib.Path) -> str:
    keras_fit(keras_model(), NANS, kc.ModelCheckpoint(path, "score", mode="max", save_best_only=True))
    return YES if [record.epoch for record in kc.CheckpointDirectory(path)] == [3] else NO


@trial(NAN, "Keras")
def _(path: pathlib.Path) -> str:
    file = path / "{epoch}.keras"
    keras_fit(keras_model(), NANS, keras.callbacks.ModelCheckpoint(file, "score", mode="max", save_best_only=True))
    return "no: keeps the NaN" if epochs_in(path) == {1} else YES


trial(NAN, "tf.train.CheckpointManager")(tensorflow_has_no_metrics)


@trial(NAN, "Orbax")
def _(path: pathlib.Path) -> str:
    with orbax_manager(path, best_fn=score_of, max_to_keep=1) as manager:
        orbax_save(manager, NANS)
        return YES if list(manager.all_steps()) == [3] else f"no: kept step {list(manager.all_steps())}"


@trial(NAN, "Lightning")
def _(path: pathlib.Path) -> str:
    options = {"filename": "{epoch}", "auto_insert_metric_name": False, "mode": "max"}
    lightning_fit(Module(NANS), ModelCheckpoint(path, monitor="score", **options))
    return YES if epochs_in(path, "*.ckpt") == {2} else NO


# A bit of the newest of two checkpoints is flipped. The tool is asked for the newest.

DAMAGE = "a damaged newest one is found, the older restored"
NOTICED, UNNOTICED, RIGHT = "partly: an error", "no: wrong values", "the bit is in no value"


def flip(*paths: str | pathlib.Path) -> None:
    """Flips a bit in the middle of the largest of these files."""
    file = max(map(pathlib.Path, paths), key=lambda each: each.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 64
    file.write_bytes(data)


@trial(DAMAGE, "this")
def _(path: pathlib.Path) -> str:
    keras_fit(keras_model(5000), [0.1, 0.2], kc.ModelCheckpoint(path))
    older, newest = kc.CheckpointDirectory(path)
    flip(*newest.paths)
    report = kc.restore(keras_model(5000), path)
    return YES if report.step == older.step else NO


@trial(DAMAGE, "Keras")
def _(path: pathlib.Path) -> str:
    keras_fit(keras_model(5000), [0.1], keras.callbacks.ModelCheckpoint(path / "{epoch}.keras"))
    flip(path / "1.keras")
    with contextlib.suppress(Exception):
        keras.models.load_model(path / "1.keras")
        return UNNOTICED
    return NOTICED


@trial(DAMAGE, "tf.train.CheckpointManager")
def _(path: pathlib.Path) -> str:
    def manager() -> tf.train.CheckpointManager:
        return tf.train.CheckpointManager(tf.train.Checkpoint(value=tf.Variable(np.zeros(100_000))), path, 2)

    first = manager()
    first.save(), first.save()
    flip(*path.glob("ckpt-2.*"))
    with contextlib.suppress(tf.errors.DataLossError):
        manager().restore_or_initialize()
        return UNNOTICED
    return NOTICED


@trial(DAMAGE, "Orbax")
def _(path: pathlib.Path) -> str:
    with orbax_manager(path) as manager:
        orbax_save(manager, [0.1, 0.2])
    flip(*(each for each in (path / "2").rglob("*") if each.is_file()))
    with orbax_manager(path) as manager, contextlib.suppress(ValueError):
        found = manager.restore(None, args=ocp.args.StandardRestore(arrays(0)))
        return RIGHT if np.array_equal(found["weights"], arrays(2)["weights"]) else UNNOTICED
    return NOTICED


@trial(DAMAGE, "Lightning")
def _(path: pathlib.Path) -> str:
    module = Module([0.1, 0.2])
    module.layers.append(torch.nn.Linear(1, 10_000))
    lightning_fit(module, ModelCheckpoint(path, filename="1"))

    def optimizer() -> list[torch.Tensor]:
        state = torch.load(path / "1.ckpt", weights_only=False)
        return [
            *state["state_dict"].values(),
            *(each["exp_avg"] for each in moments(state)),
            *(each["exp_avg_sq"] for each in moments(state)),
        ]

    before = optimizer()
    flip(path / "1.ckpt")
    with contextlib.suppress(Exception):
        lightning_fit(module, ckpt_path=str(path / "1.ckpt"))
        return RIGHT if all(map(torch.equal, before, optimizer())) else UNNOTICED
    return NOTICED


def moments(state: dict) -> list[dict[str, torch.Tensor]]:
    return list(state["optimizer_states"][0]["state"].values())


# A crash at the 12th of 24 batches, eight in an epoch, with dropout and shuffled data. Is the end an unbroken run's?

RESUME = "resumes within an epoch, to the bit"
CRASH = 11


class Crash(keras.callbacks.Callback):
    def __init__(self) -> None:
        super().__init__()
        self.batches = itertools.count()

    def on_train_batch_begin(self, batch, logs=None) -> None:
        if next(self.batches) == CRASH:
            raise KeyError("crash")


def resumed(data: Callable[[], object], backup: Callable[[object], keras.callbacks.Callback]) -> bool:
    """Whether a training that crashed and was started again has the weights of an unbroken training."""

    def train(*makers: Callable[[object], keras.callbacks.Callback]) -> list[np.ndarray]:
        model, source = keras_model(), data()
        model.fit(source, epochs=3, shuffle=False, callbacks=[make(source) for make in makers], verbose=0)
        return model.get_weights()

    whole = train()
    with contextlib.suppress(KeyError):
        train(backup, lambda source: Crash())
    return all(map(np.array_equal, whole, train(backup)))


@trial(RESUME, "this")
def _(path: pathlib.Path) -> str:
    equal = resumed(
        lambda: kc.ResumableDataset(X, Y, batch_size=8, shuffle=True, seed=3),
        lambda data: kc.BackupAndRestore(path / "backup", save_freq=1, data=data),
    )
    return YES if equal else NO


@trial(RESUME, "Keras")
def _(path: pathlib.Path) -> str:
    equal = resumed(
        lambda: tf.data.Dataset.from_tensor_slices((X, Y)).shuffle(64, seed=3).batch(8),
        lambda data: keras.callbacks.BackupAndRestore(path / "backup", save_freq=1),
    )
    return YES if equal else "no: repeats the epoch"


def loop(save: Callable[..., None], restore: Callable[..., int], crash: bool) -> list[np.ndarray]:
    """A loop of one's own that saves its state after each batch."""
    model = keras_model()
    model.optimizer.build(model.trainable_variables)
    state = [*model.variables, *model.optimizer.variables]
    for step in range(restore(state), 24):
        if crash and step == CRASH:
            break
        order = np.random.default_rng(step // 8).permutation(64)[step % 8 * 8 :][:8]
        model.train_on_batch(X[order], Y[order])
        save(step + 1, state)
    return [np.asarray(each) for each in model.get_weights()]


@trial(RESUME, "tf.train.CheckpointManager")
def _(path: pathlib.Path) -> str:
    def manager(folder: str, state: list, step: int) -> tf.train.CheckpointManager:
        checkpoint = tf.train.Checkpoint(step=tf.Variable(step), **{f"v{n}": v.value for n, v in enumerate(state)})
        return tf.train.CheckpointManager(checkpoint, path / folder, 1)

    def restore(folder: str, state: list) -> int:
        opened = manager(folder, state, 0)
        opened.restore_or_initialize()
        return int(opened.checkpoint.step)

    ways = [(lambda s, v, f=f: manager(f, v, s).save(s), lambda v, f=f: restore(f, v)) for f in ("whole", "crash")]
    whole = loop(*ways[0], crash=False)
    loop(*ways[1], crash=True)
    return "partly: your own loop" if all(map(np.array_equal, whole, loop(*ways[1], crash=False))) else NO


@trial(RESUME, "Orbax")
def _(path: pathlib.Path) -> str:
    def tree(state: list) -> dict[str, np.ndarray]:
        return {str(number): np.asarray(each) for number, each in enumerate(state)}

    def ways(manager: ocp.CheckpointManager) -> tuple:
        def restore(state: list) -> int:
            if manager.latest_step() is None:
                return 0
            found = manager.restore(None, args=ocp.args.StandardRestore(tree(state)))
            for number, each in enumerate(state):
                each.assign(found[str(number)])
            return manager.latest_step()

        return lambda step, state: manager.save(step, args=ocp.args.StandardSave(tree(state))), restore

    with orbax_manager(path / "whole", max_to_keep=1) as manager:
        whole = loop(*ways(manager), crash=False)
    with orbax_manager(path / "crash", max_to_keep=1) as manager:
        loop(*ways(manager), crash=True)
    with orbax_manager(path / "crash", max_to_keep=1) as manager:
        return "partly: your own loop" if all(map(np.array_equal, whole, loop(*ways(manager), crash=False))) else NO


@trial(RESUME, "Lightning")
def _(path: pathlib.Path) -> str:
    whole, broken, again = Module([0.0] * 3), Module([0.0] * 3, CRASH), Module([0.0] * 3)
    lightning_fit(whole)
    with contextlib.suppress(KeyError):
        lightning_fit(broken, ModelCheckpoint(path, save_last=True, every_n_train_steps=1))
    lightning_fit(again, ckpt_path=str(path / "last.ckpt"))
    equal = all(map(torch.equal, whole.parameters(), again.parameters()))
    return YES if equal else "no: other batches"


# The model, in a program without its code.

CODE = "loads the model without its code"


@trial(CODE, "this")
def _(path: pathlib.Path) -> str:
    model = keras_model()
    keras_fit(model, [0.1], kc.ModelCheckpoint(path))
    return YES if np.array_equal(model.predict(X, verbose=0), kc.load_model(path).predict(X, verbose=0)) else NO


@trial(CODE, "Keras")
def _(path: pathlib.Path) -> str:
    model = keras_model()
    keras_fit(model, [0.1], keras.callbacks.ModelCheckpoint(path / "1.keras"))
    loaded = keras.models.load_model(path / "1.keras")
    return YES if np.array_equal(model.predict(X, verbose=0), loaded.predict(X, verbose=0)) else NO


@trial(CODE, "tf.train.CheckpointManager")
def _(path: pathlib.Path) -> str:
    prefix = tf.train.CheckpointManager(tf.train.Checkpoint(model=keras_model()), path, 1).save()
    found = tf.train.load_checkpoint(prefix)
    return "no: values alone" if not isinstance(found, keras.Model) else YES


@trial(CODE, "Orbax")
def _(path: pathlib.Path) -> str:
    with orbax_manager(path) as manager:
        orbax_save(manager, [0.1])
        found = manager.restore(None, args=ocp.args.StandardRestore())
    return "no: values alone" if set(found) == {"weights"} else YES


@trial(CODE, "Lightning")
def _(path: pathlib.Path) -> str:
    lightning_fit(Module([0.1]), ModelCheckpoint(path, filename="1"))
    with contextlib.suppress(RuntimeError):
        lightning.LightningModule.load_from_checkpoint(path / "1.ckpt")
        return YES
    return "no: needs its class"


# Three saves of a model, of which nearly all values are frozen, take the room of one.

FROZEN = "frozen layers are on disk once"


def room(path: pathlib.Path) -> int:
    """The bytes in a folder, each hard link once."""
    files = [each.stat() for each in path.rglob("*") if each.is_file()]
    return sum({each.st_ino: each.st_size for each in files}.values())


def frozen_model() -> keras.Model:
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(300_000), keras.layers.Dense(1)])
    model.layers[0].trainable = False
    model.compile("sgd", "mse")
    return model


def verdict(path: pathlib.Path, model_bytes: int) -> str:
    share = room(path) / model_bytes
    return YES if share < 2 else f"no: {share:.1f} times".replace(".0", "")


FROZEN_BYTES = 4 * (8 * 300_000 + 300_000 + 300_000 + 1)


@trial(FROZEN, "this")
def _(path: pathlib.Path) -> str:
    keras_fit(frozen_model(), [0.1] * 3, kc.ModelCheckpoint(path))
    return verdict(path, FROZEN_BYTES)


@trial(FROZEN, "Keras")
def _(path: pathlib.Path) -> str:
    keras_fit(frozen_model(), [0.1] * 3, keras.callbacks.ModelCheckpoint(path / "{epoch}.keras"))
    return verdict(path, FROZEN_BYTES)


@trial(FROZEN, "tf.train.CheckpointManager")
def _(path: pathlib.Path) -> str:
    manager = tf.train.CheckpointManager(tf.train.Checkpoint(model=frozen_model()), path, 3)
    for _ in range(3):
        manager.save()
    return verdict(path, FROZEN_BYTES)


@trial(FROZEN, "Orbax")
def _(path: pathlib.Path) -> str:
    frozen = {f"frozen{number}": arrays(number)["weights"] for number in range(9)}
    with orbax_manager(path) as manager:
        for step in range(3):
            manager.save(step, args=ocp.args.StandardSave(frozen | arrays(9 + step)))
    return verdict(path, 4 * 3_000_000)


@trial(FROZEN, "Lightning")
def _(path: pathlib.Path) -> str:
    module = Module([0.1] * 3)
    module.frozen = torch.nn.Linear(8, 300_000).requires_grad_(False)
    lightning_fit(module, ModelCheckpoint(path, save_top_k=-1))
    return verdict(path, 4 * 2_700_000)


@contextlib.contextmanager
def scratch() -> Iterator[pathlib.Path]:
    """An empty working directory."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield pathlib.Path(folder)
        finally:
            os.chdir(before)


def main() -> None:
    """Runs the trials, or those of the tools that are given; prints the answers, and notes them if all were run."""
    logging.disable()
    warnings.simplefilter("ignore")
    answers: dict[str, dict[str, str]] = {}
    for row, trials in ROWS.items():
        for tool in TOOLS:
            if sys.argv[1:] and tool not in sys.argv[1:]:
                continue
            with scratch() as folder:
                answers.setdefault(row, {})[tool] = trials[tool](folder)
        print(f"{row}: {answers[row]}")
    if not sys.argv[1:]:
        day = datetime.date.today().isoformat()
        versions = {package: importlib.metadata.version(package) for package in PACKAGES}
        RESULTS.write_text(json.dumps({"date": day, "versions": versions, "answers": answers}, indent=2) + "\n")


if __name__ == "__main__":
    main()
