"""The arena: the copies it holds, and the values it knows to be on disk."""

import numpy as np
import pytest

from keras_ckpt.formats import arena
from keras_ckpt.formats.arena import Arena, Packed, Saved, same_bytes
from keras_ckpt.formats.bundle_index import Entry
from keras_ckpt.formats.bundle_writer import Value, checksum_of, number_value, string_value
from support.runs import history

FLOAT = 1


def value(array: np.ndarray) -> Value:
    return number_value(FLOAT, array.astype(np.float32))


def filled(**arrays: np.ndarray) -> tuple[Arena, Saved]:
    """An arena with values, and a checkpoint that holds all of them."""
    memory = Arena()
    values = {name.encode(): value(array) for name, array in arrays.items()}
    memory.make_room({key: len(each.data) for key, each in values.items()})
    entries = {}
    for number, (key, each) in enumerate(values.items()):
        memory.take(key, each)
        entries[key] = Entry(FLOAT, each.shape, 0, number << 30, len(each.data), checksum_of(each.data), ())
    saved = Saved(history("10")[0], {}, frozenset(values), entries)
    memory.remember(saved)
    return memory, saved


def test_take_returns_a_copy() -> None:
    """A later change of the source does not change the copy."""
    memory = Arena()
    array = np.ones(5, np.float32)
    memory.make_room({b"a": 20})
    copy = memory.take(b"a", number_value(FLOAT, array))

    array[:] = 2

    assert copy.data.view(np.float32).tolist() == [1] * 5
    assert memory.has(b"a", copy)


def test_take_reuses_the_memory_of_a_value() -> None:
    """New memory costs several times the copy."""
    memory, _ = filled(a=np.ones(5))
    first = memory.take(b"a", value(np.ones(5)))

    memory.make_room({b"a": 20})
    second = memory.take(b"a", value(np.zeros(5)))

    assert second.data is first.data
    assert first.data.view(np.float32).tolist() == [0] * 5


def test_a_changed_value_is_no_longer_known_to_be_on_disk() -> None:
    """The entries of other values stay."""
    memory, saved = filled(a=np.ones(5), b=np.ones(5))

    memory.take(b"a", value(np.ones(5)))
    memory.take(b"b", value(np.zeros(5)))

    assert saved.entries.keys() == {b"a"}


def test_values_are_compared_by_bits() -> None:
    """-0.0 differs from 0.0, and a NaN equals the same NaN."""
    zeros = np.zeros(5, np.float32)
    memory, saved = filled(a=zeros, b=np.full(5, np.nan))

    memory.take(b"a", value(-zeros))
    memory.take(b"b", value(np.full(5, np.nan)))

    assert saved.entries.keys() == {b"b"}


@pytest.mark.parametrize("shape", [(5,), (2048, 1024)], ids=str)
def test_a_half_copied_value_is_not_known_to_be_on_disk(monkeypatch, shape) -> None:
    """Ctrl-C comes while half of a small or a large value is copied."""
    memory, saved = filled(a=np.zeros(shape), b=np.ones(5))

    def interrupted(target: np.ndarray, source: np.ndarray) -> None:
        target[: len(target) // 2] = source[: len(target) // 2]
        raise KeyboardInterrupt

    monkeypatch.setattr(arena.np, "copyto", interrupted)
    with pytest.raises(KeyboardInterrupt):
        memory.take(b"a", value(np.ones(shape)))

    assert saved.entries.keys() == {b"b"}


def packed(**arrays: np.ndarray) -> tuple[list[Packed], np.ndarray]:
    """Packs values one after another. Returns their places and the bytes."""
    values, end = [], 0
    for name, array in arrays.items():
        values.append(Packed(name.encode(), FLOAT, array.shape, end, array.size * 4))
        end += array.size * 4
    data = np.concatenate([array.reshape(-1) for array in arrays.values()])
    return values, data.astype(np.float32).view(np.uint8)


class TestTakePacked:
    """`take_packed` takes many values as `take` takes each of them."""

    def test_take_packed_returns_copies(self) -> None:
        arrays = {"a": np.ones(5), "b": np.arange(6).reshape(2, 3), "scalar": np.array(7), "empty": np.ones((0, 2))}
        memory, _ = filled(**{name: np.zeros_like(array) for name, array in arrays.items()})
        values, data = packed(**arrays)

        taken = memory.take_packed(values, data)
        data[:] = 0

        for name, array in arrays.items():
            copy = taken[name.encode()]
            assert copy.data.view(np.float32).reshape(copy.shape).tolist() == array.tolist()
            assert memory.has(name.encode(), copy)

    def test_packed_values_that_changed_are_no_longer_known_to_be_on_disk(self) -> None:
        """They are compared by bits. The entries of other values stay."""
        memory, saved = filled(a=np.ones(5), b=np.ones(5), c=np.zeros(5), d=np.full(5, np.nan))

        memory.take_packed(*packed(a=np.ones(5), b=np.arange(5), c=-np.zeros(5), d=np.full(5, np.nan)))

        assert saved.entries.keys() == {b"a", b"d"}

    def test_interrupted_packed_copies_are_not_known_to_be_on_disk(self, monkeypatch) -> None:
        """Ctrl-C comes while the first value is copied."""
        memory, saved = filled(a=np.zeros(5), b=np.ones(5), c=np.zeros(5))
        monkeypatch.setattr(arena.ctypes, "memmove", interrupted)

        with pytest.raises(KeyboardInterrupt):
            memory.take_packed(*packed(a=np.ones(5), b=np.ones(5), c=np.ones(5)))

        assert saved.entries.keys() == {b"b"}


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_without_change_a_value_that_differs_is_copied_elsewhere() -> None:
    """So is a new value. An equal value is in the arena already."""
    memory, saved = filled(a=np.ones(5), b=np.ones(5), c=np.ones(5))

    same, other, new, longer = (
        memory.take(key, value(array), change=False)
        for key, array in ((b"a", np.ones(5)), (b"b", np.zeros(5)), (b"new", np.ones(5)), (b"c", np.ones(6)))
    )

    assert [memory.has(key, each) for key, each in ((b"a", same), (b"b", other), (b"new", new), (b"c", longer))] == [
        True, False, False, False,
    ]  # fmt: skip
    assert other.data.view(np.float32).tolist() == [0] * 5
    assert memory.take(b"b", value(np.ones(5))).data.view(np.float32).tolist() == [1] * 5
    assert saved.entries.keys() == {b"a", b"b", b"c"}


def test_without_change_an_unfilled_room_is_not_filled() -> None:
    """Its first bytes are in a page with bytes that are being written."""
    memory, _ = filled(a=np.ones(5))
    memory.make_room({b"b": 20})

    copy = memory.take(b"b", value(np.ones(5)), change=False)

    assert not memory.has(b"b", copy)
    assert memory.has(b"b", memory.take(b"b", value(np.ones(5))))


def test_a_value_of_another_size_gets_new_memory_and_loses_its_entry() -> None:
    memory, saved = filled(a=np.ones(5), b=np.ones(5))

    memory.make_room({b"a": 24, b"b": 20})
    memory.take(b"a", value(np.ones(6)))
    memory.take(b"b", value(np.ones(5)))

    assert saved.entries.keys() == {b"b"}


def test_take_does_not_copy_strings() -> None:
    """They are written in each save."""
    memory = Arena()
    text = string_value([b"text"], ())

    assert memory.take(b"text", text) is text
    assert not memory.has(b"text", text)


@pytest.mark.parametrize(("other", "equal"), [(b"abc", True), (b"abd", False), (b"ab", False)])
def test_same_bytes_compares_length_and_content(other, equal) -> None:
    data = np.frombuffer(b"xabc", np.uint8)[1:]

    assert same_bytes(data, np.frombuffer(other, np.uint8)) == equal
    assert same_bytes(data[:0], data[3:])
