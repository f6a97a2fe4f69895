"""A backup saves the values of callbacks as they were at its moment, though it does not copy large values then."""

import collections
import copy

import keras
import numpy as np
import pytest

import keras_ckpt as kc
from keras_ckpt.resume import capture
from keras_ckpt.resume.callback_states import CallbackStates
from keras_ckpt.resume.capture import Captures, Later
from keras_ckpt.resume.plain_values import UnplainError, decode, dict_of, dumped
from support.models import Interrupts, X, Y, dense_model, fit

LARGE = 100_000


def taken(states: CallbackStates) -> tuple[str, Later]:
    """The JSON text of the states and their arrays, as a backup takes them."""
    structure, assumed = states.take()
    text, leaves = dumped(structure)
    return text, Later({str(number): leaf for number, leaf in enumerate(leaves)}, assumed)


def read(text: str, later: Later) -> dict:
    """The states as another process reads them."""
    assert later.is_true
    return decode(text, {int(number): array for number, array in later.arrays.items()})


class Holder(keras.callbacks.Callback):
    """A callback that holds one object."""

    def __init__(self, held) -> None:
        super().__init__()
        self.held = held


def grown(held: list) -> None:
    held.append(0.25)


def item_changed(held: list) -> None:
    held[7] = -1.0


def shortened(held: list) -> None:
    del held[:9]


@pytest.mark.parametrize("change", [grown, item_changed, shortened])
def test_a_long_list_is_saved_as_it_was_at_the_moment_of_the_backup(change) -> None:
    """The list changes between backups, and again while a backup is written."""
    holder = Holder([float(number) for number in range(LARGE)])
    states = CallbackStates([holder])
    for _ in range(3):
        change(holder.held)
        expected = [*holder.held]
        backup = taken(states)
        change(holder.held)

        assert read(*backup) == {"Holder": {"held": expected}}


COLLECTIONS = {
    "strings": lambda: [f"line {number}" for number in range(LARGE)],
    "pairs": lambda: [(number, float(number)) for number in range(LARGE)],
    "numbers of NumPy": lambda: [*np.arange(LARGE, dtype="float32")],
    "numbers and nothing": lambda: [None, *map(float, range(LARGE))],
    "dicts": lambda: [{"step": number, "loss": float(number)} for number in range(LARGE)],
    "lists": lambda: [[number, float(number)] for number in range(LARGE)],
    "a tuple": lambda: tuple(map(float, range(LARGE))),
    "a full deque": lambda: collections.deque(map(float, range(LARGE)), LARGE),
    "a deque without an end": lambda: collections.deque(map(str, range(LARGE))),
    "a dict": lambda: {number: float(number) for number in range(LARGE)},
    "a dict of mixed values": lambda: {str(number): number or None for number in range(LARGE)},
    "an ordered dict": lambda: collections.OrderedDict((number, float(number)) for number in range(LARGE)),
    "a counter": lambda: collections.Counter(range(LARGE)),
    "a default dict": lambda: collections.defaultdict(int, enumerate(range(LARGE))),
    "a set": lambda: set(range(LARGE)),
}


def one_more(held) -> None:
    """Adds an item of the same kind as the others."""
    if isinstance(held, dict):
        held[type(next(iter(held)))(len(held))] = next(reversed(held.values()))
    elif isinstance(held, set):
        held.add(-len(held))
    elif not isinstance(held, tuple):
        held.append(held[1])


class TestALongCollection:
    """A long collection is saved as it was at the moment of the backup, and is encoded in the background."""

    @pytest.mark.sample(6)
    @pytest.mark.parametrize("name", COLLECTIONS)
    def test_is_saved_as_it_was_at_the_moment(self, name) -> None:
        """The collection grows between backups, and again while a backup is written."""
        holder = Holder(None)
        states = CallbackStates([holder])
        holder.held = COLLECTIONS[name]()
        for _ in range(3):
            one_more(holder.held)
            expected = copy.copy(holder.held)
            backup = taken(states)
            one_more(holder.held)
            restored = read(*backup)["Holder"]["held"]

            assert restored == expected
            assert type(restored) is type(expected)
            assert {*map(type, restored)} == {*map(type, expected)}
            assert getattr(restored, "maxlen", None) == getattr(expected, "maxlen", None)

    @pytest.mark.parametrize("name", COLLECTIONS)
    def test_is_not_encoded_by_a_look(self, name) -> None:
        """The text of a look is short, because the training waits for the look."""
        holder = Holder(None)
        states = CallbackStates([holder])
        holder.held = COLLECTIONS[name]()

        text, _ = taken(states)

        assert len(text) < 200

    @pytest.mark.sample(1)
    @pytest.mark.parametrize("name", ["dicts", "lists"])
    def test_is_saved_with_items_as_they_were_at_the_moment(self, name) -> None:
        """An item changes between backups, and again while a backup is written."""
        holder = Holder(None)
        states = CallbackStates([holder])
        holder.held = COLLECTIONS[name]()
        for value in range(3):
            holder.held[9][0 if name == "lists" else "step"] = -value
            expected = copy.deepcopy(holder.held)
            backup = taken(states)
            holder.held[9][0 if name == "lists" else "step"] = 77

            assert read(*backup) == {"Holder": {"held": expected}}

    def test_is_saved_though_a_newer_backup_is_written_first(self) -> None:
        """The newer backup has more items than the older backup."""
        holder = Holder([])
        states = CallbackStates([holder])
        holder.held += COLLECTIONS["pairs"]()
        expected = [*holder.held]
        older = taken(states)
        holder.held += expected
        read(*taken(states))

        assert read(*older) == {"Holder": {"held": expected}}

    def test_is_restored_in_another_training(self, tmp_path) -> None:
        """An interrupted training had appended items."""
        data = kc.ResumableDataset(X, Y, batch_size=8, shuffle=True, seed=1)

        def train(*others) -> Pairs:
            pairs = Pairs()
            backup = kc.BackupAndRestore(tmp_path, save_freq=2, data=data)
            dense_model().fit(data, epochs=2, verbose=0, shuffle=False, callbacks=[pairs, *others, backup])
            return pairs

        with pytest.raises(KeyboardInterrupt):
            train(Interrupts(2))

        assert [step for step, _ in train().held] == [*range(LARGE + 10)]


class Pairs(keras.callbacks.Callback):
    """A callback that appends the loss of each step to a long list."""

    def __init__(self) -> None:
        super().__init__()
        self.held = COLLECTIONS["pairs"]()

    def on_train_batch_end(self, batch, logs=None) -> None:
        self.held.append((len(self.held), logs["loss"]))


def test_only_the_first_of_many_small_arrays_are_copied_by_a_look() -> None:
    """The other small arrays are followed like large arrays."""
    arrays = [np.full(1000, number, "float32") for number in range(1000)]
    looks = Captures()
    looks.look(arrays, "arrays", fingerprints=True)

    leaves = looks.look(arrays, "arrays").leaves

    assert sum(leaf.size for leaf in leaves if isinstance(leaf, capture.Copy)) < 2 << 20
    assert len(leaves) == 1000


def test_a_long_list_of_integers_is_restored_as_integers() -> None:
    """Integers and floats are saved in arrays of different types."""
    holder = Holder([])
    states = CallbackStates([holder])
    holder.held += range(LARGE)

    restored = read(*taken(states))["Holder"]["held"]

    assert restored == list(range(LARGE))
    assert type(restored[-1]) is int


@pytest.mark.parametrize("item", [None, "text", 1, {"loss": 1.0}, 2.5, [1], True])
def test_a_long_list_of_several_types_voids_one_backup(item) -> None:
    """The next backup has every item with its type."""
    holder = Holder([])
    states = CallbackStates([holder])
    holder.held += [0.5] * LARGE + [item]
    _, later = taken(states)
    voided = not later.is_true

    restored = read(*taken(states))["Holder"]["held"]

    assert voided == (type(item) is not float)
    assert restored[-1] == item
    assert type(restored[-1]) is type(item)


def test_an_integer_too_large_for_an_array_is_saved() -> None:
    """Python's integers have no bound."""
    holder = Holder([])
    states = CallbackStates([holder])
    holder.held += [1] * LARGE + [1 << 80]
    taken(states)[1].is_true  # noqa: B018 - the background finds the large integer

    assert read(*taken(states))["Holder"]["held"][-1] == 1 << 80


def test_an_unchanged_array_is_not_saved() -> None:
    """The script makes the array in the next process too."""
    holder = Holder(np.ones(LARGE))
    states = CallbackStates([holder])

    assert read(*taken(states)) == {}


def test_an_array_that_changes_in_place_voids_one_backup() -> None:
    """Each later backup has the content at its moment."""
    holder = Holder(np.ones(LARGE))
    states = CallbackStates([holder])
    holder.held[5] = 2
    _, later = taken(states)
    assert not later.is_true

    for value in (3, 4):
        holder.held[6] = value
        expected = holder.held.copy()
        backup = taken(states)
        holder.held[6] = 0

        np.testing.assert_array_equal(read(*backup)["Holder"]["held"], expected)


class TestALargeArrayThatHasChangedInPlace:
    """A large array that has changed in place once is copied when it may have changed again."""

    @pytest.fixture
    def holder(self) -> Holder:
        return Holder(np.zeros(4 * LARGE))

    @pytest.fixture
    def states(self, holder) -> CallbackStates:
        """States that have noticed one change, and saved it."""
        states = CallbackStates([holder])
        read(*taken(states))
        holder.held += 1
        assert not taken(states)[1].is_true
        read(*taken(states))
        return states

    def test_is_not_copied_again_while_it_is_unchanged(self, holder, states, monkeypatch) -> None:
        """A backup of the unchanged array makes no copies."""
        copied = []
        monkeypatch.setattr(capture, "copy_together", copied.extend)

        read(*taken(states))

        assert copied == []

    def test_is_saved_as_it_was_at_the_moment(self, holder, states) -> None:
        """The array changes between backups, and again while a backup is written."""
        for _ in range(3):
            holder.held += 1
            expected = holder.held.copy()
            backup = taken(states)
            holder.held += 1

            np.testing.assert_array_equal(read(*backup)["Holder"]["held"], expected)

    def test_voids_one_more_backup_if_it_is_changed_between_the_samples(self, holder, states) -> None:
        """After the second void backup, the array is copied for each backup."""
        truths = []
        for _ in range(5):
            holder.held[LARGE + 1234] += 1
            truths.append(taken(states)[1].is_true)

        assert truths == [False, True, True, True, True]


def test_a_new_array_is_saved_as_it_was_at_the_moment_of_the_backup() -> None:
    """The best weights of EarlyStopping are new arrays at each improvement."""
    holder = Holder(None)
    states = CallbackStates([holder])
    for value in range(3):
        holder.held = [np.full(LARGE, value), np.full((2, LARGE), value, "float32")]
        backup = taken(states)
        holder.held[0][:] = -1
        restored = read(*backup)["Holder"]["held"]

        assert [set(each.reshape(-1)) for each in restored] == [{value}, {value}]


def test_an_array_that_changes_after_it_was_saved_voids_one_backup() -> None:
    """The second backup assumes that the array is unchanged since the first backup."""
    holder = Holder(None)
    states = CallbackStates([holder])
    holder.held = np.zeros(LARGE)
    read(*taken(states))
    holder.held[-1] = 1
    _, later = taken(states)
    assert not later.is_true

    assert read(*taken(states))["Holder"]["held"][-1] == 1


@pytest.mark.parametrize("kind", ["float16", "int64", "bool", "complex128"])
@pytest.mark.parametrize("form", [np.asarray, np.asfortranarray, lambda array: array[::2]])
def test_arrays_of_any_type_and_layout_are_compared(kind, form) -> None:
    """Arrays in column order, and slices of other arrays, are not contiguous."""
    holder = Holder(form(np.zeros((400, 1000), kind)))
    states = CallbackStates([holder])
    read(*taken(states))

    holder.held[-1, -1] = 1
    assert not taken(states)[1].is_true
    restored = read(*taken(states))["Holder"]["held"]

    assert restored.dtype == kind
    assert restored.tobytes() == holder.held.tobytes()


def test_another_shape_of_the_same_array_is_a_change() -> None:
    """The shape of an array can be set in place."""
    holder = Holder(np.zeros((2, LARGE)))
    states = CallbackStates([holder])

    holder.held.shape = (LARGE, 2)

    assert read(*taken(states))["Holder"]["held"].shape == (LARGE, 2)


def test_large_variables_are_saved_as_they_were_at_the_moment_of_the_backup() -> None:
    """A callback may hold large variables, such as averages of weights."""
    holder = Holder(keras.Variable(np.zeros(LARGE, "float32")))
    states = CallbackStates([holder])
    holder.held.assign_add(np.ones(LARGE))
    backup = taken(states)
    holder.held.assign_add(np.ones(LARGE))

    assert set(read(*backup)["Holder"]["held"]) == {1}


def test_copies_use_the_memory_of_earlier_copies() -> None:
    """New memory costs several times a copy."""
    holder = Holder(None)
    states = CallbackStates([holder])
    addresses = []
    for value in range(4):
        holder.held = np.full(LARGE, value)
        _, later = taken(states)
        addresses.append(later.arrays["0"].__array_interface__["data"][0])

    assert addresses[2:] == addresses[:2]


def test_a_large_array_from_get_state_is_saved() -> None:
    """`get_state` may return the same array that the callback changes."""

    class Own(keras.callbacks.Callback):
        total = np.zeros(LARGE)

        def get_state(self):
            return {"total": self.total}

        def set_state(self, state) -> None:
            self.total = state["total"]

    own = Own()
    states = CallbackStates([own])
    first = taken(states)
    own.total[0] = 1
    assert not first[1].is_true or read(*first)["Own"]["total"][0] == 0
    assert not taken(states)[1].is_true

    assert read(*taken(states))["Own"]["total"][0] == 1


def test_a_look_at_a_value_that_is_not_plain_is_refused() -> None:
    """The error names the place, so that the user finds the value."""
    with pytest.raises(UnplainError, match=r"\['b'\] is of type builtins.object"):
        Captures().look({"a": np.zeros(LARGE), "b": object()}, "name")


class Writes(keras.callbacks.Callback):
    """A callback that writes the number of each batch into a large array, from a given batch on."""

    def __init__(self, start: int = 0) -> None:
        super().__init__()
        self.seen, self.number, self._start = np.zeros(LARGE, "int64"), 0, start

    def on_train_batch_end(self, batch, logs=None) -> None:
        self.number += 1
        if self.number > self._start:
            self.seen[self.number] = self.number


@pytest.mark.parametrize("start", [0, 3, 6])
@pytest.mark.parametrize("save_freq", [1, "epoch"])
def test_a_restart_restores_a_large_array_of_the_same_moment_as_the_model(tmp_path, start, save_freq) -> None:
    """The array changes in place, from the first batch or later. A void backup leaves an older backup on disk."""
    data = kc.ResumableDataset(np.ones((5, 4)), np.ones((5, 1)), batch_size=1)
    backup = str(tmp_path / "backup")
    with pytest.raises(RuntimeError), kc.BackupAndRestore(backup, save_freq=save_freq, data=data) as callback:
        dense_model().fit(
            data, epochs=3, verbose=0, shuffle=False, callbacks=[Writes(start), Interrupts(9, RuntimeError()), callback]
        )

    writes = Writes(start)
    model = dense_model()
    model.fit(data, epochs=3, verbose=0, shuffle=False, callbacks=[writes, kc.BackupAndRestore(backup, data=data)])

    assert writes.number == 15
    expected = [number if number > start else 0 for number in range(16)]
    assert writes.seen[:16].tolist() == expected


def test_a_void_last_backup_of_a_training_is_repeated_at_once(tmp_path) -> None:
    """The array changes for the first time in the last epoch, so no later batch could repeat the backup."""
    backup = str(tmp_path / "backup")
    fit(dense_model(), Writes(6), kc.BackupAndRestore(backup, delete_checkpoint=False), epochs=2)

    resumed = Writes(6)
    fit(dense_model(), resumed, kc.BackupAndRestore(backup), epochs=3)

    assert resumed.number == 15
    assert resumed.seen[:11].tolist() == [0] * 7 + [7, 8, 9, 10]


def test_arrays_that_change_one_after_another_do_not_void_all_backups(tmp_path) -> None:
    """Each epoch changes another array for the first time. The newest backup is at most two epochs old."""

    class Fills(keras.callbacks.Callback):
        def __init__(self) -> None:
            super().__init__()
            self.of_epoch = [np.zeros(LARGE) for _ in range(8)]

        def on_epoch_end(self, epoch, logs=None) -> None:
            self.of_epoch[epoch][:] = epoch

    behind: list[int] = []

    class Looks(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None) -> None:
            behind.append(epoch - max((record.epoch for record in kc.CheckpointDirectory(tmp_path)), default=0))

    fit(dense_model(), Fills(), kc.BackupAndRestore(tmp_path), Looks(), epochs=8, batches=2)

    assert max(behind) <= 2


def test_the_training_thread_does_not_read_large_arrays(monkeypatch) -> None:
    """A look at a large unchanged array neither hashes nor compares it."""
    holder = Holder(np.ones(LARGE))
    states = CallbackStates([holder])
    holder.held = np.ones(LARGE)
    taken(states)

    def refuse(*arrays) -> None:
        raise AssertionError("read on the training thread")

    monkeypatch.setattr(capture, "_fingerprint", refuse)
    monkeypatch.setattr(capture, "_same", refuse)
    for _ in range(2):
        states.look()
        taken(states)


def test_the_structure_of_a_dict_is_made_of_structures() -> None:
    """A backup combines the structures of callbacks' states with other values."""
    look = Captures().look([1, (2, 3)], "name")

    text, leaves = dumped(dict_of({"a": look.structure, "b": 1}))

    assert decode(text, dict(enumerate(leaves))) == {"a": [1, (2, 3)], "b": 1}
