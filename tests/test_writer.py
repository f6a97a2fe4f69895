"""The writer: stages, commits and prunes; and the state after an error, an interrupt or a crash in the middle."""

import errno
import os
import pathlib
import pickle
import shutil
import warnings

import msgspec
import pytest

from keras_ckpt.errors import DirectoryNotEmptyError, DiskFullError, FormatVersionError, SaveError
from keras_ckpt.store import commit, files, streams
from keras_ckpt.store import record as sidecars
from keras_ckpt.store.checks import check_files
from keras_ckpt.store.files import PRIVATE, Folder
from keras_ckpt.store.policies import BestN, EveryNSteps, LatestN, PreservationPolicy
from keras_ckpt.store.record import CheckpointFile
from keras_ckpt.store.writer import SaveRequest, Writer, by_prefix
from support.runs import Filler, history, payload, unprivileged_user


def leftovers(runs) -> list[str]:
    """The files in the private folder, without the locks and the trash."""
    private = pathlib.Path(runs.path) / PRIVATE
    found = {str(path.relative_to(private)) for path in private.rglob("*")}
    return sorted(found - {"lock", "mutex", "trash"})


def verify(runs) -> list[int]:
    """The steps of the directory, with every byte checked."""
    records = list(runs)
    if records:
        with Folder(runs.path) as folder:
            for record in records:
                check_files(folder, record)
    return [record.step for record in records]


def test_save_returns_the_record_on_disk_and_leaves_no_temporary_files(filler) -> None:
    """The record has the files, the sequence and the timings."""
    writer = Writer(filler.runs)

    record = writer.save(
        SaveRequest(step=120, epoch=3, batch=0, metrics={"loss": 0.5}, metadata={"a": 1}, time=5.0), payload()
    )

    assert record == filler.runs[120]
    assert record.sequence == 1
    assert [file.name for file in record.files] == ["ckpt-120.data-00000-of-00001", "ckpt-120.index"]
    assert 0 < record.timings["write_ms"] <= record.timings["blocked_ms"]
    writer.close()
    assert leftovers(filler.runs) == []


def test_a_writer_has_one_stage_which_is_empty_between_saves(filler) -> None:
    """A new folder for each save would need another sync each time."""
    writer = Writer(filler.runs)
    writer.save(SaveRequest(step=1), payload(b"1"))
    (stage,) = leftovers(filler.runs)

    for _ in range(2):
        writer.save(SaveRequest(step=2), payload(b"2"))
        assert leftovers(filler.runs) == [stage]
        assert os.listdir(pathlib.Path(filler.runs.path) / PRIVATE / stage) == []


def test_a_removed_private_folder_is_created_again(filler) -> None:
    """No checkpoint needs a file of the private folder."""
    writer = Writer(filler.runs)
    writer.save(SaveRequest(step=1), payload(b"1"))
    shutil.rmtree(pathlib.Path(filler.runs.path) / PRIVATE)
    writer.save(SaveRequest(step=2), payload(b"2"))

    assert verify(filler.runs) == [1, 2]


def test_one_run_has_one_run_id(filler) -> None:
    """Without a run id, a save belongs to the run of the newest checkpoint."""
    for step in (1, 2):
        Writer(filler.runs).save(SaveRequest(step=step), payload())

    assert len({record.run_id for record in filler.runs}) == 1
    assert filler.runs[1].run_id


def test_a_checkpoint_that_would_be_pruned_at_once_is_not_written(filler) -> None:
    """The writer does not call the payload function."""
    filler.save("10:0.5")
    writer = Writer(filler.runs, BestN(1, "loss", "min"))

    def unwanted(folder, record) -> None:
        raise AssertionError(record.name)

    assert writer.save(SaveRequest(step=20, metrics={"loss": 0.6}, batch=0), unwanted) is None
    assert verify(filler.runs) == [10]


def test_saving_prunes(filler) -> None:
    """After each save, the directory has exactly the checkpoints that the policy keeps."""
    runs = filler.save("10:0.1 20:0.2 30:0.3 40:0.4", keep=LatestN(2) | BestN(1, "loss", "min"))

    assert verify(runs) == [10, 30, 40]


def test_a_step_that_is_saved_again_supersedes_its_checkpoint(filler) -> None:
    """The new checkpoint is the newest, with the new files."""
    filler.save("10 20 30")
    Writer(filler.runs).save(SaveRequest(step=20), payload(b"again"))

    assert verify(filler.runs) == [10, 30, 20]
    assert pathlib.Path(f"{filler.runs[20].prefix}.data-00000-of-00001").read_bytes() == b"again"
    assert filler.runs[20].sequence == 4


def test_a_step_that_is_saved_again_under_another_name_supersedes_its_checkpoint(filler) -> None:
    """The step counts, not the name."""
    filler.save("10 20")
    Writer(filler.runs).save(SaveRequest(step=10, name="model-10"), payload())

    assert verify(filler.runs) == [20, 10]
    assert not (pathlib.Path(filler.runs.path) / "ckpt-10.index").exists()


def test_a_pinned_step_is_not_superseded(filler) -> None:
    """The pinned checkpoint stays unchanged, with a warning."""
    filler.save("10 20")
    filler.runs.pin(10)

    with pytest.warns(UserWarning, match="Step 10 is not saved .*ckpt-10 of step 10 is pinned"):
        assert Writer(filler.runs).save(SaveRequest(step=10), payload(b"again")) is None

    assert pathlib.Path(f"{filler.runs[10].prefix}.data-00000-of-00001").read_bytes() == b"10"


def test_a_checkpoint_supersedes_the_one_of_the_same_name(filler) -> None:
    """The name is free, and the step is in the sidecar: the older checkpoint goes, and the new one stays."""
    writer = Writer(filler.runs, LatestN(1))
    writer.save(SaveRequest(step=10, name="best"), payload(b"10"))

    record = writer.save(SaveRequest(step=20, name="best"), payload(b"20"))

    assert filler.runs.latest() == record
    assert (record.name, record.step) == ("best", 20)
    assert verify(filler.runs) == [20]
    assert pathlib.Path(f"{record.prefix}.data-00000-of-00001").read_bytes() == b"20"


def test_a_pinned_checkpoint_is_not_superseded_by_another_step_of_its_name(filler) -> None:
    """The save of the other step is skipped, with a warning."""
    writer = Writer(filler.runs)
    writer.save(SaveRequest(step=10, name="best"), payload(b"10"))
    filler.runs.pin(10)

    with pytest.warns(UserWarning, match="Step 20 is not saved .*best of step 10 is pinned"):
        assert writer.save(SaveRequest(step=20, name="best"), payload(b"20")) is None

    assert verify(filler.runs) == [10]


def test_a_writer_warns_once_of_a_pinned_checkpoint(filler) -> None:
    """Each later save that the pin prevents is silent."""
    writer = Writer(filler.runs)
    writer.save(SaveRequest(step=10, name="best"), payload(b"10"))
    filler.runs.pin(10)

    with pytest.warns(UserWarning, match="Step 20 is not saved .*best of step 10 is pinned"):
        writer.save(SaveRequest(step=20, name="best"), payload())

    assert writer.save(SaveRequest(step=30, name="best"), payload()) is None


def test_the_state_file_names_only_checkpoints_of_tensorflow(filler) -> None:
    """A newer checkpoint without an index is not TensorFlow's, so TensorFlow's functions do not see it."""

    def without_index(folder, record):
        name = f"{record.name}.weights"
        folder.create(name, b"other")
        return [CheckpointFile(name, *folder.digest(name))]

    filler.save("10")
    Writer(filler.runs).save(SaveRequest(step=20, name="best"), without_index)

    state = (pathlib.Path(filler.runs.path) / "checkpoint").read_text()
    assert 'model_checkpoint_path: "ckpt-10"' in state
    assert "best" not in state


def test_a_staged_checkpoint_is_invisible_until_its_commit(filler) -> None:
    """Two different writers may stage and commit."""
    filler.save("10")
    staged = Writer(filler.runs, LatestN(1)).stage(SaveRequest(step=20), payload(b"20"))
    assert verify(filler.runs) == [10]

    second = Writer(filler.runs, LatestN(1))
    record = second.commit(staged)
    second.close()

    assert verify(filler.runs) == [20]
    assert filler.runs.latest() == record
    assert leftovers(filler.runs) == []


def test_a_process_commits_the_checkpoint_that_a_dead_process_staged(filler) -> None:
    """Recovery has committed it already; the commit prunes, and returns the record."""
    filler.save("10")
    child = os.fork()
    if not child:
        staged = Writer(filler.runs).stage(SaveRequest(step=20), payload(b"20"))
        pathlib.Path(f"{filler.runs.path}.staged").write_bytes(pickle.dumps(staged))
        os._exit(0)
    os.waitpid(child, 0)
    staged = pickle.loads(pathlib.Path(f"{filler.runs.path}.staged").read_bytes())

    writer = Writer(filler.runs, LatestN(1))
    record = writer.commit(staged)
    writer.close()

    assert record == filler.runs.latest()
    assert verify(filler.runs) == [20]
    assert leftovers(filler.runs) == []


def test_a_staged_checkpoint_that_recovery_committed_may_be_pinned(filler) -> None:
    """The pin is of this very checkpoint, so the commit returns its record without a warning."""
    staged = Writer(filler.runs).stage(SaveRequest(step=20), payload(b"20"))
    Writer(filler.runs)._claim().recovered = False
    Writer(filler.runs).open()
    filler.runs.pin(20, "mine")

    assert Writer(filler.runs).commit(staged).same_save(filler.runs[20])


def test_a_staged_checkpoint_that_is_gone_supersedes_nothing(filler) -> None:
    """The commit fails before an older checkpoint is withdrawn for it."""
    filler.save("10")
    writer = Writer(filler.runs)
    staged = writer.stage(SaveRequest(step=10), payload(b"again"))
    shutil.rmtree(pathlib.Path(filler.runs.path) / PRIVATE / staged.stage)

    with pytest.raises(SaveError, match="the staged checkpoint is gone"):
        writer.commit(staged)

    assert verify(filler.runs) == [10]


def test_a_pin_without_a_checkpoint_does_not_pin_a_later_checkpoint(filler) -> None:
    """A .keep file may remain after its checkpoint."""
    filler.save("10")
    (pathlib.Path(filler.runs.path) / "ckpt-20.keep").touch()
    filler.save("20")

    assert not filler.runs[20].pinned


def test_a_foreign_file_is_not_overwritten(filler) -> None:
    """The save is refused, and the file is unchanged."""
    filler.save("10")
    other = pathlib.Path(filler.runs.path) / "ckpt-20.index"
    other.write_text("mine")

    with pytest.raises(DirectoryNotEmptyError, match=r"ckpt-20\.index .* is left alone"):
        filler.save("20")

    assert other.read_text() == "mine"
    assert verify(filler.runs) == [10]
    assert leftovers(filler.runs) == []


@pytest.mark.parametrize(
    ("number", "mend"),
    [(errno.ENOSPC, "Free some space"), (errno.EACCES, "Make the directory writable"), (errno.EIO, "")],
)
def test_a_save_that_fails_changes_nothing(filler, number, mend) -> None:
    """The error names the directory and the reason. Other checkpoints are whole, and the next save works."""
    filler.save("10 20")

    def failing(folder, record) -> None:
        payload()(folder, record)
        raise OSError(number, os.strerror(number), record.name)

    with pytest.raises(SaveError, match=f"Could not save step 30 into .*{os.strerror(number)}.*{mend}"):
        Writer(filler.runs, LatestN(1)).save(SaveRequest(step=30), failing)

    assert verify(filler.runs) == [10, 20]
    assert leftovers(filler.runs) == []
    assert verify(filler.save("30")) == [10, 20, 30]


def test_a_payload_that_writes_nothing_is_an_error(filler) -> None:
    """A checkpoint needs files."""
    with pytest.raises(SaveError, match="no files"):
        Writer(filler.runs).save(SaveRequest(step=1), by_prefix(lambda prefix: None))

    assert len(filler.runs) == 0


def test_a_directory_that_cannot_be_written_is_an_error_before_training(tmp_path) -> None:
    """The error says how to mend it."""
    (tmp_path / "run").mkdir(mode=0o755)
    for path in (tmp_path, *tmp_path.parents):
        path.chmod(path.stat().st_mode | 0o055) if path.owner() == tmp_path.owner() else None

    with unprivileged_user(), pytest.raises(SaveError, match=r"Cannot write into .*Permission denied.*writable"):
        Writer(Filler(tmp_path / "run").runs).open()


def test_a_path_below_a_file_is_an_error_before_training(tmp_path) -> None:
    """A path that is a file is an error too."""
    (tmp_path / "file").touch()

    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(SaveError, match="Cannot write into"):
            Writer(Filler(path).runs).open()


def test_saving_a_damaged_step_again_moves_the_damaged_files_aside(filler) -> None:
    """No file is lost, and training continues."""
    filler.save("10 20")
    path = pathlib.Path(filler.runs.path)
    (path / "ckpt-20.json").write_bytes(b"")
    (path / "ckpt-20.png").write_text("mine")

    with pytest.warns(UserWarning, match=r"ckpt-20 is damaged .*; its remaining files are in .*damaged-"):
        filler.save("20")

    assert verify(filler.runs) == [10, 20]
    aside = next((path / PRIVATE).glob("damaged-*"))
    assert sorted(file.name for file in aside.iterdir()) == [
        "ckpt-20.data-00000-of-00001",
        "ckpt-20.index",
        "ckpt-20.json",
    ]
    assert (path / "ckpt-20.png").read_text() == "mine"


def test_a_checkpoint_of_a_newer_version_is_not_overwritten(filler) -> None:
    """This version cannot read it."""
    filler.save("10")
    path = pathlib.Path(filler.runs.path) / "ckpt-20.json"
    path.write_text('{"format": "keras_ckpt", "format_version": 3}')

    with pytest.raises(FormatVersionError, match=r"ckpt-20 in .* is not overwritten"):
        filler.save("20")


def test_the_order_of_saving_counts_damaged_checkpoints(filler) -> None:
    """No two checkpoints have the same sequence."""
    filler.save("10 20")
    (pathlib.Path(filler.runs.path) / "ckpt-20.index").write_bytes(b"")
    filler.save("30")

    assert filler.runs[30].sequence == 3


def test_two_writers_of_one_session_are_refused(filler) -> None:
    """Two callbacks of a fit would prune each other's checkpoints."""
    session = {"epochs": 3}
    first = Writer(filler.runs)
    first.open(session)

    with pytest.raises(DirectoryNotEmptyError, match="Two callbacks"):
        Writer(filler.runs).open(session)

    first.save(SaveRequest(step=1), payload())
    assert verify(filler.runs) == [1]


def test_a_run_cannot_save_after_another_run_saved_into_its_directory(filler) -> None:
    """A fit within another fit saves into the same directory: each would prune the other's checkpoints."""
    outer, inner = Writer(filler.runs), Writer(filler.runs)
    outer.open({"epochs": 3})
    inner.open({"epochs": 1})
    inner.save(SaveRequest(step=1, run_id="inner"), payload(b"inner"))

    with pytest.raises(
        SaveError, match=r"Could not save step 1 .*another run, the newest of step 1, which another fit"
    ):
        outer.save(SaveRequest(step=1, run_id="outer"), payload(b"outer"))
    outer.close()
    inner.save(SaveRequest(step=2, run_id="inner"), payload(b"inner"))

    assert verify(filler.runs) == [1, 2]


def test_a_session_creates_its_removed_directory_again(filler) -> None:
    """At the end no temporary files stay."""
    writer = Writer(filler.runs)
    writer.open({"epochs": 3})
    writer.save(SaveRequest(step=1), payload())
    shutil.rmtree(filler.runs.path)

    writer.save(SaveRequest(step=2), payload())
    writer.close()

    assert verify(filler.runs) == [2]
    assert leftovers(filler.runs) == []


def test_a_new_session_takes_the_lock_over_from_an_interrupted_session(filler) -> None:
    """Within a process, sessions share the lock."""
    interrupted = Writer(filler.runs)
    interrupted.open({"epochs": 3})

    Writer(filler.runs).open({"epochs": 3})


def test_amend_changes_a_record_and_prunes_by_it(filler) -> None:
    """A later metric may make a checkpoint the best."""
    filler.save("10:0.5 20", monitor="loss", mode="min")
    writer = Writer(filler.runs, BestN(1, "loss", "min"))

    def measured(record):
        return msgspec.structs.replace(record, metrics={"loss": 0.1})

    changed = writer.amend(filler.runs[20], measured)

    assert changed.metrics == {"loss": 0.1}
    assert verify(filler.runs) == [20]
    assert writer.amend(history("10")[0], measured) is None


class Crash(BaseException):
    """Simulates the death of the process."""


class Dying:
    """`os` for the file modules: the process dies at the n-th changing call."""

    CHANGES = frozenset(("open", "mkdir", "write", "rename", "unlink", "fsync", "rmdir"))

    def __init__(self, calls: int) -> None:
        self.calls = calls

    def __getattr__(self, name: str):
        function = getattr(os, name)
        if name not in self.CHANGES:
            return function

        def call(*arguments, **named):
            if name != "open" or arguments[1] & os.O_CREAT:
                self.calls -= 1
            if self.calls < 0:
                raise Crash
            return function(*arguments, **named)

        return call


def crash_in(monkeypatch, calls: int, action) -> bool:
    """Runs an action that dies at the n-th change. Returns whether it died."""
    with monkeypatch.context() as patch:
        dying = Dying(calls)
        for module in (files, streams):
            patch.setattr(module, "os", dying)
        try:
            action()
        except Crash:
            return True
    return False


WORKLOADS = {
    "a first save": ("", "10", None),
    "a save": ("10 20", "30", None),
    "a save that prunes": ("10 20 30", "40", LatestN(1)),
    "a step saved again": ("10 20 30", "20", None),
    "a step saved again that prunes": ("10 20 30", "20", LatestN(2)),
}


@pytest.mark.parametrize("workload", WORKLOADS)
def test_a_crash_at_any_change_leaves_the_old_or_the_new(tmp_path, monkeypatch, workload) -> None:
    """Visible checkpoints are whole at every moment. After the next start, the directory is as before or as after."""
    before, saved, keep = WORKLOADS[workload]
    step = int(saved)

    def begin(name: str) -> Filler:
        filler = Filler(tmp_path / name)
        filler.save(before)
        return filler

    def save(filler: Filler) -> None:
        Writer(filler.runs, keep).save(SaveRequest(step=step), payload(b"new"))

    whole = begin("whole")
    there = set(verify(whole.runs))
    save(whole)
    final = set(verify(whole.runs))
    ends = set()
    for calls in range(200):
        filler = begin(str(calls))
        crashed = crash_in(monkeypatch, calls, lambda filler=filler: save(filler))
        verify(filler.runs)
        Writer(filler.runs).open()

        after = set(verify(filler.runs))
        listing = filler.runs.listing()
        ends.add(tuple(sorted(after)))
        assert (there & final) <= after <= (there | final)
        assert step in after or after == there
        assert (listing.unmanaged, listing.damaged, leftovers(filler.runs)) == ((), {}, [])
        if not crashed:
            break
        Writer(filler.runs).save(SaveRequest(step=99), payload())
        assert 99 in verify(filler.runs)
    assert calls > 10
    assert ends >= {tuple(sorted(there)), tuple(sorted(final))}


def test_a_crash_at_any_change_of_a_prune_removes_whole_checkpoints(tmp_path, monkeypatch) -> None:
    """The remaining checkpoints are whole, and the checkpoints that the plan keeps remain."""
    for calls in range(100):
        filler = Filler(tmp_path / str(calls))
        plan = filler.save("10 20 30").plan(LatestN(1))
        done = not crash_in(monkeypatch, calls, lambda filler=filler, plan=plan: filler.runs.prune(plan))
        Writer(filler.runs).open()

        assert verify(filler.runs)[-1] == 30
        assert filler.runs.listing().unmanaged == ()
        assert leftovers(filler.runs) == []
        if done:
            break
    assert calls > 5
    assert verify(filler.runs) == [30]


def test_an_interrupt_is_recovered_by_the_next_save_of_the_process(filler, monkeypatch) -> None:
    """Ctrl-C between two renames leaves a stage; running the cell again finishes it."""
    filler.save("10")
    moves = []

    def interrupted(self, name, target):
        moves.append(name)
        if len(moves) == 2:
            raise KeyboardInterrupt
        os.rename(name, name, src_dir_fd=self.descriptor, dst_dir_fd=target.descriptor)

    monkeypatch.setattr(Folder, "move", interrupted)
    writer = Writer(filler.runs)  # a notebook keeps a reference to it
    with pytest.raises(KeyboardInterrupt):
        writer.save(SaveRequest(step=20), payload(b"20"))
    monkeypatch.undo()

    assert verify(filler.runs) == [10]
    writer.save(SaveRequest(step=30), payload(b"30"))
    assert verify(filler.runs) == [10, 20, 30]
    writer.close()
    assert leftovers(filler.runs) == []


def staged(runs, step: int, content: bytes = b"staged", sequence: int = 100) -> pathlib.Path:
    """Makes the stage of a process that died."""
    filler = Filler(pathlib.Path(runs.path).parent / "source")
    record = Writer(filler.runs).save(SaveRequest(step=step, run_id="run", batch=0), payload(content))
    stage = pathlib.Path(runs.path) / PRIVATE / "stage-0"
    stage.mkdir(parents=True)
    record = msgspec.structs.replace(record, sequence=sequence)
    for file in record.files:
        (stage / file.name).write_bytes(pathlib.Path(filler.runs.path, file.name).read_bytes())
    (stage / f"ckpt-{step}.json").write_bytes(sidecars.encode(record))
    return stage


def test_the_next_start_publishes_a_complete_stage(filler) -> None:
    """A process died between stage and commit."""
    filler.save("10")
    staged(filler.runs, 20)

    Writer(filler.runs).open()

    assert verify(filler.runs) == [10, 20]


@pytest.mark.parametrize("harm", ["no sidecar", "cut sidecar", "other bytes", "missing file"])
def test_a_stage_that_is_not_what_it_says_is_thrown_away(filler, harm) -> None:
    """Recovery publishes a stage only if each file has its size and digest."""
    filler.save("10")
    stage = staged(filler.runs, 20)
    sidecar, index = stage / "ckpt-20.json", stage / "ckpt-20.index"
    match harm:
        case "no sidecar":
            sidecar.unlink()
        case "cut sidecar":
            sidecar.write_bytes(sidecar.read_bytes()[:-50])
        case "other bytes":
            index.write_bytes(index.read_bytes()[::-1])
        case "missing file":
            index.unlink()

    Writer(filler.runs).open()

    assert verify(filler.runs) == [10]
    assert leftovers(filler.runs) == []


def test_a_stage_does_not_take_files_of_a_published_checkpoint(filler) -> None:
    """Even files with the same bytes would go with the withdrawn checkpoint."""
    filler.save("10")
    stage = staged(filler.runs, 10, b"10")
    (stage / "ckpt-10.index").unlink()

    Writer(filler.runs).open()

    assert verify(filler.runs) == [10]
    assert filler.runs[10].sequence == 1


def test_recovery_does_not_replace_a_later_save_by_a_stage(filler) -> None:
    """A power cut may bring back the stage of a failed save after the step was saved again."""
    filler.save("10")
    staged(filler.runs, 10, sequence=1)

    Writer(filler.runs).open()

    assert pathlib.Path(f"{filler.runs[10].prefix}.data-00000-of-00001").read_bytes() == b"10"


def test_recovery_does_not_replace_a_pinned_checkpoint_by_a_stage(filler) -> None:
    """A checkpoint pinned meanwhile stays."""
    filler.save("20")
    filler.runs.pin(20)
    staged(filler.runs, 20)

    Writer(filler.runs).open()

    assert pathlib.Path(f"{filler.runs[20].prefix}.data-00000-of-00001").read_bytes() == b"20"


def test_recovery_keeps_foreign_files_in_the_private_folder(filler) -> None:
    """Recovery removes only the package's own names."""
    filler.save("10")
    other = pathlib.Path(filler.runs.path) / PRIVATE / "notes.txt"
    other.write_text("mine")
    (other.parent / "swap-dead").mkdir()

    Writer(filler.runs).open()

    assert leftovers(filler.runs) == ["notes.txt"]


def test_the_state_file_keeps_the_time_of_the_last_preserved_checkpoint(filler) -> None:
    """TensorFlow's manager continues from it."""
    runs = filler.save("10 20")
    with Folder(runs.path) as folder:
        commit.write_state(folder, runs, last_preserved=1234.5)
    filler.save("30")

    with Folder(runs.path) as folder:
        assert commit.read_state(folder) == ("ckpt-30", 1234.5)


@pytest.mark.parametrize(
    "text", ["", "garbage", 'model_checkpoint_path: "../outside/victim"', 'model_checkpoint_path: "/abs"', "\0" * 50]
)
def test_an_invalid_state_file_names_no_checkpoint(filler, text) -> None:
    """The state file is a hint, and names no file outside the directory."""
    runs = filler.save("10")
    (pathlib.Path(runs.path) / "checkpoint").write_text(text)

    with Folder(runs.path) as folder:
        assert commit.read_state(folder) == (None, None)


def test_a_normal_save_warns_of_nothing(filler) -> None:
    """Saves and prunes without problems raise no warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        filler.save("10 20 30", keep=EveryNSteps(20) | LatestN(1))


def test_a_pinned_damaged_checkpoint_is_not_overwritten(filler) -> None:
    """Its remaining files may be the last copy of the model in production."""
    runs = filler.save("10 20")
    runs.pin(10, "in production")
    data = pathlib.Path(runs.path) / "ckpt-10.data-00000-of-00001"
    data.write_bytes(b"")

    with pytest.warns(UserWarning, match="pinned and damaged"):
        assert Writer(runs).save(SaveRequest(step=10), payload()) is None

    assert data.read_bytes() == b""
    assert list(runs.listing().damaged) == ["ckpt-10"]


def test_saving_a_step_with_a_truncated_file_again_moves_its_files_aside(filler) -> None:
    """The sidecar of the damaged checkpoint is whole. Its files are not removed."""
    runs = filler.save("10")
    pathlib.Path(f"{runs.path}/ckpt-10.data-00000-of-00001").write_bytes(b"1")

    with pytest.warns(UserWarning, match="ckpt-10 is damaged"):
        filler.save("10")

    assert verify(runs) == [10]
    aside = next(pathlib.Path(runs.path, PRIVATE).glob("damaged-*"))
    assert (aside / "ckpt-10.data-00000-of-00001").read_bytes() == b"1"


def test_a_checkpoint_counts_as_saved_without_a_state_file(filler, monkeypatch) -> None:
    """The disk had room for the checkpoint, but not for the state file. The error says that it is saved."""

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(commit, "write_state", full)
        with pytest.raises(DiskFullError, match="is saved, but older ones could not be removed"):
            Writer(filler.runs).save(SaveRequest(step=10), payload())

    assert verify(filler.runs) == [10]


def test_a_checkpoint_counts_as_saved_if_the_policy_fails_afterwards(filler) -> None:
    """The error says that the checkpoint is saved, and listeners hear of the save."""

    class Fails(PreservationPolicy):
        calls = 0

        def select(self, records):
            self.calls += 1
            if self.calls == 2:
                raise ValueError("no answer")
            return {record.step for record in records}

    heard = []
    filler.runs.subscribe(lambda change: heard.append((change.kind, change.record.step)))
    with pytest.raises(SaveError, match=r"is saved, but older ones could not be removed from .*no answer"):
        Writer(filler.runs, Fails()).save(SaveRequest(step=10), payload())

    assert verify(filler.runs) == [10]
    assert heard == [("saved", 10)]


def test_a_failed_withdrawal_leaves_the_older_checkpoint_untouched(filler, monkeypatch) -> None:
    """No rename succeeded, so recovery has nothing to finish."""
    writer = Writer(filler.runs)
    before = writer.save(SaveRequest(step=1), payload(b"first"))

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "injected")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", refuse)
        with pytest.raises(SaveError, match="Earlier checkpoints are untouched"):
            writer.save(SaveRequest(step=1), payload(b"second"))

    assert leftovers(filler.runs) == []
    assert verify(filler.runs) == [1]
    assert filler.runs[1] == before


def test_the_log_has_a_line_for_each_saved_removed_and_recovered_checkpoint(filler, caplog) -> None:
    """At level INFO, under the name of the package; nothing is printed without it."""
    with caplog.at_level("INFO", "keras_ckpt"):
        filler.save("10 20", LatestN(1))
        staged = Writer(filler.runs).stage(SaveRequest(step=30), payload())
        Writer(filler.runs)._claim().recovered = False
        Writer(filler.runs).open()

    path = filler.runs.path
    assert caplog.messages == [
        f"saved {path}/ckpt-10",
        f"saved {path}/ckpt-20",
        f"removed {path}/ckpt-10",
        f"recovered {path}/{staged.record.name}",
    ]
