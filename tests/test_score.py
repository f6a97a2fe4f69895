"""`score`: a metric that a function makes of several metrics of an epoch's end."""

import re

import pytest

import keras_ckpt as kc
from support.models import Reports, X, Y, dense_model, fit


def scores(runs: kc.CheckpointDirectory) -> dict[int, float | None]:
    return {record.step: record.metrics.get("score") for record in runs}


def balance(logs) -> float:
    return logs["precision"] + logs["recall"]


REPORTED = {"precision": [0.25, 0.5, 0.75], "recall": [0.5, 0.75, 0.25]}


def test_checkpoints_are_ranked_by_the_score_if_no_monitor_is_given(runs, capsys) -> None:
    """More is better. The records and the lines have the score."""
    checkpoint = kc.ModelCheckpoint(runs.path, score=balance, keep=kc.BestN(2), verbose=1, save_on_background=False)
    fit(dense_model(), Reports(**REPORTED), checkpoint, epochs=3, batches=1)

    assert scores(runs) == {2: 1.25, 3: 1.0}
    assert (runs[2].monitor, runs[2].mode) == ("score", "max")
    assert runs.best() == runs[2]
    assert "epoch 2: score improved from 0.75 to 1.25, saved" in capsys.readouterr().out


def test_a_smaller_score_is_better_in_mode_min(runs) -> None:
    checkpoint = kc.ModelCheckpoint(runs.path, score=balance, mode="min", save_best_only=True)
    fit(dense_model(), Reports(**REPORTED), checkpoint, epochs=3, batches=1)

    assert scores(runs) == {1: 0.75}


def test_a_score_beside_a_monitor_is_one_more_metric(runs) -> None:
    """A policy and `best` can rank by it, and know its mode. The mode of the callback is that of the monitor."""
    keep = kc.BestN(1) | kc.BestN(1, "score")
    fit(
        dense_model(),
        Reports(**REPORTED),
        kc.ModelCheckpoint(runs.path, "recall", mode="min", score=balance, keep=keep),
        epochs=3,
        batches=1,
    )

    assert list(scores(runs)) == [2, 3]
    assert runs.best() == runs[3]
    assert runs.best("score") == runs[2]


def test_a_score_is_known_at_an_epochs_end_alone(tmp_path) -> None:
    """A template may name it. A save in the middle of an epoch waits for the score, as for a metric of validation."""
    template = tmp_path / "{epoch}-{score:.1f}.keras"
    checkpoint = kc.ModelCheckpoint(
        template, score=lambda logs: logs["val_loss"] * 0 + 2, save_freq=2, keep=kc.BestN(1)
    )
    fit(dense_model(), checkpoint, validation_data=(X, Y), epochs=1, batches=4)

    assert [(record.name, record.step) for record in kc.CheckpointDirectory(template)] == [("1-2.0.keras", 4)]


def test_the_logs_of_other_callbacks_have_no_score(runs) -> None:
    """A callback that watches changes nothing."""
    history = fit(dense_model(), kc.ModelCheckpoint(runs.path, score=lambda logs: 1.0))

    assert history.history.keys() == {"loss"}


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("score", "cause"),
    [
        (lambda logs: logs["val_auc"], "KeyError('val_auc')"),
        (lambda logs: "high", "TypeError(\"A metric is one number. Received: score='high'. Reduce it first.\")"),
        (lambda logs: None, "Received: score=None"),
    ],
    ids=["error", "text", "none"],
)
@pytest.mark.filterwarnings("ignore:The monitored metric 'score' is not there")
def test_a_score_that_fails_in_the_first_epoch_is_an_error_after_the_save(runs, score, cause) -> None:
    """The error has the names in the logs. The trained epoch is on disk, although nothing can rank it."""
    with pytest.raises(ValueError, match=rf"score.logs. gave no number: .*{re.escape(cause)}.* The logs have loss\. "):
        fit(dense_model(), kc.ModelCheckpoint(runs.path, score=score, keep=kc.BestN(1)), epochs=3, batches=1)

    assert scores(runs) == {1: None}


def test_a_score_beside_a_metric_of_this_name_is_an_error(runs) -> None:
    """Neither takes the place of the other without a word."""
    with pytest.raises(ValueError, match="the model has a metric 'score' of its own"):
        fit(dense_model(), Reports(score=[0.5]), kc.ModelCheckpoint(runs.path, score=lambda logs: 1.0), batches=1)

    assert scores(runs) == {1: 0.5}


def test_a_score_that_fails_in_a_later_epoch_is_a_warning(runs) -> None:
    """The checkpoint of that epoch is never best, and training continues."""
    checkpoint = kc.ModelCheckpoint(runs.path, score=lambda logs: 1 / logs["rest"], keep=kc.BestN(2))
    with pytest.warns(UserWarning, match=r"ZeroDivisionError.*This epoch has no score\. Training continues"):
        fit(dense_model(), Reports(rest=[4, 0, 2]), checkpoint, epochs=3, batches=1)

    assert scores(runs) == {1: 0.25, 3: 0.5}


def test_a_score_that_is_no_function_is_refused(runs) -> None:
    with pytest.raises(TypeError, match=r"score expected a function of the logs.*Received: 'f1'"):
        kc.ModelCheckpoint(runs.path, score="f1")
