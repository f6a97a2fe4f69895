"""A brute-force oracle predicts the checkpoints on disk for random histories and policies.

The oracle does not use the package. It lists every save that was due, and applies the definition of each policy to all
records at once. The histories run through real `fit` calls, through the manager, and through a writer of shared files.
"""

import datetime
import math
import os
import random
import time
from dataclasses import dataclass, field

import keras
import pytest
import tensorflow as tf

import keras_ckpt as kc
from keras_ckpt.formats import sharing
from keras_ckpt.model.position import set_position
from keras_ckpt.store.writer import SaveRequest, Write, Writer
from support.models import dense_model, fit
from support.runs import shared_payload

VALUES = [0.1, 0.2, 0.2, 0.3, 0.4, 0.5, math.nan, math.inf, -math.inf, None]


@dataclass(eq=False)
class Save:
    """A save that was due."""

    order: int
    step: int
    epoch: int | None
    time: float
    value: float | None
    middle: bool = False
    pinned: bool = False
    files: dict[int, int] = field(default_factory=dict)
    """The size of each file, by its inode."""

    def look(self, folder: str | os.PathLike[str]) -> None:
        """Looks at the files of the checkpoint, where they were written."""
        found = [os.stat(entry) for entry in os.scandir(folder)]
        self.files = {each.st_ino: each.st_size for each in found}


@dataclass
class Limit:
    """A bound by its definition."""

    kind: type[kc.MaxBytes | kc.MaxCount]
    most: int

    def allows(self, saves: list[Save]) -> bool:
        if self.kind is kc.MaxCount:
            return len(saves) <= self.most
        files: dict[int, int] = {}
        for save in saves:
            files |= save.files
        return sum(files.values()) <= self.most


@dataclass
class Rule:
    """A policy by its definition."""

    kind: str
    n: float
    mode: str = "min"

    def policy(self) -> kc.PreservationPolicy:
        kinds = {
            "latest": kc.LatestN,
            "best": lambda n: kc.BestN(n, "val_loss", self.mode),
            "steps": kc.EveryNSteps,
            "epochs": kc.EveryNEpochs,
            "hours": kc.EveryNHours,
            "%Y-%j": kc.Daily,
            "%G %V": kc.Weekly,
            "%Y %m": kc.Monthly,
            "within": lambda hours: kc.KeepWithin(f"{hours} h"),
        }
        return kinds[self.kind](self.n)

    def keeps(self, save: Save, saves: list[Save]) -> bool:
        match self.kind:
            case "latest":
                return sum(other.order > save.order for other in saves) < self.n
            case "best":
                return _finite(save) and sum(self._beats(other, save) for other in saves) < self.n
            case "steps":
                return not any(o.step // self.n == save.step // self.n and o.step < save.step for o in saves)
            case "epochs":
                same = [o for o in saves if o.epoch is not None and o.epoch // self.n == (save.epoch or 0) // self.n]
                return save.epoch is not None and save.step == min(same, key=lambda o: (o.epoch, o.step)).step
            case "hours":
                return save.step in self._hourly(saves)
            case "within":
                return all(other.time - save.time <= self.n * 3600 for other in saves)
            case form:
                period = _period(save, form)
                later = {_period(other, form) for other in saves if _period(other, form) > period}
                earlier = [o for o in saves if _period(o, form) == period and o.order < save.order]
                return len(later) < self.n and not earlier

    def order(self, saves: list[Save]) -> list[Save]:
        """The saves that the rule keeps, the dearest first."""
        kept = [save for save in reversed(saves) if self.keeps(save, saves)]
        if self.kind == "best":
            kept.sort(key=lambda save: sum(self._beats(other, save) for other in saves))
        return kept

    def _beats(self, other: Save, save: Save) -> bool:
        if not _finite(other) or other is save:
            return False
        if other.value == save.value:
            return other.order < save.order
        return (other.value < save.value) == (self.mode == "min")

    def _hourly(self, saves: list[Save]) -> set[int]:
        kept: list[Save] = []
        for save in saves:
            if not kept or abs(save.time - kept[-1].time) >= self.n * 3600:
                kept.append(save)
        return {save.step for save in kept}


def _finite(save: Save) -> bool:
    return save.value is not None and math.isfinite(save.value)


def _period(save: Save, form: str) -> str:
    return datetime.datetime.fromtimestamp(save.time, datetime.UTC).strftime(form)


def expected(rules: list[Rule], saves: list[Save], limit: Limit | None) -> list[int]:
    """The steps on disk at the end, in the order of saving.

    Without a bound, all saves are judged at once. With a bound, after each save the dearest stay that it allows.
    """
    if limit is None:
        return [save.step for save in saves if save.pinned or save in _selected(rules, saves)]
    there: list[Save] = []
    for save in saves:
        after = _within(rules, [*there, save], limit)
        there = after if save in after else there  # a save that would go at once is not made
    return [save.step for save in there]


def _within(rules: list[Rule], there: list[Save], limit: Limit) -> list[Save]:
    """The saves that the rules keep, that the bound allows, and that the rules still keep without those it dropped."""
    selected = _selected(rules, there)
    order = [*there[-1:], *(each for rule in rules for each in rule.order(there)), *reversed(there)]
    order = [each for place, each in enumerate(order) if each in selected and each not in order[:place]]
    there = [each for each in there if each.pinned or each in selected]
    for cheap in [each for each in reversed(order[1:]) if not each.pinned]:
        if not limit.allows(there):
            there.remove(cheap)
    return [each for each in there if each.pinned or each in _selected(rules, there)]


def _selected(rules: list[Rule], saves: list[Save]) -> list[Save]:
    """The saves that a rule keeps, or that stay because nothing can be ranked yet."""
    unknown = any(rule.kind == "best" for rule in rules) and all(save.value is None for save in saves)
    return [save for save in saves if (unknown and not save.middle) or any(rule.keeps(save, saves) for rule in rules)]


def random_rules(dice: random.Random) -> list[Rule]:
    kinds = [
        lambda: Rule("latest", dice.randint(1, 3)),
        lambda: Rule("best", dice.randint(1, 3), dice.choice(["min", "max"])),
        lambda: Rule("steps", dice.randint(1, 9)),
        lambda: Rule("epochs", dice.randint(1, 3)),
        lambda: Rule("hours", dice.choice([0.5, 1, 2.5])),
        lambda: Rule(dice.choice(["%Y-%j", "%G %V", "%Y %m"]), dice.randint(1, 3)),
        lambda: Rule("within", dice.choice([0.5, 4, 100])),
    ]
    return [dice.choice(kinds)() for _ in range(dice.randint(1, 3))]


def joined(rules: list[Rule], limit: Limit | None) -> kc.PreservationPolicy:
    policy = rules[0].policy()
    for rule in rules[1:]:
        policy |= rule.policy()
    return policy if limit is None else policy & limit.kind(limit.most)


@dataclass
class Clock:
    """A clock that stands still, jumps, and goes backwards."""

    dice: random.Random
    unit: float
    now: float = 1_000_000.0
    readings: list[float] = field(default_factory=list)

    def tick(self) -> float:
        self.now += self.unit * self.dice.choice([0, 1, 1, 2, 4, -3])
        return self.now


class Scripted(keras.callbacks.Callback):
    """Sets the clock after each batch, and reports a validation loss after each epoch."""

    def __init__(self, clock: Clock, times: list[float], values: list[float | None]) -> None:
        super().__init__()
        self.clock, self.times, self.values = clock, iter(times), values

    def on_train_batch_end(self, batch, logs=None) -> None:
        self.clock.now = next(self.times)

    def on_epoch_end(self, epoch, logs=None) -> None:
        if self.values[epoch] is not None:
            logs["val_loss"] = self.values[epoch]


def due_in_fit(rules, batches, save_freq, values, times) -> list[Save]:
    """The saves of a fit: by batches, and at epoch ends where a save is due or waiting."""
    ranked = any(rule.kind == "best" for rule in rules)
    saves: list[Save] = []
    step = 0
    for epoch, value in enumerate(values):
        waiting = False
        for _ in range(batches):
            step += 1
            if save_freq != "epoch" and step % save_freq == 0:
                saves.append(Save(len(saves), step, epoch, times[step - 1], None, middle=True))
                waiting = ranked
        if save_freq == "epoch" or waiting:
            if saves and saves[-1].step == step:
                last = saves.pop()
                saves.append(Save(last.order, step, epoch + 1, last.time, value))
            else:
                saves.append(Save(len(saves), step, epoch + 1, times[step - 1], value))
    return saves


@pytest.mark.filterwarnings("ignore:Two epochs have ended without")
@pytest.mark.filterwarnings("ignore:The checkpoints in .* have .*, over")
@pytest.mark.sample(4)
@pytest.mark.parametrize("seed", range(20))
def test_fits_leave_the_checkpoints_on_disk_that_the_oracle_predicts(tmp_path, monkeypatch, seed) -> None:
    """Five random histories of each seed, through `fit`."""
    dice = random.Random(seed)
    model = dense_model()
    for number in range(5):
        rules = random_rules(dice)
        batches, save_freq = dice.choice([(1, "epoch"), (2, "epoch"), (3, 2), (2, 3), (3, 3), (4, 1)])
        values = [dice.choice(VALUES) for _ in range(dice.randint(3, 8))]
        most = dice.choice([None, 1, 2, 3]) if save_freq == "epoch" else None
        limit = most and Limit(kc.MaxCount, most)
        clock = Clock(dice, dice.choice([1800, 40_000]))
        times = [clock.tick() for _ in range(batches * len(values))]
        monkeypatch.setattr(time, "time", lambda clock=clock: clock.now)
        set_position(model, None)
        runs = kc.CheckpointDirectory(tmp_path / str(number))

        checkpoint = kc.ModelCheckpoint(runs.path, save_freq=save_freq, keep=joined(rules, limit))
        fit(model, Scripted(clock, times, values), checkpoint, epochs=len(values), batches=batches)

        saves = due_in_fit(rules, batches, save_freq, values, times)
        assert [record.step for record in runs] == expected(rules, saves, limit), (rules, limit, values, save_freq)


@pytest.mark.filterwarnings("ignore:The checkpoints in .* have .*, over")
@pytest.mark.sample(8)
@pytest.mark.parametrize("seed", range(20))
def test_the_manager_leaves_the_checkpoints_on_disk_that_the_oracle_predicts(tmp_path, monkeypatch, seed) -> None:
    """Five random histories of each seed, through `CheckpointManager`, with steps in any order and pins in between.

    The sizes of the checkpoints differ.
    """
    dice = random.Random(1000 + seed)
    value = tf.Variable([0.0], shape=[None])
    checkpoint = tf.train.Checkpoint(value=value)
    assert checkpoint.save_counter is not None  # TensorFlow makes the counter here, not in the first save
    for number in range(5):
        rules = random_rules(dice)
        limit = dice.choice(
            [None, Limit(kc.MaxCount, dice.choice([1, 2, 4])), Limit(kc.MaxBytes, dice.randint(1, 8) * 1000)]
        )
        clock = Clock(dice, dice.choice([1800, 40_000]))
        monkeypatch.setattr(time, "time", lambda clock=clock: clock.now)
        runs = kc.CheckpointDirectory(tmp_path / str(number))
        manager = kc.CheckpointManager(checkpoint, runs.path, keep=joined(rules, limit))
        steps = dice.sample(range(60), dice.randint(4, 14))
        saves = []
        for order, step in enumerate(steps):
            save = Save(order, step, dice.choice([None, step // 5]), clock.tick(), dice.choice(VALUES))
            saves.append(save)
            value.assign([0.0] * dice.randint(1, 600))
            # TensorFlow alone writes files of the same sizes.
            checkpoint.write(str(tmp_path / f"alone {number}" / str(step) / "ckpt"))
            save.look(tmp_path / f"alone {number}" / str(step))
            path = manager.save(step, metrics=metrics_of(save), epoch=save.epoch)
            if path is not None and dice.random() < 0.2:
                runs.pin(step)
                save.pinned = True

        assert [record.step for record in runs] == expected(rules, saves, limit), (rules, limit, saves)


@pytest.mark.filterwarnings("ignore:The checkpoints in .* have .*, over")
@pytest.mark.sample(8)
@pytest.mark.parametrize("seed", range(20))
def test_a_budget_counts_each_shared_file_on_disk_once_as_the_oracle_predicts(tmp_path, monkeypatch, seed) -> None:
    """Five random histories of each seed. The oracle knows the files by their inodes, the package by their digests.

    Some values stay the same for a while, as those of a frozen layer. Checkpoints share their file by hard links.
    """
    monkeypatch.setattr(sharing, "_WORTHWHILE", 1)
    dice = random.Random(2000 + seed)
    for number in range(5):
        rules, limit = random_rules(dice), Limit(kc.MaxBytes, dice.randint(1, 12) * 100)
        runs = kc.CheckpointDirectory(tmp_path / str(number))
        policy = joined(rules, limit).resolve("val_loss", lambda name: "min")
        writer = Writer(runs, policy)
        clock = Clock(dice, dice.choice([1800, 40_000]))
        saves = []
        frozen = b""
        for order, step in enumerate(dice.sample(range(60), dice.randint(4, 14))):
            save = Save(order, step, dice.choice([None, step // 5]), clock.tick(), dice.choice(VALUES))
            saves.append(save)
            if not frozen or dice.random() < 0.3:
                frozen = dice.randbytes(dice.randint(50, 400))
            facts = {"step": step, "epoch": save.epoch, "time": save.time, "metrics": metrics_of(save)}
            write = watched(save, shared_payload(runs, f"{step} " * dice.randint(1, 100), frozen))
            if writer.save(SaveRequest(**facts, batch=0, size=0), write) is not None and dice.random() < 0.2:
                runs.pin(step)
                save.pinned = True
        writer.close()

        assert [record.step for record in runs] == expected(rules, saves, limit), (rules, limit, saves)


def metrics_of(save: Save) -> dict[str, float]:
    return {"loss": 1.0} if save.value is None else {"loss": 1.0, "val_loss": save.value}


def watched(save: Save, write: Write) -> Write:
    """A `Write` that looks at the files before they are committed."""

    def write_files(stage, record):
        files = write(stage, record)
        save.look(stage.path)
        return files

    return write_files
