"""Files of Keras in the store: each carries its record, and each template is a series of its own."""

from __future__ import annotations

import os
import pathlib
import shutil
import time

import msgspec
import pytest

from keras_ckpt.errors import DamagedCheckpointError
from keras_ckpt.store import tails
from keras_ckpt.store.directory import CheckpointDirectory
from keras_ckpt.store.files import PRIVATE, Folder
from keras_ckpt.store.layout import TENSORFLOW
from keras_ckpt.store.policies import BestN, LatestN
from keras_ckpt.store.record import CheckpointRecord
from keras_ckpt.store.writer import SaveRequest, Writer
from support.runs import file_payload
from test_writer import crash_in


def save(path: object, step: int, name: str, keep=None, only=None, **facts: object) -> CheckpointRecord | None:
    """Saves a file whose content is its step."""
    facts = {"run_id": "run", "batch": 0, **facts}
    writer = Writer(CheckpointDirectory(path), keep, only)
    record = writer.save(SaveRequest(step=step, name=name, **facts), file_payload(f"content {step}".encode()))
    writer.close()
    return record


def contents(folder: pathlib.Path) -> dict[str, str]:
    """The contents of the files in a folder, without their records, by name."""
    files = [path for path in folder.rglob("*") if path.suffix in (".keras", ".h5") and path.is_file()]
    visible = {str(path.relative_to(folder)): path for path in files if PRIVATE not in path.parts}
    return {name: path.read_bytes().partition(b"{")[0].decode() for name, path in visible.items()}


def steps(path: object) -> list[int]:
    """The steps of a series, with every byte checked."""
    found = CheckpointDirectory(path).verify()
    assert found.ok, found
    return [record.step for record in found.listing.records]


def test_a_file_carries_its_record(tmp_path) -> None:
    """Without the sidecar beside it, the listing has the same record, but for the times of the save."""
    path = tmp_path / "best.keras"
    record = save(path, 10, "best.keras", metrics={"loss": 0.5}, metadata={"a": 1})

    (tmp_path / "best.keras.json").unlink()
    found = CheckpointDirectory(path).latest()

    assert found.same_save(record)
    assert (found.metrics, found.metadata, found.files) == ({"loss": 0.5}, {"a": 1}, record.files)
    assert steps(path) == [10]


def test_metadata_too_long_for_the_file_is_in_the_sidecar_alone(tmp_path) -> None:
    """A zip archive's comment has at most 65,535 bytes."""
    path = tmp_path / "best.keras"
    metadata = {"text": "x" * 100_000}
    save(path, 10, "best.keras", metadata=metadata)
    assert CheckpointDirectory(path).latest().metadata == metadata

    (tmp_path / "best.keras.json").unlink()

    assert CheckpointDirectory(path).latest().metadata == {}


def test_seeds_too_many_for_the_file_are_in_the_sidecar_alone(tmp_path) -> None:
    """The metadata gives way first."""
    path = tmp_path / "best.keras"
    seeds = {f"model/dropout_{number}/seed_generator/seed_generator_state": [1, 2] for number in range(1000)}
    save(path, 10, "best.keras", seeds=seeds)
    assert CheckpointDirectory(path).latest().seeds == seeds

    (tmp_path / "best.keras.json").unlink()

    assert CheckpointDirectory(path).latest().seeds == {}


def test_a_copied_file_tells_its_record_under_its_new_name(tmp_path) -> None:
    """The copy needs neither the sidecar nor its folder."""
    record = save(tmp_path / "best.keras", 10, "best.keras", metrics={"loss": 0.5})
    shutil.copy(tmp_path / "best.keras", tmp_path / "mail.keras")
    directory = CheckpointDirectory(tmp_path / "mail.keras")

    with directory.open() as folder:
        _, found = tails.read_tail(folder, "mail.keras")

    assert found.same_save(record)
    assert found.metrics == {"loss": 0.5}
    assert found.files[0].name == "mail.keras"


def test_a_copied_file_may_have_a_brace_in_its_name(tmp_path) -> None:
    """The name is no template. The directory is listed too."""
    save(tmp_path / "best.keras", 10, "best.keras")
    shutil.copy(tmp_path / "best.keras", tmp_path / "a{b.keras")

    assert steps(tmp_path / "a{b.keras") == [10]
    templates = {each.series.template for each in CheckpointDirectory(tmp_path).each_series()}
    assert templates == {"a{b.keras", "best.keras"}


def test_a_fixed_name_holds_the_newest_save(tmp_path) -> None:
    """Each save replaces the file and its record."""
    path = tmp_path / "last.keras"
    for step in (10, 20, 30):
        save(path, step, "last.keras")

    assert steps(path) == [30]
    assert contents(tmp_path) == {"last.keras": "content 30"}
    assert sorted(os.listdir(tmp_path)) == [PRIVATE, "last.keras", "last.keras.json"]


def test_a_worse_save_does_not_replace_a_file_of_the_best(tmp_path) -> None:
    """The file of the same name counts, although the save would supersede it."""
    path, best = tmp_path / "best.keras", BestN(1, "loss", "min")
    save(path, 10, "best.keras", only=best, metrics={"loss": 0.5})

    assert save(path, 20, "best.keras", only=best, metrics={"loss": 0.6}) is None
    assert save(path, 30, "best.keras", only=best, metrics={"loss": 0.4}).step == 30
    assert contents(tmp_path) == {"best.keras": "content 30"}


def test_a_policy_prunes_the_files_of_a_template(tmp_path) -> None:
    """The files go with their sidecars."""
    path = tmp_path / "{epoch:02d}-{loss:.1f}.keras"
    for step in (1, 2, 3):
        save(path, step, f"0{step}-0.5.keras", LatestN(2))

    assert steps(path) == [2, 3]
    assert sorted(os.listdir(tmp_path)) == [
        PRIVATE, "02-0.5.keras", "02-0.5.keras.json", "03-0.5.keras", "03-0.5.keras.json",
    ]  # fmt: skip


def test_two_saves_of_one_name_both_stay_if_the_policy_keeps_both(tmp_path) -> None:
    """The template `{loss:.1f}.keras` gives two losses one name."""
    path = tmp_path / "{loss:.1f}.weights.h5"
    for step in (1, 2, 3):
        save(path, step, "0.5.weights.h5", LatestN(2))

    assert steps(path) == [2, 3]
    assert len(contents(tmp_path)) == 2
    assert set(contents(tmp_path).values()) == {"content 2", "content 3"}


def test_two_saves_of_one_name_replace_each_other_without_a_policy(tmp_path) -> None:
    """As with Keras."""
    path = tmp_path / "{loss:.1f}.keras"
    for step in (1, 2):
        save(path, step, "0.5.keras")

    assert contents(tmp_path) == {"0.5.keras": "content 2"}


def test_a_writer_sees_its_saves_into_folders_that_are_there(tmp_path) -> None:
    """A save into a sub-folder does not change the time of the directory above."""
    directory = CheckpointDirectory(tmp_path / "e{epoch}/m.keras")
    for step in (1, 2, 3):
        save(tmp_path / "e{epoch}/m.keras", step, f"e{step}/m.keras", run_id="first")
    time.sleep(0.2)  # then the time of the directory is trusted
    writer = Writer(directory, LatestN(2))

    for step in (1, 2, 3):
        request = SaveRequest(step=step, name=f"e{step}/m.keras", run_id="second", batch=0)
        writer.save(request, file_payload(b"second"))

    assert [(record.step, record.sequence) for record in directory.listing().records] == [(2, 5), (3, 6)]


def test_a_directory_with_the_files_of_one_template_is_that_series(tmp_path) -> None:
    """`keras-ckpt ls runs` and `CheckpointDirectory("runs")` need no template."""
    for step in (1, 2):
        save(tmp_path / "{epoch}.keras", step, f"{step}.keras")
    directory = CheckpointDirectory(tmp_path)

    assert [record.name for record in directory] == ["1.keras", "2.keras"]
    assert directory.prune(LatestN(1)) == [1]
    assert set(contents(tmp_path)) == {"2.keras"}


def test_the_path_of_a_file_means_the_file_alone(tmp_path) -> None:
    """The other files of its template are not listed, verified or pinned."""
    for step in (1, 2):
        save(tmp_path / "{epoch}.keras", step, f"{step}.keras")
    file = CheckpointDirectory(tmp_path / "2.keras")

    assert [record.name for record in file] == ["2.keras"]
    assert steps(tmp_path / "2.keras") == [2]
    assert 1 not in file
    file.pin(2)
    assert [record.pinned for record in CheckpointDirectory(tmp_path / "{epoch}.keras")] == [False, True]


@pytest.mark.parametrize(
    "choose",
    [
        CheckpointDirectory.clear,
        CheckpointDirectory.latest,
        CheckpointDirectory.best,
        lambda file: file.plan(1),
        lambda file: file.prune(LatestN(1)),
        lambda file: file.prune(CheckpointDirectory(os.path.join(file.path, "{epoch}.keras")).plan(1)),
    ],
    ids=["clear", "latest", "best", "plan", "prune by policy", "prune by plan"],
)
def test_nothing_is_chosen_or_removed_by_the_path_of_one_file(tmp_path, monkeypatch, choose) -> None:
    """The error has the path of all files of the template."""
    monkeypatch.chdir(tmp_path)
    for step in (1, 2):
        save("w/{epoch}.keras", step, f"{step}.keras")

    with pytest.raises(ValueError, match=r"^w/1.keras is one file of a template\. .* type 'w/\{epoch\}.keras'\.$"):
        choose(CheckpointDirectory("w/1.keras"))

    assert steps("w/{epoch}.keras") == [1, 2]


def test_a_directory_with_the_files_of_several_templates_asks_for_a_template(tmp_path, monkeypatch) -> None:
    """The error has the path of each template, which works."""
    monkeypatch.chdir(tmp_path)
    save("w/best.keras", 1, "best.keras")
    for step in (1, 2):
        save("w/{epoch}.keras", step, f"{step}.keras")

    with pytest.raises(ValueError, match=r"^w has files of several templates\.") as error:
        list(CheckpointDirectory("w"))

    assert str(error.value).endswith("Name a template instead of the directory: 'w/best.keras' or 'w/{epoch}.keras'.")
    assert [record.step for record in CheckpointDirectory("w/best.keras")] == [1]
    assert [record.step for record in CheckpointDirectory("w/{epoch}.keras")] == [1, 2]


def test_each_series_of_a_directory_is_found(tmp_path) -> None:
    """The path means the TensorFlow checkpoints, which have no template."""
    for template, name in (("best.keras", "best.keras"), ("m-{epoch}.keras", "m-1.keras")):
        save(tmp_path / template, 1, name)
    (tmp_path / "mine.keras").write_bytes(b"by hand")
    (tmp_path / "ckpt-1.index").write_bytes(b"")
    directory = CheckpointDirectory(tmp_path)

    found = [each.series.template for each in directory.each_series()]

    assert found == ["", "best.keras", "m-{epoch}.keras", "mine.keras"]
    assert directory.listing().unmanaged == ("ckpt-1",)


def test_a_copied_file_is_a_series_of_its_own(tmp_path) -> None:
    """It has the same step as the file of the template, and neither is damaged."""
    save(tmp_path / "{epoch}.keras", 1, "1.keras", metrics={"loss": 0.5})
    shutil.copy(tmp_path / "1.keras", tmp_path / "best.keras")

    assert steps(tmp_path / "1.keras") == [1]
    assert steps(tmp_path / "best.keras") == [1]
    assert CheckpointDirectory(tmp_path / "best.keras").latest().metrics == {"loss": 0.5}
    save(tmp_path / "best.keras", 2, "best.keras")
    assert steps(tmp_path / "best.keras") == [2]


def test_a_file_of_an_earlier_run_can_be_pinned(tmp_path) -> None:
    """Its record is in the listing."""
    save(tmp_path / "{epoch}.keras", 1, "1.keras", run_id="first")
    save(tmp_path / "{epoch}.keras", 1, "2.keras", run_id="second")
    directory = CheckpointDirectory(tmp_path)

    directory.pin(directory.listing().named("1.keras"), "mine")

    listing = directory.listing()
    assert listing.named("1.keras").pin == "mine"
    assert listing.named("2.keras").pin is None


def test_a_template_may_have_fields_in_its_folders(tmp_path) -> None:
    """A folder that becomes empty goes with its last file; a folder with a user's file stays."""
    path = tmp_path / "e{epoch}/{loss}/m.keras"
    for step in (1, 2, 3):
        save(path, step, f"e{step}/0.5/m.keras", LatestN(2))
    assert steps(path) == [2, 3]
    (tmp_path / "e2" / "notes.txt").write_text("mine")

    save(path, 4, "e4/0.5/m.keras", LatestN(1))

    assert steps(path) == [4]
    assert CheckpointDirectory(path).latest().prefix == f"{tmp_path}/e4/0.5/m.keras"
    assert sorted(os.listdir(tmp_path)) == [PRIVATE, "e2", "e4"]
    assert os.listdir(tmp_path / "e2") == ["notes.txt"]


def test_a_directory_means_the_files_in_folders_with_fields(tmp_path) -> None:
    """The directory of `runs/e{epoch}/m.keras` is `runs`; other files of Keras in it are a series of their own."""
    path = tmp_path / "runs" / "e{epoch}" / "m.keras"
    save(path, 1, "e1/m.keras")
    save(path, 2, "e2/m.keras")
    runs = CheckpointDirectory(tmp_path / "runs")

    assert [record.name for record in runs] == ["e1/m.keras", "e2/m.keras"]
    assert [each.series.template for each in runs.each_series()] == ["e{epoch}/m.keras"]

    CheckpointDirectory(path).clear()

    assert list(runs) == []
    assert [each.series for each in runs.each_series()] == [TENSORFLOW]


def test_series_in_one_folder_do_not_see_each_other(tmp_path) -> None:
    """A template may match the names of another series, and TensorFlow checkpoints may be there too."""
    for step in (1, 2, 3):
        save(tmp_path / "{epoch}.keras", step, f"{step}.keras", LatestN(2))
        save(tmp_path / "last.keras", step, "last.keras", LatestN(1))

    assert steps(tmp_path / "{epoch}.keras") == [2, 3]
    assert steps(tmp_path / "last.keras") == [3]
    assert set(contents(tmp_path)) == {"2.keras", "3.keras", "last.keras"}


def test_the_files_of_another_run_stay_and_are_not_ranked(tmp_path) -> None:
    """A new run replaces the files of its own names alone."""
    path, best = tmp_path / "{epoch}.keras", BestN(1, "loss", "min")
    save(path, 1, "1.keras", run_id="first", metrics={"loss": 0.1})
    save(path, 2, "2.keras", run_id="first", metrics={"loss": 0.2})

    assert save(path, 1, "1.keras", best, best, run_id="second", metrics={"loss": 0.9}).step == 1
    save(path, 5, "5.keras", best, best, run_id="second", metrics={"loss": 0.8})

    listing = CheckpointDirectory(path).listing()
    assert [record.name for record in listing.records] == ["5.keras"]
    assert [record.name for record in listing.other_runs] == ["2.keras"]
    assert set(contents(tmp_path)) == {"2.keras", "5.keras"}


def test_a_file_that_its_user_wrote_over_is_listed_as_without_a_record_and_never_pruned(tmp_path) -> None:
    """`model.save("1.keras")` by hand makes the file the user's."""
    path = tmp_path / "{epoch}.keras"
    for step in (1, 2):
        save(path, step, f"{step}.keras")
    (tmp_path / "1.keras").write_bytes(b"by hand")

    save(path, 3, "3.keras", LatestN(1))

    listing = CheckpointDirectory(path).listing()
    assert [record.step for record in listing.records] == [3]
    assert listing.unmanaged == ("1.keras",)
    assert contents(tmp_path) == {"1.keras": "by hand", "3.keras": "content 3"}


def test_a_save_that_replaces_a_file_which_its_user_wrote_over_warns(tmp_path) -> None:
    """The file has one name, so the save replaces it, as with Keras."""
    path = tmp_path / "best.keras"
    save(path, 1, "best.keras")
    path.write_bytes(b"by hand")

    with pytest.warns(UserWarning, match="Step 2 replaces best.keras in .*, which another program has changed"):
        save(path, 2, "best.keras")

    assert contents(tmp_path) == {"best.keras": "content 2"}


@pytest.mark.parametrize("ours", [True, False])
def test_a_pinned_file_without_a_record_is_not_replaced(tmp_path, ours) -> None:
    """Its user wrote it by hand, over a file of this package or alone."""
    path = tmp_path / "best.keras"
    if ours:
        save(path, 1, "best.keras")
    path.write_bytes(b"by hand")
    (tmp_path / "best.keras.keep").touch()

    with pytest.warns(UserWarning, match="best.keras in .* is pinned and has no record, so step 2 does not replace it"):
        assert save(path, 2, "best.keras") is None

    assert contents(tmp_path) == {"best.keras": "by hand"}


@pytest.fixture
def removed_by_hand(tmp_path) -> pathlib.Path:
    """A template with two files, of which the user removed the first."""
    path = tmp_path / "{epoch}.keras"
    for step in (1, 2):
        save(path, step, f"{step}.keras")
    (tmp_path / "1.keras").unlink()
    return path


def test_the_sidecar_of_a_file_that_was_removed_by_hand_goes_at_the_next_start(tmp_path, removed_by_hand) -> None:
    """It is no checkpoint."""
    save(removed_by_hand, 3, "3.keras")

    assert sorted(each.name for each in tmp_path.glob("*.json")) == ["2.keras.json", "3.keras.json"]


def test_a_worse_save_does_not_replace_a_file_of_its_name(tmp_path) -> None:
    """The policy keeps the better file alone, so the worse is not written."""
    path, best = tmp_path / "{loss:.1f}.keras", BestN(1, "loss", "min")
    save(path, 1, "0.5.keras", best, metrics={"loss": 0.51})

    assert save(path, 2, "0.5.keras", best, metrics={"loss": 0.54}) is None
    assert contents(tmp_path) == {"0.5.keras": "content 1"}


def test_a_file_that_was_removed_by_hand_is_no_damage(removed_by_hand) -> None:
    """Its sidecar alone is no checkpoint, and the next save of the name replaces it."""
    assert steps(removed_by_hand) == [2]
    save(removed_by_hand, 3, "1.keras")
    assert steps(removed_by_hand) == [2, 3]


def test_metrics_that_are_added_later_are_in_the_sidecar(tmp_path) -> None:
    """The file does not change; the sidecar of the same save has the metrics of both."""
    path = tmp_path / "best.keras"
    save(path, 10, "best.keras", metrics={"loss": 0.5})
    before = (tmp_path / "best.keras").read_bytes()

    CheckpointDirectory(path).add_metrics(10, test=0.9)

    assert CheckpointDirectory(path).latest().metrics == {"loss": 0.5, "test": 0.9}
    assert (tmp_path / "best.keras").read_bytes() == before


def test_the_sidecar_of_another_save_is_not_believed(tmp_path) -> None:
    """The record in the file holds, for example when a user copies an older file back."""
    path = tmp_path / "best.keras"
    save(path, 10, "best.keras", metrics={"loss": 0.5})
    older = (tmp_path / "best.keras").read_bytes()
    save(path, 20, "best.keras", metrics={"loss": 0.4})

    (tmp_path / "best.keras").write_bytes(older)

    record = CheckpointDirectory(path).latest()
    assert (record.step, record.metrics) == (10, {"loss": 0.5})
    CheckpointDirectory(path).add_metrics(10, test=0.9)
    assert CheckpointDirectory(path).latest().metrics == {"loss": 0.5, "test": 0.9}


def test_a_pinned_file_is_neither_replaced_nor_pruned(tmp_path) -> None:
    """A save that would replace it is refused with a warning."""
    path = tmp_path / "{epoch}.keras"
    save(path, 1, "1.keras")
    CheckpointDirectory(path).pin(1, "the paper")

    with pytest.warns(UserWarning, match="1.keras of step 1 is pinned"):
        assert save(path, 2, "1.keras") is None
    save(path, 3, "3.keras", LatestN(1))

    assert steps(path) == [1, 3]


def test_a_new_run_does_not_replace_a_pinned_file_of_an_earlier_run(tmp_path) -> None:
    """The script that trains again must not lose the model that its user pinned."""
    path = tmp_path / "best.keras"
    save(path, 1, "best.keras", run_id="first")
    CheckpointDirectory(path).pin(1, "in production")

    with pytest.warns(UserWarning, match="best.keras of step 1 is pinned"):
        assert save(path, 5, "best.keras", run_id="second") is None

    assert contents(tmp_path) == {"best.keras": "content 1"}
    assert CheckpointDirectory(path).latest().pin == "in production"


def test_recovery_keeps_a_pin_that_came_after_the_crash(tmp_path, monkeypatch) -> None:
    """A process died before or after the rename of the file; its user then pinned the file that is there."""
    pinned = set()
    for calls in range(200):
        folder = tmp_path / str(calls)
        path = folder / "last.keras"
        save(path, 1, "last.keras")
        crashed = crash_in(monkeypatch, calls, lambda path=path: save(path, 2, "last.keras"))
        there = contents(folder)
        (folder / "last.keras.keep").touch()

        writer = Writer(CheckpointDirectory(path))
        writer.open()
        writer.close()

        assert contents(folder) == there
        assert CheckpointDirectory(path).latest().pinned
        pinned |= set(there.values())
        if not crashed:
            break
    assert pinned == {"content 1", "content 2"}


def test_a_changed_byte_is_found(tmp_path) -> None:
    """The digest in the record is of all bytes before it."""
    path = tmp_path / "best.keras"
    save(path, 10, "best.keras")
    data = bytearray((tmp_path / "best.keras").read_bytes())
    data[3] ^= 1
    (tmp_path / "best.keras").write_bytes(data)

    found = CheckpointDirectory(path).verify()

    assert not found.ok
    assert isinstance(found.listing.damaged["best.keras"], DamagedCheckpointError)


def test_a_changed_byte_of_the_record_is_damage(tmp_path) -> None:
    """The file would lose its metrics and its run without a word."""
    path = tmp_path / "best.keras"
    save(path, 10, "best.keras", metrics={"loss": 0.5})
    path.write_bytes(path.read_bytes().replace(b'"loss"', b'"lass"'))

    assert isinstance(CheckpointDirectory(path).listing().damaged["best.keras"], DamagedCheckpointError)


def forge(path: pathlib.Path, size: int | None = None, digest: str | None = None, **facts: object) -> None:
    """Gives a file a record that lies, and that has a correct digest of itself."""
    with Folder(path.parent) as folder:
        end, record = tails.read_tail(folder, path.name)
    (file,) = record.files
    tail = tails.tail(msgspec.structs.replace(record, **facts), size or file.size, digest or file.digest)
    path.write_bytes(path.read_bytes()[:end] + tail)
    path.with_name(f"{path.name}.json").unlink()


@pytest.mark.parametrize(
    "lie",
    [
        {"size": 3},
        {"size": 2**62},
        {"digest": f"blake3:{'0' * 64}"},
        {"template": "../{epoch}.keras"},
        {"template": "{epoch"},
        {"template": "{epoch.keras"},
        {"template": "other.keras"},
        {"template": ""},
    ],
    ids=str,
)
def test_a_file_whose_record_lies_is_damaged(tmp_path, lie) -> None:
    """The file beside it is whole."""
    for step in (1, 2):
        save(tmp_path / "{epoch}.keras", step, f"{step}.keras")
    forge(tmp_path / "1.keras", **lie)
    directory = CheckpointDirectory(tmp_path / "{epoch}.keras")

    found = directory.verify()

    assert isinstance(found.listing.damaged["1.keras"], DamagedCheckpointError)
    assert [record.step for record in found.listing.records] == [2]
    assert "1.keras" in CheckpointDirectory(tmp_path / "1.keras").verify().listing.damaged


@pytest.mark.parametrize("lie", [{"size": 3}, {"template": "../{epoch}.keras"}], ids=str)
def test_a_file_whose_record_lies_is_not_pruned(tmp_path, lie) -> None:
    """Its user may still find its values."""
    path = tmp_path / "{epoch}.keras"
    save(path, 1, "1.keras")
    forge(tmp_path / "1.keras", **lie)

    save(path, 2, "2.keras", LatestN(1))

    assert contents(tmp_path) == {"1.keras": "content 1", "2.keras": "content 2"}


def test_a_file_with_the_record_of_another_file_is_damaged(tmp_path) -> None:
    """Its digest in the record is of other bytes."""
    for step in (1, 2):
        save(tmp_path / "{epoch}.keras", step, f"{step}.keras")
    record = (tmp_path / "2.keras").read_bytes().removeprefix(b"content 2")
    (tmp_path / "1.keras").write_bytes(b"content 1" + record)

    found = CheckpointDirectory(tmp_path / "1.keras").verify()

    assert isinstance(found.listing.damaged["1.keras"], DamagedCheckpointError)


@pytest.mark.parametrize("end", [b"", b"keras_ckpt", b"\0" * 8 + b"keras_ckpt", b"\xff" * 8 + b"keras_ckpt"])
def test_a_file_whose_end_only_looks_like_a_record_has_none(tmp_path, end) -> None:
    """It belongs to its user."""
    (tmp_path / "best.keras").write_bytes(b"data" + end)

    listing = CheckpointDirectory(tmp_path / "best.keras").listing()

    assert (listing.records, listing.damaged, listing.unmanaged) == ((), {}, ("best.keras",))


@pytest.mark.parametrize(
    ("names", "keep"),
    [
        (["last.keras"] * 3, None),
        (["1.keras", "2.keras", "3.keras"], LatestN(1)),
        (["1.keras", "2.keras", "1.keras"], None),
        (["e1/m.keras", "e2/m.keras", "e3/m.keras"], LatestN(1)),
    ],
    ids=["one name", "pruned names", "a name again", "folders"],
)
def test_a_crash_at_any_change_leaves_the_old_file_or_the_new(tmp_path, monkeypatch, names, keep) -> None:
    """A visible file is whole at every moment, and has its own record. The next start finishes the save or drops it."""
    template = {"last.keras": "last.keras", "e3/m.keras": "e{epoch}/m.keras"}.get(names[-1], "{epoch}.keras")
    ends = set()
    for calls in range(200):
        folder = tmp_path / str(calls)
        path = folder / template
        for step, name in enumerate(names[:-1], 1):
            save(path, step, name, keep)
        before = contents(folder)
        step, name = len(names), names[-1]

        crashed = crash_in(monkeypatch, calls, lambda path=path, step=step, name=name: save(path, step, name, keep))

        seen = contents(folder)
        assert seen[name] in (before.get(name), f"content {step}") if name in seen else name not in before
        assert set(steps(path)) <= {1, 2, 3}
        for record in CheckpointDirectory(path):
            assert seen[record.name] == f"content {record.step}"
        writer = Writer(CheckpointDirectory(path))
        writer.open()
        ends.add(step in steps(path))
        assert step in steps(path) or contents(folder) == before
        writer.close()
        stages = [each for each in (folder / PRIVATE).rglob("stage-*") if any(each.iterdir())]
        assert stages == []
        save(path, 9, name)
        assert 9 in steps(path)
        if not crashed:
            break
    assert calls > 8
    assert ends == {False, True}
