"""`ModelCheckpoint(new_run=...)`: a fit that does not continue the run in the directory."""

import copy
import multiprocessing
import os
import pathlib
import re
import shlex
import signal
import subprocess

import keras
import pytest
from click.testing import CliRunner

import keras_ckpt as kc
from keras_ckpt.cli import main
from keras_ckpt.store import background, tails
from keras_ckpt.store.files import Folder
from keras_ckpt.store.writer import SaveRequest, Writer
from reliability.trainer import Child, keras_station
from support.frameworks import tf
from support.models import Interrupts, Reports, dense_model, fit, into_a_stage
from support.restarts import prepare
from support.runs import Filler, payload


@pytest.fixture(scope="module")
def forks():
    """A process that has loaded TensorFlow, to fork trainers from."""
    with keras_station(prepare) as place:
        yield place


def below(runs: kc.CheckpointDirectory, name: str) -> kc.CheckpointDirectory:
    return kc.CheckpointDirectory(os.path.join(runs.path, name))


def steps(runs: kc.CheckpointDirectory) -> list[int]:
    return [record.step for record in runs]


def train(runs: kc.CheckpointDirectory, losses=(0.5, 0.4), model=None, callbacks=(), **options) -> keras.Model:
    """Trains with epochs of one batch that report these validation losses. Returns the model."""
    model = model or dense_model()
    checkpoint = kc.ModelCheckpoint(runs.path, **options)
    fit(model, Reports(val_loss=losses), checkpoint, *callbacks, epochs=len(losses), batches=1)
    return model


def test_new_run_takes_one_of_three_words(runs) -> None:
    with pytest.raises(ValueError, match=r"'refuse', 'subdirectory' or 'replace'. Received: 'ask'"):
        kc.ModelCheckpoint(runs.path, new_run="ask")


class TestRefuse:
    def test_the_refusal_is_one_line_that_names_what_to_type(self, runs, tmp_path, monkeypatch) -> None:
        """The path is relative to the working directory, as a user types it."""
        train(runs)
        monkeypatch.chdir(tmp_path)
        with pytest.raises(kc.DirectoryNotEmptyError) as caught:
            train(runs)

        assert str(caught.value) == (
            "run holds 2 checkpoints of another run, the newest of step 2. Type keras_ckpt.restore(model, 'run') "
            "and fit(..., initial_epoch=2) to continue it. Or give ModelCheckpoint new_run='subdirectory' to keep it, "
            "or new_run='replace' to remove it. In a shell, keras-ckpt clear run removes it."
        )

    @pytest.mark.parametrize(
        ("way", "left"),
        [("restore", {"": [1, 2, 3, 4]}), ("subdirectory", {"": [1, 2], "2": [1, 2]}), ("replace", {"": [1, 2]})],
    )
    def test_each_way_of_the_refusal_works_as_it_is_typed(self, runs, way, left) -> None:
        train(runs)
        with pytest.raises(kc.DirectoryNotEmptyError) as caught:
            train(runs)

        model, options = typed(str(caught.value), way)
        train(runs, model=model, **options)

        assert {name: steps(below(runs, name)) for name in left} == left

    def test_the_shell_command_of_the_refusal_removes_the_run(self, tmp_path) -> None:
        """The path is quoted for the shell."""
        runs = Filler(tmp_path / "it's here").save("1 2")
        with pytest.raises(kc.DirectoryNotEmptyError) as caught:
            train(runs)
        command = str(caught.value).rpartition("keras-ckpt ")[2].removesuffix(" removes it.")

        result = CliRunner().invoke(main, [*shlex.split(command), "--yes"])

        assert (result.exit_code, steps(runs)) == (0, [])


def typed(message: str, way: str) -> tuple[keras.Model, dict[str, str]]:
    """The model and the options of `ModelCheckpoint` of a user who types a way out of a message."""
    model = dense_model()
    if way == "restore":
        call = re.search(r"keras_ckpt\.restore\(model, '.*?'\)", message)[0]
        eval(call, {"keras_ckpt": kc, "model": model})
        return model, {}
    name, value = re.search(rf"(new_run)='({way})'", message).groups()
    return model, {name: value}


class TestSubdirectory:
    def test_a_first_run_is_saved_into_the_directory_itself(self, runs) -> None:
        train(runs, new_run="subdirectory")

        assert steps(runs) == [1, 2]
        assert not (pathlib.Path(runs.path) / "2").exists()

    def test_further_runs_are_saved_into_numbered_subdirectories(self, runs) -> None:
        """The attribute `directory` of the callback is the directory of the fit."""
        found = []
        for _ in range(3):
            checkpoint = kc.ModelCheckpoint(runs.path, new_run="subdirectory")
            fit(dense_model(), checkpoint)
            found.append(checkpoint.directory.path)
            assert checkpoint.filepath == runs.path

        assert found == [runs.path, below(runs, "2").path, below(runs, "3").path]
        assert [steps(kc.CheckpointDirectory(path)) for path in found] == [[5], [5], [5]]

    def test_one_callback_serves_several_runs(self, runs) -> None:
        """As in a loop over the folds of a cross-validation."""
        checkpoint = kc.ModelCheckpoint(runs.path, new_run="subdirectory", save_best_only=True, monitor="loss")
        for _ in range(2):
            fit(dense_model(), checkpoint)

        assert steps(runs) == steps(below(runs, "2")) == [5]
        assert checkpoint.best == below(runs, "2").best().metrics["loss"]

    def test_a_deep_copy_of_the_callback_serves_another_run(self, runs) -> None:
        """KerasTuner copies the callbacks for each trial."""
        heard = []
        checkpoint = kc.ModelCheckpoint(runs.path, new_run="subdirectory", on_saved=heard.append)
        for _ in range(2):
            fit(dense_model(), copy.deepcopy(checkpoint))

        assert [record.directory for record in heard] == [runs.path, below(runs, "2").path]

    @pytest.mark.parametrize("name", ["", "2"])
    def test_a_fit_that_continues_a_run_saves_where_the_run_is(self, runs, name) -> None:
        for _ in range(3):
            train(runs, new_run="subdirectory")
        place = below(runs, name) if name else runs
        model = dense_model()
        kc.restore(model, place)

        train(runs, model=model, new_run="subdirectory")

        assert steps(place) == [1, 2, 3, 4]
        assert not (pathlib.Path(runs.path) / "4").exists()

    def test_a_second_fit_of_the_model_saves_where_its_first_fit_did(self, runs) -> None:
        train(runs)
        checkpoint = kc.ModelCheckpoint(runs.path, new_run="subdirectory")
        model = dense_model()
        for _ in range(2):
            fit(model, checkpoint)

        assert steps(below(runs, "2")) == [5, 10]

    def test_a_run_stays_where_it_is_when_an_earlier_place_becomes_free(self, runs) -> None:
        """The model continues its run in `3`, and a new run gets the free place."""
        train(runs)
        train(runs, new_run="subdirectory")
        model = train(runs, new_run="subdirectory")
        below(runs, "2").clear()

        train(runs, model=model, new_run="subdirectory")
        train(runs, [0.3], new_run="subdirectory")

        assert steps(below(runs, "3")) == [1, 2, 3, 4]
        assert steps(below(runs, "2")) == [1]

    def test_a_place_with_checkpoints_of_others_is_skipped(self, runs) -> None:
        """TensorFlow's checkpoints are left alone."""
        pathlib.Path(runs.path).mkdir()
        tf.train.CheckpointManager(tf.train.Checkpoint(step=tf.Variable(1)), runs.path, 3).save()

        train(runs, new_run="subdirectory")

        assert steps(runs) == []
        assert steps(below(runs, "2")) == [1, 2]

    def test_a_place_whose_checkpoint_a_recovery_publishes_is_skipped(self, runs) -> None:
        """A process died before it committed a complete checkpoint."""
        train(runs, [0.5])
        into_a_stage(pathlib.Path(runs.path))
        assert steps(runs) == []

        train(runs, [0.4], new_run="subdirectory")

        assert steps(runs) == [1]
        assert steps(below(runs, "2")) == [1]

    def test_two_callbacks_of_one_fit_cannot_share_the_directory(self, runs) -> None:
        """Each would take the run of the other for a new run."""
        train(runs)
        checkpoints = [kc.ModelCheckpoint(runs.path, new_run="subdirectory") for _ in range(2)]

        with pytest.raises(kc.DirectoryNotEmptyError, match="Two callbacks of this training"):
            fit(dense_model(), *checkpoints)

    @pytest.mark.parametrize(("path", "place"), [("run", "run/2"), ("run/best.keras", "run/2/best.keras")])
    def test_verbose_prints_where_the_run_is_saved(self, tmp_path, monkeypatch, capsys, path, place) -> None:
        """The lines of each file name its path in the sub-directory."""
        monkeypatch.chdir(tmp_path)
        for verbose in (0, 1):
            train_files(path, [0.5], new_run="subdirectory", verbose=verbose)

        lines = [line for line in capsys.readouterr().out.splitlines() if line]
        assert lines[0] == "Checkpoints are saved into run/2"
        if path != "run":
            assert lines[1:] == [f"Epoch 1: {text} model to {place}" for text in ("saving", "finished saving")]
        assert kc.CheckpointDirectory(place).latest().step == 1

    def test_listeners_of_the_directory_hear_of_the_subdirectory(self, runs) -> None:
        train(runs)
        checkpoint, heard = kc.ModelCheckpoint(runs.path, new_run="subdirectory"), []
        checkpoint.directory.subscribe(heard.append)

        fit(dense_model(), checkpoint)

        assert [change.record.prefix for change in heard] == [f"{runs.path}/2/ckpt-5"]

    def test_a_killed_run_resumes_in_its_subdirectory(self, runs, tmp_path) -> None:
        """With `BackupAndRestore`."""

        def callbacks() -> list[keras.callbacks.Callback]:
            checkpoint = kc.ModelCheckpoint(runs.path, new_run="subdirectory")
            return [checkpoint, kc.BackupAndRestore(tmp_path / "backup")]

        train(runs)
        with pytest.raises(RuntimeError):
            fit(dense_model(), *callbacks(), Interrupts(12, RuntimeError()), epochs=4)

        fit(dense_model(), *callbacks(), epochs=4)

        assert steps(below(runs, "2")) == [5, 10, 15, 20]
        assert not (pathlib.Path(runs.path) / "3").exists()

    def test_processes_that_start_at_once_get_a_place_each(self, runs, forks) -> None:
        """Each is in its first epoch while the others look for a place."""
        assert forks.submit(train_at_once, runs.path, 3).result() == [0, 0, 0]

        assert steps(runs) == steps(below(runs, "2")) == steps(below(runs, "3")) == [5]
        assert len({place.latest().run_id for place in (runs, below(runs, "2"), below(runs, "3"))}) == 3


def train_at_once(path: str, number: int) -> list[int]:
    """Trains in so many processes at once. Returns their exit codes."""
    barrier = multiprocessing.get_context("fork").Barrier(number)
    children = [Child(train_behind, path, barrier) for _ in range(number)]
    for child in children:
        child.go()
    return [child.end() for child in children]


def train_behind(acknowledge, path: str, barrier) -> None:
    """Trains, and ends the first batch when the others have begun theirs."""
    wait = keras.callbacks.LambdaCallback(on_train_batch_begin=lambda batch, logs: batch or barrier.wait(60))
    fit(dense_model(), kc.ModelCheckpoint(path, new_run="subdirectory"), wait)


class TestReplace:
    def test_the_old_run_is_removed_after_the_first_checkpoint_of_the_new_run(self, runs) -> None:
        """Until then it is whole."""
        train(runs, [0.1, 0.2, 0.3])
        old = list(runs)
        seen = []
        look = keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: seen.append(list(runs)))

        fit(dense_model(), look, kc.ModelCheckpoint(runs.path, new_run="replace"), epochs=2)

        assert seen[0] == old
        assert [(record.step, record.sequence) for record in runs] == [(5, 4), (10, 5)]
        assert runs.verify().ok
        assert tf.train.latest_checkpoint(runs.path) == runs[10].prefix
        assert {record.run_id for record in runs}.isdisjoint(record.run_id for record in old)

    def test_a_new_run_that_saves_nothing_leaves_the_old_run(self, runs) -> None:
        train(runs)
        old = list(runs)

        with pytest.raises(RuntimeError):
            fit(dense_model(), kc.ModelCheckpoint(runs.path, new_run="replace"), Interrupts(3, RuntimeError()))

        assert list(runs) == old

    @pytest.mark.parametrize("options", [{"keep": kc.BestN(2)}, {"save_best_only": True}, {"keep": kc.LatestN(2)}])
    def test_the_new_run_is_not_ranked_against_the_old_run(self, runs, options) -> None:
        """The checkpoints of the new run are saved although all are worse than those of the old run."""
        train(runs, [0.1, 0.2, 0.3])

        train(runs, [0.9, 0.8], new_run="replace", **options)

        losses = [record.metrics["val_loss"] for record in runs]
        assert losses == ([0.8] if "save_best_only" in options else [0.9, 0.8])

    def test_the_best_value_is_of_the_new_run_from_its_beginning(self, runs) -> None:
        """The attribute `best` agrees with `save_best_only`."""
        train(runs, [0.1])
        checkpoint, seen = kc.ModelCheckpoint(runs.path, new_run="replace", mode="min", save_best_only=True), []
        assert checkpoint.best == 0.1
        look = keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: seen.append(checkpoint.best))

        fit(dense_model(), look, Reports(val_loss=[0.9, 0.8]), checkpoint, epochs=2)

        assert seen == [None, 0.9]
        assert checkpoint.best == 0.8

    def test_a_pinned_checkpoint_of_the_old_run_stays_and_is_not_ranked(self, runs) -> None:
        train(runs, [0.1, 0.2, 0.3])
        runs.pin(3, "production")

        train(runs, [0.9, 0.8, 0.7][:2], new_run="replace", keep=kc.BestN(1))

        assert [(record.step, record.metrics["val_loss"]) for record in runs] == [(3, 0.3), (2, 0.8)]
        assert runs.latest().step == 2

    def test_a_pinned_checkpoint_is_not_superseded_by_the_new_run(self, runs) -> None:
        """A warning says so. The next step of the new run replaces the rest of the old run."""
        train(runs, [0.1, 0.2, 0.3])
        runs.pin(1)

        with pytest.warns(UserWarning, match=r"Step 1 is not saved into .*: ckpt-1 of step 1 is pinned"):
            train(runs, [0.9, 0.8], new_run="replace")

        assert [(record.step, record.metrics["val_loss"]) for record in runs] == [(1, 0.1), (2, 0.8)]

    def test_a_fit_that_continues_the_run_replaces_nothing(self, runs) -> None:
        model = train(runs)

        train(runs, model=model, new_run="replace")

        assert steps(runs) == [1, 2, 3, 4]

    def test_a_new_run_with_equal_values_is_a_run_of_its_own(self, runs) -> None:
        """A script with fixed seeds computes the values of the old run again."""
        for options in ({}, {"new_run": "replace"}):
            keras.utils.set_random_seed(1)
            checkpoint = kc.ModelCheckpoint(runs.path, save_freq=["epoch", 5], **options)
            fit(dense_model(), checkpoint, epochs=len(options) + 1)

        assert steps(runs) == [5, 10]
        assert len({record.run_id for record in runs}) == 1

    def test_checkpoints_of_other_programs_are_refused(self, runs) -> None:
        """They are never removed."""
        pathlib.Path(runs.path).mkdir()
        tf.train.CheckpointManager(tf.train.Checkpoint(step=tf.Variable(1)), runs.path, 3).save()

        with pytest.raises(kc.DirectoryNotEmptyError, match=r"without a sidecar.*ckpt-1.*left alone"):
            train(runs, new_run="replace")

    @pytest.mark.parametrize("batches", [3, 8])
    def test_a_killed_run_resumes_and_replaces_the_old_run(self, runs, tmp_path, batches) -> None:
        """Killed before its first checkpoint, or after it."""

        def callbacks() -> list[keras.callbacks.Callback]:
            checkpoint = kc.ModelCheckpoint(runs.path, new_run="replace")
            return [checkpoint, kc.BackupAndRestore(tmp_path / "backup")]

        train(runs, [0.1, 0.2, 0.3])
        with pytest.raises(RuntimeError):
            fit(dense_model(), *callbacks(), Interrupts(batches, RuntimeError()), epochs=3)
        assert steps(runs) == ([1, 2, 3] if batches == 3 else [5])

        fit(dense_model(), *callbacks(), epochs=3)

        assert steps(runs) == [5, 10, 15]

    def test_a_kill_before_the_old_run_is_removed_leaves_a_directory_that_continues(self, runs, forks) -> None:
        """Both runs are listed, the new run is the newest, and its next save removes the old run."""
        train(runs, [0.1, 0.2, 0.3])

        assert forks.submit(die_before_pruning, train, runs).result() == -signal.SIGKILL

        assert [(record.step, record.metrics["val_loss"]) for record in runs] == [(2, 0.2), (3, 0.3), (1, 0.9)]
        assert runs.verify().ok
        model = dense_model()
        assert kc.restore(model, runs).step == 1
        train(runs, [0.8, 0.7], model=model, new_run="replace", keep=kc.BestN(1))
        assert [(record.step, record.metrics["val_loss"]) for record in runs] == [(3, 0.7)]

    def test_the_rest_of_an_old_run_is_left_alone_by_a_fit_that_replaces_nothing(self, runs, forks) -> None:
        """After a kill before the removal. The policy sees the new run alone."""
        train(runs, [0.1, 0.2, 0.3])
        assert forks.submit(die_before_pruning, train, runs).result() == -signal.SIGKILL
        model = dense_model()
        kc.restore(model, runs)

        fit(model, Reports(val_loss=[0.8]), kc.ModelCheckpoint(runs.path, keep=kc.BestN(1)), batches=4)

        assert [(record.step, record.metrics["val_loss"]) for record in runs] == [(2, 0.2), (3, 0.3), (5, 0.8)]


class TestFiles:
    """Files of Keras: a fixed name, or a template."""

    @pytest.mark.parametrize("template", ["best.keras", "{epoch}-{val_loss}.keras", "e{epoch}/m.weights.h5"])
    def test_further_runs_of_files_are_saved_into_numbered_subdirectories(self, tmp_path, template) -> None:
        options = {"new_run": "subdirectory", "save_weights_only": template.endswith(".h5")}
        for losses in ([0.1], [0.9], [0.5]):
            train_files(tmp_path / template, losses, **options)

        found = [kc.CheckpointDirectory(tmp_path / place / template) for place in (".", "2", "3")]
        assert [place.latest().metrics["val_loss"] for place in found] == [0.1, 0.9, 0.5]
        assert [len(place) for place in found] == [1, 1, 1]

    def test_a_deep_copy_of_a_callback_of_files_serves_another_run(self, tmp_path) -> None:
        """KerasTuner copies the callbacks for each trial."""
        path = tmp_path / "tuned" / "best.keras"
        checkpoint = kc.ModelCheckpoint(path, "loss", keep=kc.BestN(1), new_run="subdirectory")
        for _ in range(2):
            fit(dense_model(), copy.deepcopy(checkpoint))

        found = [kc.CheckpointDirectory(each).latest() for each in (path, tmp_path / "tuned" / "2" / "best.keras")]
        assert [record.step for record in found] == [5, 5]
        assert found[0].run_id != found[1].run_id

    def test_a_model_that_keras_loaded_from_a_subdirectory_continues_its_run_there(self, tmp_path) -> None:
        for losses in ([0.1], [0.9]):
            train_files(tmp_path / "best.keras", losses, new_run="subdirectory")

        model = keras.models.load_model(tmp_path / "2" / "best.keras")
        train_files(tmp_path / "best.keras", [0.8], model, new_run="subdirectory")

        assert files(tmp_path) == {"best.keras": 0.1, "2/best.keras": 0.8}
        assert kc.CheckpointDirectory(tmp_path / "2" / "best.keras").latest().step == 2

    def test_a_file_that_keras_wrote_keeps_a_new_run_out_of_its_directory(self, tmp_path) -> None:
        dense_model().save(tmp_path / "best.keras")
        before = (tmp_path / "best.keras").read_bytes()

        train_files(tmp_path / "best.keras", [0.5], new_run="subdirectory")

        assert (tmp_path / "best.keras").read_bytes() == before
        assert kc.CheckpointDirectory(tmp_path / "2" / "best.keras").latest().step == 1

    def test_the_files_of_the_old_run_are_removed_after_the_first_file_of_the_new_run(self, tmp_path, recwarn) -> None:
        """Until then they are whole. A pinned file and a file without a record stay."""
        template = tmp_path / "{epoch}-{val_loss}.keras"
        train_files(template, [0.1, 0.2, 0.3])
        kc.CheckpointDirectory(template).pin(2, "production")
        (tmp_path / "7-0.7.keras").write_bytes(b"mine")
        seen = []
        look = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: seen.append(set(files(tmp_path))))

        train_files(template, [0.9, 0.8], None, look, new_run="replace")

        assert seen == [
            {"1-0.1.keras", "2-0.2.keras", "3-0.3.keras"},
            {"2-0.2.keras", "1-0.9.keras"},
        ]
        assert set(files(tmp_path)) == {"2-0.2.keras", "1-0.9.keras", "2-0.8.keras"}
        assert (tmp_path / "7-0.7.keras").read_bytes() == b"mine"
        assert told(recwarn) == []

    def test_a_killed_run_of_files_is_replaced_by_the_next_save_of_the_new_run(self, tmp_path, forks) -> None:
        """Killed between the commit of its first file and the removal of the old files: both runs are whole."""
        template = tmp_path / "{epoch}-{val_loss}.keras"
        train_files(template, [0.1, 0.2])

        assert forks.submit(die_before_pruning, train_files, str(template)).result() == -signal.SIGKILL

        assert set(files(tmp_path)) == {"1-0.1.keras", "2-0.2.keras", "1-0.9.keras"}
        assert kc.CheckpointDirectory(template).verify().ok
        model = keras.models.load_model(tmp_path / "1-0.9.keras")
        train_files(template, [0.8], model, new_run="replace")
        assert set(files(tmp_path)) == {"1-0.9.keras", "1-0.8.keras"}


class TestReplacedFiles:
    """The default: files of Keras are replaced by their names, with one warning before training."""

    def test_a_fit_over_files_that_keras_wrote_says_before_training_what_it_replaces(
        self, tmp_path, monkeypatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        dense_model().save("best.keras")
        before = []
        look = keras.callbacks.LambdaCallback(on_train_batch_begin=lambda batch, logs: before.append(len(told(warned))))

        with pytest.warns(UserWarning, match="An earlier training wrote") as warned:
            train_files("best.keras", [0.5, 0.6], None, look)

        assert told(warned) == [
            "An earlier training wrote best.keras (no record). This fit replaces it, as Keras does. To keep all files, "
            "give ModelCheckpoint new_run='subdirectory'."
        ]
        assert before == [1, 1]

    def test_a_fit_over_files_of_an_earlier_run_says_which_they_are(self, tmp_path, monkeypatch) -> None:
        """Files of other templates, and files of other names, are not meant."""
        monkeypatch.chdir(tmp_path)
        pathlib.Path("notes.keras").write_bytes(b"mine")
        train_files("last.keras", [0.3])
        train_files("e-{epoch}.keras", [0.1, 0.2])

        with pytest.warns(UserWarning, match="An earlier training wrote") as warned:
            train_files("e-{epoch}.keras", [0.9])

        assert told(warned) == [
            "An earlier training wrote e-2.keras (step 2, val_loss 0.2), e-1.keras (step 1, val_loss 0.1). This fit "
            "replaces files of the same names, as Keras does. To continue its run, type keras_ckpt.restore(model, "
            "'e-2.keras') before fit. To keep all files, give ModelCheckpoint new_run='subdirectory'."
        ]
        assert files(tmp_path) == {"last.keras": 0.3, "e-2.keras": 0.2, "e-1.keras": 0.9}

    @pytest.mark.parametrize("by_keras", [True, False])
    def test_two_callbacks_name_the_files_that_each_replaces(self, tmp_path, monkeypatch, by_keras) -> None:
        """Each of two warnings has the files of its own callback alone. The files have records, or Keras wrote them."""
        monkeypatch.chdir(tmp_path)
        names = ["best.keras", "{epoch}.keras"]
        if by_keras:
            for name in ("best.keras", "1.keras"):
                dense_model().save(name)
        else:
            fit(dense_model(), *map(kc.ModelCheckpoint, names))

        with pytest.warns(UserWarning, match="An earlier training wrote") as warned:
            fit(dense_model(), *map(kc.ModelCheckpoint, names))

        fact = "no record" if by_keras else "step 5"
        assert [text.partition(". ")[0] for text in told(warned)] == [
            f"An earlier training wrote best.keras ({fact})",
            f"An earlier training wrote 1.keras ({fact})",
        ]

    def test_a_fit_over_a_damaged_file_says_so(self, tmp_path, monkeypatch) -> None:
        """The user may still find its values."""
        monkeypatch.chdir(tmp_path)
        train_files("best.keras", [0.5])
        pathlib.Path("best.keras").write_bytes(b"x" + pathlib.Path("best.keras").read_bytes())

        with pytest.warns(UserWarning, match=r"An earlier training wrote best.keras \(damaged\). This fit replaces it"):
            train_files("best.keras", [0.6])

        assert files(tmp_path) == {"best.keras": 0.6}

    @pytest.mark.parametrize("way", ["restore", "subdirectory"])
    @pytest.mark.parametrize("path", ["best.keras", "best.weights.h5"])
    def test_the_best_file_of_a_killed_run_stays_if_the_advice_is_typed(self, tmp_path, monkeypatch, path, way) -> None:
        """The script has neither `BackupAndRestore` nor loads the file, so its second start has new weights."""
        monkeypatch.chdir(tmp_path)
        options = {"save_best_only": True, "save_weights_only": path.endswith(".h5")}
        with pytest.raises(RuntimeError):
            train_files(path, [0.1, 0.2, 0.3], None, Interrupts(3, RuntimeError()), **options)
        with pytest.warns(UserWarning, match="An earlier training wrote") as warned, pytest.raises(RuntimeError):
            train_files(path, [0.9], None, Interrupts(1, RuntimeError()), **options)
        assert files(tmp_path) == {path: 0.1}

        model, typed_options = typed(told(warned)[0], way)
        train_files(path, [0.9], model, **options, **typed_options)

        assert files(tmp_path)[path] == 0.1

    def test_a_fit_that_continues_a_run_of_files_says_nothing(self, tmp_path, recwarn) -> None:
        """The model is in memory, or Keras loaded it."""
        model = train_files(tmp_path / "best.keras", [0.5])
        train_files(tmp_path / "best.keras", [0.4], model)
        train_files(tmp_path / "best.keras", [0.3], keras.models.load_model(tmp_path / "best.keras"))

        assert told(recwarn) == []


class TestPinnedFile:
    """A file of a fixed name that a user pinned: no save replaces it, so a fit could save nothing."""

    @pytest.mark.parametrize("new_run", ["refuse", "replace"])
    def test_a_new_run_is_refused_before_its_first_batch(self, tmp_path, monkeypatch, recwarn, new_run) -> None:
        """One line names each way to type, and no warning says that the fit replaces the file."""
        monkeypatch.chdir(tmp_path)
        pinned_file("run/best.keras")

        with pytest.raises(kc.DirectoryNotEmptyError) as caught:
            train_files("run/best.keras", [0.9], None, Interrupts(0, AssertionError("a batch ran")), new_run=new_run)

        assert str(caught.value) == (
            "run/best.keras (step 1, val_loss 0.1) is of another run and pinned, so this fit could save nothing. In a "
            "shell, keras-ckpt unpin run/best.keras lets the fit replace the file. Or give ModelCheckpoint "
            "new_run='subdirectory', or another filepath."
        )
        assert told(recwarn) == []

    @pytest.mark.filterwarnings("ignore:An earlier training wrote:UserWarning")
    @pytest.mark.filterwarnings("ignore:.* another program has changed:UserWarning")
    @pytest.mark.parametrize("way", ["rm", "subdirectory"])
    @pytest.mark.parametrize("fact", ["damaged", "no record"])
    def test_a_file_of_an_unknown_run_is_refused_before_the_first_batch(self, tmp_path, monkeypatch, fact, way) -> None:
        """The file was cut, or Keras wrote it. Each way of the refusal works as it is typed."""
        monkeypatch.chdir(tmp_path)
        model = pinned_file("best.keras")
        if fact == "damaged":
            os.truncate("best.keras", 1000)
        else:
            dense_model().save("best.keras")

        with pytest.raises(kc.DirectoryNotEmptyError) as caught:
            train_files("best.keras", [0.9], model, Interrupts(1, AssertionError("a batch ran")))
        assert str(caught.value) == (
            f"best.keras ({fact}) is pinned, so this fit could save nothing. In a shell, rm best.keras.keep lets the "
            "fit replace the file. Or give ModelCheckpoint new_run='subdirectory', or another filepath."
        )
        if way == "rm":
            subprocess.run(re.search("rm [^ ]*", str(caught.value))[0], shell=True, check=True)
        train_files("best.keras", [0.9], **({} if way == "rm" else {"new_run": way}))

        place = "best.keras" if way == "rm" else "2/best.keras"
        assert kc.CheckpointDirectory(place).latest().metrics["val_loss"] == 0.9

    @pytest.mark.filterwarnings("ignore:An earlier training wrote:UserWarning")
    @pytest.mark.parametrize("way", ["unpin", "subdirectory"])
    def test_each_way_of_the_refusal_works_as_it_is_typed(self, tmp_path, monkeypatch, way) -> None:
        """The path is quoted for the shell."""
        monkeypatch.chdir(tmp_path)
        pinned_file("it's here/best.keras")
        with pytest.raises(kc.DirectoryNotEmptyError) as caught:
            train_files("it's here/best.keras", [0.9])

        options = {}
        if way == "unpin":
            command = re.search(r"keras-ckpt (unpin .*) lets the fit", str(caught.value))[1]
            assert CliRunner().invoke(main, shlex.split(command)).exit_code == 0
        else:
            options = typed(str(caught.value), way)[1]
        train_files("it's here/best.keras", [0.9], **options)

        assert files(tmp_path / "it's here") == (
            {"best.keras": 0.9} if way == "unpin" else {"best.keras": 0.1, "2/best.keras": 0.9}
        )

    def test_a_fit_that_continues_the_run_of_the_file_warns_once_at_the_users_line(self, tmp_path, monkeypatch) -> None:
        """The end blames no policy."""
        monkeypatch.chdir(tmp_path)
        model = pinned_file("best.keras")

        with pytest.warns(UserWarning, match="is pinned") as warned:
            train_files("best.keras", [0.05, 0.04, 0.03], model, save_best_only=True)

        assert told(warned) == [
            "best.keras (step 1, val_loss 0.1) is pinned, so this fit saves nothing there. In a shell, keras-ckpt "
            "unpin best.keras lets the fit replace the file. Or give ModelCheckpoint another filepath."
        ]
        assert [each.filename for each in warned if each.category is UserWarning] == [fit.__code__.co_filename]
        assert files(tmp_path) == {"best.keras": 0.1}

    @pytest.mark.filterwarnings("ignore:best.keras .* is pinned:UserWarning")
    @pytest.mark.parametrize("best_only", [True, False])
    def test_verbose_promises_no_save_over_a_pinned_file(self, tmp_path, monkeypatch, capsys, best_only) -> None:
        """An improvement is told, and the save after an unpin too."""
        monkeypatch.chdir(tmp_path)
        model = pinned_file("best.keras")
        runs = kc.CheckpointDirectory("best.keras")
        unpins = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: epoch and runs.unpin(1))

        train_files("best.keras", [0.05, 0.04], model, unpins, save_best_only=best_only, verbose=1)

        lines = [line for line in capsys.readouterr().out.splitlines() if line]
        improved = [
            f"val_loss improved from {change}, " * best_only for change in ("0.10000 to 0.05000", "0.05000 to 0.04000")
        ]
        assert lines == [
            f"Epoch 1: {improved[0]}best.keras is pinned and stays",
            f"Epoch 2: {improved[1]}saving model to best.keras",
            "Epoch 2: finished saving model to best.keras",
        ]

    def test_a_pin_that_is_set_during_the_fit_is_warned_of_once_at_the_users_line(self, tmp_path, monkeypatch) -> None:
        """A background thread finds the pin. The warning waits for the training thread."""
        monkeypatch.chdir(tmp_path)
        runs = kc.CheckpointDirectory("best.keras")
        pins = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: epoch == 1 and runs.pin(1))
        checkpoint = kc.ModelCheckpoint("best.keras")

        with pytest.warns(UserWarning, match="is pinned") as warned:
            fit(dense_model(), pins, Reports(val_loss=[0.3, 0.2, 0.1]), checkpoint, epochs=3, batches=1)

        assert told(warned) == [
            f"Step 2 is not saved into {tmp_path}: best.keras of step 1 is pinned. Unpin it, or train into another "
            "directory."
        ]
        assert [each.filename for each in warned if each.category is UserWarning] == [fit.__code__.co_filename]
        assert files(tmp_path) == {"best.keras": 0.3}


def pinned_file(path: str) -> keras.Model:
    """Trains a run whose only file is pinned. Returns the model."""
    model = train_files(path, [0.1])
    kc.CheckpointDirectory(path).pin(1, "paper")
    return model


def train_files(path: str | os.PathLike[str], losses, model=None, *callbacks, **options) -> keras.Model:
    """Trains with epochs of one batch that report these validation losses. Returns the model."""
    model = model or dense_model()
    checkpoint = kc.ModelCheckpoint(path, **options)
    fit(model, Reports(val_loss=losses), checkpoint, *callbacks, epochs=len(losses), batches=1)
    return model


def told(warned: pytest.WarningsRecorder) -> list[str]:
    """The warnings for a user. Keras's own writer causes others, of NumPy."""
    return [str(each.message) for each in warned if each.category is UserWarning]


def files(folder: pathlib.Path) -> dict[str, float]:
    """The validation loss of each file that has a record, by its path below a folder."""
    background.wait()
    found = {}
    for path in folder.rglob("*.json"):
        with Folder(path.parent) as place:
            record = tails.read_tail(place, path.stem)[1]
        found[str(path.relative_to(folder).with_suffix(""))] = record.metrics["val_loss"]
    return found


def die_before_pruning(train, path: str) -> int:
    """Trains a new run that is killed when its first checkpoint is committed. Returns the exit code."""
    with Child(train_and_die, train, path) as child:
        child.go()
        return child.end()


def train_and_die(acknowledge, train, path: str) -> None:
    Writer.retain = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    train(path, [0.9, 0.8], new_run="replace")


def test_a_writer_refuses_a_run_that_it_does_not_replace(filler) -> None:
    """Two fits of one process save at once."""
    filler.save("10", run_id="other")
    writer = Writer(filler.runs)
    writer.open(session=object())

    with pytest.raises(kc.SaveError, match="checkpoints of another run, the newest of step 10"):
        writer.save(SaveRequest(step=20, run_id="new"), payload())
    writer.replaced = {"other"}
    writer.save(SaveRequest(step=20, run_id="new"), payload())

    assert steps(filler.runs) == [20]
    writer.close()
