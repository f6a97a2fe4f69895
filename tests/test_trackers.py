"""The recipes of docs/guides/trackers.md, with the real packages where they are installed."""

import os
import pathlib
import re

import keras
import pytest
import tensorflow as tf

import keras_ckpt as kc
from support.models import X, Y, dense_model

PAGE = (pathlib.Path(__file__).parents[1] / "docs" / "guides" / "trackers.md").read_text()
RECIPES = dict(re.findall(r"^## ([^\n]*)\n(?:(?!^## ).)*?```python \w+\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))

FOREIGN = pytest.mark.filterwarnings("ignore", "error:on_")
"""Warnings of the other packages are ignored, and those of failed functions are not."""


@pytest.fixture
def directory(tmp_path, monkeypatch) -> pathlib.Path:
    """The working directory of a recipe."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def needed(name: str):
    """A package of the extra."""
    return pytest.importorskip(name, reason="needs the extra 'trackers'")


def follow(title: str, *, path: tuple[str, str] = ("", ""), **names: object) -> dict[str, object]:
    """Runs a recipe, with data, a model and its other names. Returns all names that it leaves.

    Args:
        title: The heading of the recipe.
        path: A path in the recipe, and the path to use in its place.
        **names: The other names.
    """
    data = {"x": X, "y": Y, "valid": (X, Y), "model": dense_model(), "kc": kc, "keras": keras, "tf": tf}
    found = {**data, **names}
    exec(RECIPES[title].replace(*path), found)
    return found


def test_tensorboard_shows_the_metrics_of_each_checkpoint(directory) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    follow("TensorBoard")

    events = EventAccumulator(str(directory / "logs")).Reload()
    records = list(kc.CheckpointDirectory("runs/tensorboard"))
    shown = [(event.step, tf.make_ndarray(event.tensor_proto)) for event in events.Tensors("checkpoint/val_loss")]
    assert [step for step, _ in shown] == [record.step for record in records]
    assert [float(value) for _, value in shown] == pytest.approx([record.metrics["val_loss"] for record in records])
    assert [tf.make_ndarray(event.tensor_proto).item().decode() for event in events.Tensors("checkpoint")] == [
        record.prefix for record in records
    ]


@FOREIGN
def test_mlflow_has_the_files_of_each_checkpoint_in_the_current_run(directory) -> None:
    """No other run has begun. The artifacts are a checkpoint that restores."""
    mlflow = needed("mlflow")
    mlflow.set_tracking_uri(f"sqlite:///{directory}/mlflow.db")
    mlflow.create_experiment("checkpoints", artifact_location=(directory / "artifacts").as_uri())
    mlflow.set_experiment("checkpoints")

    follow("MLflow", mlflow=mlflow)

    [run] = mlflow.search_runs(output_format="list")
    [record] = kc.CheckpointDirectory("runs/mlflow")
    artifacts = mlflow.artifacts.download_artifacts(run_id=run.info.run_id, artifact_path=f"checkpoints/{record.step}")
    copy = kc.CheckpointDirectory(artifacts)
    assert copy.verify().ok
    assert copy.latest().same_save(record)


@FOREIGN
def test_weights_and_biases_has_an_artifact_of_each_checkpoint(directory, monkeypatch) -> None:
    """Without a network."""
    wandb = needed("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    logged, log_artifact = [], wandb.Run.log_artifact

    def listen(run, artifact, **named):
        logged.append((artifact.metadata["step"], sorted(artifact.manifest.entries)))
        return log_artifact(run, artifact, **named)

    monkeypatch.setattr(wandb.Run, "log_artifact", listen)
    follow("Weights & Biases", wandb=wandb)

    records = kc.CheckpointDirectory("runs/wandb")
    assert logged == [(record.step, sorted(map(os.path.basename, record.paths))) for record in records]
    assert len(logged) == 2


@FOREIGN
@pytest.mark.parametrize("path", ["runs/all", "tuned/best.keras"])
def test_each_trial_of_keras_tuner_has_a_directory(directory, path) -> None:
    """With the default, every trial but the first would be refused."""
    keras_tuner = needed("keras_tuner")

    def build(hyperparameters):
        rate = hyperparameters.Choice("rate", [0.1, 0.01, 0.001])
        return dense_model(optimizer=keras.optimizers.Adam(rate))

    tuner = keras_tuner.GridSearch(build, "val_loss", directory=directory, project_name="tuner", max_trials=3)
    follow("KerasTuner", path=("runs/all", path), tuner=tuner)

    trials = tuner.oracle.trials.values()
    assert [trial.status for trial in trials] == ["COMPLETED"] * 3
    folder, _, file = path.rpartition("/") if path.endswith(".keras") else (path, "", "")
    runs = [kc.CheckpointDirectory(os.path.join(folder, place, file)) for place in ("", "2", "3")]
    best = [run.best("val_loss").metrics["val_loss"] for run in runs]
    assert best == pytest.approx([trial.score for trial in trials])
    assert len({run.latest().run_id for run in runs}) == 3


@FOREIGN
def test_aim_tracks_the_metrics_of_each_checkpoint(directory) -> None:
    """Its run has the path of each checkpoint too."""
    aim = needed("aim")
    from aim.storage.context import Context

    aim.Repo.from_path("aim", init=True)

    names = follow("Aim", aim=aim)

    run, records = names["run"], list(kc.CheckpointDirectory("runs/aim"))
    steps, (losses, *_) = run.get_metric("val_loss", Context({"subset": "checkpoint"})).data.numpy()
    _, (paths, *_) = run.get_text_sequence("checkpoint", Context({})).data.items_list()
    run.close()
    assert list(steps) == [record.step for record in records]
    assert list(losses) == pytest.approx([record.metrics["val_loss"] for record in records])
    assert [path.data for path in paths] == [record.prefix for record in records]
