"""A disk that is really full: a small file system in memory, in a name space of its own."""

import contextlib
import json
import subprocess
from collections.abc import Callable, Iterator

import pytest

from support.fork_server import ForkServer

FIT = """
import json, sys, warnings
import numpy as np
import keras, keras_ckpt as kc

model = keras.Sequential([keras.Input((100,)), keras.layers.Dense(500), keras.layers.Dense(1)])
model.compile("adam", "mse", run_eagerly=True)
path, on_full_disk = sys.argv[1] + "/run", sys.argv[2]
checkpoint = kc.ModelCheckpoint(path, keep=kc.LatestN(9), on_full_disk=on_full_disk)
x, y = np.zeros((4, 100), "float32"), np.zeros((4, 1), "float32")
error = None
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    try:
        model.fit(x, y, batch_size=4, epochs=4, verbose=0, callbacks=[checkpoint])
    except kc.DiskFullError as raised:
        error = str(raised)
runs = kc.CheckpointDirectory(path)
kept = [record.step for record in runs]
whole = runs.verify().ok
runs.prune(kc.LatestN(1))
if error is None:
    model.fit(x, y, batch_size=4, verbose=0, callbacks=[checkpoint])
print(json.dumps({
    "warned": [str(each.message) for each in caught],
    "error": error,
    "kept": kept,
    "whole": whole,
    "afterwards": [record.step for record in runs],
    "failed": [fate.facts.step for fate in runs.fates() if fate.state == "failed"],
    "why": runs.why(3),
}))
"""

SIZES = """
import json, os, subprocess, sys
from support.runs import payload
from keras_ckpt.store.directory import CheckpointDirectory
from keras_ckpt.errors import DiskFullError
from keras_ckpt.store.policies import LatestN
from keras_ckpt.store.writer import SaveRequest, Writer

disk = sys.argv[1]
outcomes = []
for pages in range(4, 4 + int(sys.argv[2])):
    subprocess.run(["mount", "-o", f"remount,size={pages * 4096}", disk], check=True)
    runs = CheckpointDirectory(f"{disk}/run")
    writer = Writer(runs, LatestN(2))
    acknowledged, lost, full = 0, 0, 0
    for step in (1, 2, 2, 3):
        try:
            writer.save(SaveRequest(step=step, size=30_000 if pages % 2 else 0), payload(bytes([step]) * 30_000))
        except DiskFullError:
            full += 1
        else:
            acknowledged = step
        lost += bool(acknowledged) and acknowledged not in runs
    sound = runs.verify().ok
    private = f"{disk}/run/.keras_ckpt"
    # An open writer keeps an empty folder for its next save.
    left = {name for folder, _, names in os.walk(private) if "trash" not in folder for name in names}
    writer.close()
    left |= set(os.listdir(private)) if os.path.exists(private) else set()
    outcomes.append({
        "saved": acknowledged,
        "full": full,
        "lost": lost,
        "invalid": not sound,
        "left": sorted(left - {"lock", "mutex", "trash"}),
    })
    subprocess.run(["mount", "-o", f"remount,size={1 << 20}", disk], check=True)
    writer.save(SaveRequest(step=4), payload())
    assert runs.latest().step == 4
    runs.clear()
print(json.dumps(outcomes))
"""


MOUNT = """
import subprocess, sys
subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={sys.argv[1]}", "none", sys.argv[2]], check=True)
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[ForkServer]:
    """A server in a name space of its own, where everybody may mount a file system."""
    private = ("unshare", "-rm")
    probe = subprocess.run(
        [*private, "mount", "-t", "tmpfs", "none", tmp_path_factory.mktemp("probe")], check=False, capture_output=True
    )
    if probe.returncode:
        pytest.skip(f"no file system can be mounted here: {probe.stderr.decode().strip()}")
    with contextlib.closing(ForkServer(*private)) as server:
        yield server


@pytest.fixture
def on_a_small_disk(server, tmp_path) -> Callable[..., object]:
    """A function that runs a script whose first argument is a file system in memory, and gives the printed JSON."""

    def run(size: str, script: str, *arguments: str) -> object:
        for result in (server.run(MOUNT, size, tmp_path), server.run(script, tmp_path, *arguments)):
            assert result.returncode == 0, result.stderr[-2000:]
        return json.loads(result.stdout.splitlines()[-1])

    return run


def test_training_goes_on_with_a_warning(on_a_small_disk) -> None:
    """What fits is kept whole; the user hears of what did not, and the next save works once there is room."""
    found = on_a_small_disk("1500k", FIT, "warn")

    assert found["kept"] == [1, 2]
    assert found["whole"]
    assert [step in text for step, text in zip(("step 3", "step 4"), found["warned"], strict=True)] == [True, True]
    assert all("No space left" in text or "are needed" in text for text in found["warned"])
    assert found["error"] is None
    assert found["afterwards"] == [2, 5]


def test_the_journal_tells_which_saves_the_full_disk_failed(on_a_small_disk) -> None:
    """The event is small, and is written once the unfinished save has been removed."""
    found = on_a_small_disk("1500k", FIT, "warn")

    assert found["failed"] == [3, 4]
    assert found["why"].startswith("Step 3 was not saved, because the save failed: Could not save step 3 into")


def test_an_argument_makes_it_an_error(on_a_small_disk) -> None:
    """Which ends the training."""
    found = on_a_small_disk("1500k", FIT, "raise")

    assert "Could not save step 3" in found["error"]
    assert found["kept"] == [1, 2]
    assert found["whole"]


ROOM = """
import json, sys, warnings
from support.runs import payload
from keras_ckpt.errors import DiskFullError
from keras_ckpt.store.bounds import MaxCount
from keras_ckpt.store.directory import CheckpointDirectory
from keras_ckpt.store.policies import BestN, LatestN
from keras_ckpt.store.writer import SaveRequest, Writer

disk, keep, min_free, *pinned = sys.argv[1:]
runs = CheckpointDirectory(f"{disk}/run")
seen, why = [], {}
def write(folder, record):
    seen.append([each.step for each in runs])
    return payload(bytes([record.step]) * 40_000)(folder, record)
runs.subscribe(lambda change: change.kind == "removed" and why.update({change.record.step: change.why}))
full = []
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for step in range(1, 6):
        writer = Writer(runs, eval(keep), min_free=int(min_free) if step > 1 else 0)
        try:
            writer.save(SaveRequest(step=step, size=80_000, metrics={"loss": step}), write)
        except DiskFullError as error:
            full.append(str(error))
        writer.close()
        if str(step) in pinned:
            runs.pin(step)
print(json.dumps({
    "before": seen,
    "after": [each.step for each in runs],
    "why": [why.get(step, "") for step in range(1, 6)],
    "full": full,
    "warned": [str(each.message) for each in caught],
    "whole": runs.verify().ok,
}))
"""

FIT_WITH_ROOM = """
import json, sys, warnings
import numpy as np
import keras, keras_ckpt as kc

model = keras.Sequential([keras.Input((100,)), keras.layers.Dense(500), keras.layers.Dense(1)])
model.compile("adam", "mse", run_eagerly=True)
path, min_free = sys.argv[1] + sys.argv[2], sys.argv[3]
checkpoint = kc.ModelCheckpoint(path, monitor="loss", keep=kc.LatestN(2), min_free=min_free)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    x, y = np.zeros((4, 100), "float32"), np.zeros((4, 1), "float32")
    model.fit(x, y, batch_size=4, epochs=4, verbose=0, callbacks=[checkpoint])
runs = kc.CheckpointDirectory(path)
print(json.dumps({
    "warned": [text for each in caught if "free" in (text := str(each.message))],
    "kept": [record.step for record in runs],
    "whole": runs.verify().ok,
}))
"""

MANAGER_WITH_ROOM = """
import json, sys
import tensorflow as tf
import keras_ckpt as kc
from keras_ckpt.errors import DiskFullError

path, keep, min_free = sys.argv[1] + "/run", eval(sys.argv[2]), sys.argv[3]
checkpoint = tf.train.Checkpoint(value=tf.Variable(tf.zeros(20_000)))
manager = kc.CheckpointManager(checkpoint, path, keep=keep, min_free=None if min_free == "None" else min_free)
full = []
for step in range(1, 6):
    try:
        manager.save(step)
    except DiskFullError as error:
        full.append(step)
events = kc.CheckpointDirectory(path).events()
print(json.dumps({
    "events": [f"{event.kind} {event.step}" for event in events if event.kind in ("saved", "removed")],
    "full": full,
}))
"""

FILES = """
import json, sys, warnings
import numpy as np
import keras, keras_ckpt as kc

path, disk = f"{sys.argv[1]}/last.{sys.argv[2]}", sys.argv[1]
model = keras.Sequential([keras.Input((100,)), keras.layers.Dense(500), keras.layers.Dense(1)])
model.compile("adam", "mse", run_eagerly=True)
x, y = np.zeros((4, 100), "float32"), np.zeros((4, 1), "float32")
checkpoint = kc.ModelCheckpoint(path, save_weights_only=path.endswith(".weights.h5"))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    model.fit(x, y, batch_size=4, epochs=1, verbose=0, callbacks=[checkpoint])
    with open(f"{disk}/filler", "wb", buffering=0) as filler:
        try:
            while filler.write(bytes(4096)):
                pass
        except OSError:
            pass
    model.fit(x, y, batch_size=4, epochs=2, verbose=0, callbacks=[checkpoint])
runs = kc.CheckpointDirectory(path)
print(json.dumps({
    "full": sum("No space left" in str(each.message) or "are needed" in str(each.message) for each in caught),
    "kept": [record.step for record in runs],
    "whole": runs.verify().ok,
}))
"""


@pytest.mark.parametrize("suffix", ["keras", "weights.h5", "h5"])
def test_a_full_disk_leaves_the_file_of_before(on_a_small_disk, suffix) -> None:
    """Each save is a warning, and the process ends with exit code 0: h5py's own driver would crash it."""
    found = on_a_small_disk("1500k", FILES, suffix)

    assert found == {"full": 2, "kept": [1], "whole": True}


def test_whatever_the_room_nothing_is_lost(on_a_small_disk, tally, long) -> None:
    """From none to more than is needed, a page more each time; with the look at the room before, and without."""
    for outcome in on_a_small_disk("16k", SIZES, "80" if long else "40"):
        tally["trials"] += 1
        tally["full"] += outcome["full"]
        tally["lost"] += outcome["lost"]
        tally["invalid"] += outcome["invalid"]
        assert outcome["left"] == []
    assert tally["full"]


class TestRoomBeforeASave:
    """`min_free`: three checkpoints fit on a disk of 1 MB that keeps 740 kB free, and a fourth does not."""

    def test_what_the_policy_removes_after_a_save_is_removed_before_it(self, on_a_small_disk) -> None:
        """Without a warning. Without `min_free` it is removed after the save."""
        early = on_a_small_disk("1m", ROOM, "LatestN(3)", "740000")
        late = on_a_small_disk("1m", ROOM, "LatestN(3)", "0")

        assert early["before"] == [[], [1], [1, 2], [2, 3], [3, 4]]
        assert late["before"] == [[], [1], [1, 2], [1, 2, 3], [2, 3, 4]]
        for found in (early, late):
            assert found["after"] == [3, 4, 5]
            assert found["why"][:2] == [f"LatestN(3): {news} are newer" for news in ("4, 3 and 2", "5, 4 and 3")]
            assert (found["full"], found["warned"], found["whole"]) == ([], [], True)

    @pytest.mark.parametrize(
        ("keep", "after"), [("LatestN(9)", [3, 4, 5]), ("BestN(2, 'loss', 'min') | LatestN(9)", [1, 4, 5])]
    )
    def test_if_these_are_too_few_others_go_with_a_warning(self, on_a_small_disk, keep, after) -> None:
        """By the order of a bound: the best stays where the policy names it first. The newest stays in any case."""
        found = on_a_small_disk("1m", ROOM, keep, "740000")

        assert found["after"] == after
        assert (found["full"], found["whole"]) == ([], True)
        assert [f"The save of step {step} into" in text for step, text in zip((4, 5), found["warned"], strict=True)]
        assert all("740 kB are to stay free. So it removes checkpoints that" in text for text in found["warned"])
        assert "less than 740 kB would be free when step 4 came" in found["why"]

    @pytest.mark.parametrize("keep", ["LatestN(1)", "LatestN(9)", "None"])
    def test_the_newest_stays_and_the_disk_counts_as_full(self, on_a_small_disk, keep) -> None:
        """The removal of all others would not be enough, so none goes."""
        found = on_a_small_disk("1m", ROOM, keep, "1000000")

        assert found["after"] == [1]
        assert len(found["full"]) == 4
        assert "80 kB are needed, " in found["full"][0]
        assert "of which 1 MB are to stay free. Free some space" in found["full"][0]
        assert (found["warned"], found["whole"]) == ([], True)

    def test_without_a_policy_nothing_is_removed(self, on_a_small_disk) -> None:
        """Everything is to be kept, so the save is skipped."""
        found = on_a_small_disk("1m", ROOM, "None", "740000")

        assert found["after"] == [1, 2, 3]
        assert len(found["full"]) == 2

    def test_a_pinned_checkpoint_stays(self, on_a_small_disk) -> None:
        found = on_a_small_disk("1m", ROOM, "LatestN(9)", "740000", "1")

        assert found["after"] == [1, 4, 5]

    @pytest.mark.parametrize("name", ["/run", "/{epoch}.keras"])
    def test_a_fit_makes_room(self, on_a_small_disk, name) -> None:
        """Two checkpoints of 600 kB fit, and a third would leave less than 500 kB free."""
        found = on_a_small_disk("2200k", FIT_WITH_ROOM, name, "500 kB")

        assert found == {"warned": [], "kept": [3, 4], "whole": True}

    def test_a_manager_makes_room(self, on_a_small_disk) -> None:
        """What its policy removes goes before the save instead of after it. If that is too little, `save` raises."""
        late = ["saved 1", "saved 2", "saved 3", "saved 4", "removed 1", "saved 5", "removed 2"]
        early = ["saved 1", "saved 2", "saved 3", "removed 1", "saved 4", "removed 2", "saved 5"]

        assert on_a_small_disk("1m", MANAGER_WITH_ROOM, "3", "None") == {"events": late, "full": []}
        assert on_a_small_disk("1m", MANAGER_WITH_ROOM, "3", "740 kB") == {"events": early, "full": []}
        assert on_a_small_disk("1m", MANAGER_WITH_ROOM, "None", "740 kB") == {"events": early[:3], "full": [4, 5]}
