"""An index that is damaged, or made to do harm, is refused before TensorFlow reads it, which it would not survive."""

from __future__ import annotations

import contextlib
import copy
import faulthandler
import mmap
import os
import pathlib
import random
import resource
import shutil
import signal
from collections.abc import Callable, Sequence

import keras
import msgspec
import pytest
import tensorflow as tf
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tensorflow.core.protobuf import trackable_object_graph_pb2

import keras_ckpt as kc
from keras_ckpt.errors import DamagedCheckpointError
from keras_ckpt.formats import bundle_index as bundles
from keras_ckpt.formats.bundle_index import read_index
from keras_ckpt.store.files import Folder
from keras_ckpt.store.record import SIZE_LIMIT, CheckpointFile, decode, encode
from reliability.index_writer import Bundle, Entry, read, string, varint
from support.models import dense_model, fit, values

SUFFIX = "/.ATTRIBUTES/VARIABLE_VALUE"
KERNEL = f"model/dense/kernel{SUFFIX}"
GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"
NAMES = "_KERAS_CKPT_NAMES"
BATCH = 100


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A directory with two checkpoints of a model."""
    path = tmp_path_factory.mktemp("saved") / "run"
    fit(dense_model(), kc.ModelCheckpoint(path), epochs=2)
    return path


@pytest.fixture(scope="module")
def model() -> keras.Model:
    model = dense_model()
    fit(model)
    return model


def bits(model: keras.Model) -> list[bytes]:
    return [value.tobytes() for value in values(model)]


def entry(*, dimensions: Sequence[int] | None = None, **fields: int) -> Callable[[Bundle], None]:
    """Changes what the index says of a kernel of 4 by 3."""

    def change(bundle: Bundle) -> None:
        for name, value in fields.items():
            setattr(bundle.entry(KERNEL), name, value)
        if dimensions is not None:
            del bundle.entry(KERNEL).shape.dim[:]
            for size in dimensions:
                bundle.entry(KERNEL).shape.dim.add(size=size)

    return change


def header(**fields: int) -> Callable[[Bundle], None]:
    """Changes what the header says."""

    def change(bundle: Bundle) -> None:
        for name, value in fields.items():
            setattr(bundle.header.version if name == "min_consumer" else bundle.header, name, value)

    return change


def parts(*parts: Sequence[tuple[int, int]]) -> Callable[[Bundle], None]:
    """Says that the kernel was saved in parts, each a start and a length in each dimension."""

    def change(bundle: Bundle) -> None:
        entry(offset=0, size=0)(bundle)
        for part in parts:
            extents = bundle.entry(KERNEL).slices.add().extent
            for start, length in part:
                extents.add(start=start, length=length)

    return change


def text(key: str, length: int) -> Callable[[Bundle], None]:
    """Gives a string another length than its own, with all checksums as they should be."""
    return lambda bundle: bundle.append(bundle.entry(key), *string(b"graph", length))


def overlapping(bundle: Bundle) -> None:
    other = bundle.entry(f"model/dense/bias{SUFFIX}")
    bundle.entry(KERNEL).offset = other.offset + 4


def long_key(bundle: Bundle) -> None:
    bundle.entries.append((b"z" * (1 << 20), bundle.entries[-1][1]))


def twice(bundle: Bundle) -> None:
    bundle.entries.insert(5, bundle.entries[5])


def unsorted(bundle: Bundle) -> None:
    bundle.entries.reverse()


def headerless(bundle: Bundle) -> None:
    bundle.header = bundle.entries[0][1]


def garbled(bundle: Bundle) -> None:
    bundle.entries[5] = (bundle.entries[5][0], b"\xff" * 9)


def with_parts_of(**fields: object) -> Callable[[Bundle], None]:
    """Changes the parts of an index: their names and values are those of `Bundle`."""

    def change(bundle: Bundle) -> None:
        for name, value in fields.items():
            setattr(bundle, name, value)

    return change


def rewritten(change: Callable[[bytes], bytes]) -> Callable[[Bundle], None]:
    """Changes the bytes of the whole index."""

    def patch(bundle: Bundle) -> None:
        index = bundle.index()
        bundle.index = lambda: change(index)

    return patch


WRONG = {
    "no bytes": rewritten(lambda index: b""),
    "half": rewritten(lambda index: index[: len(index) // 2]),
    "random bytes": rewritten(lambda index: random.Random(0).randbytes(len(index))),
    "zeros": rewritten(lambda index: bytes(len(index))),
    "random but for the end": rewritten(lambda index: random.Random(0).randbytes(len(index) - 8) + index[-8:]),
    "another magic number": with_parts_of(magic=1),
    "a bad checksum of the first block": with_parts_of(bad_checksums=(0,)),
    "a bad checksum of a later block": with_parts_of(bad_checksums=(1,)),
    "a block outside of the file": with_parts_of(shift=(1 << 40, 0)),
    "a block of 2^60 bytes": with_parts_of(shift=(0, 1 << 60)),
    "a compressed block": with_parts_of(compression=1),
    "restarts outside of the block": with_parts_of(restarts=(0, 1 << 31)),
    "restarts without end": with_parts_of(restarts=(0,) * 1000),
    "a shape whose product overflows": entry(dimensions=(1 << 40, 1 << 40)),
    "a negative dimension": entry(dimensions=(4, -3)),
    "300 dimensions": entry(dimensions=(1,) * 300),
    "a shape of 2^40": entry(dimensions=(1 << 40,)),
    "an object graph of 2^33 bytes": text(GRAPH, 1 << 33),
    "an object graph of 2^50 bytes": text(GRAPH, 1 << 50),
    "an object graph of 2^62 bytes": text(GRAPH, 1 << 62),
    "an object graph shorter than its entry": text(GRAPH, 2),
    "type 0": entry(dtype=0),
    "type 999": entry(dtype=999),
    "a variant": entry(dtype=21),
    "a resource": entry(dtype=20),
    "a string where a float was": entry(dtype=7),
    "a double where a float was": entry(dtype=2),
    "offset -1": entry(offset=-1),
    "offset 2^62": entry(offset=1 << 62),
    "bytes of another entry": overlapping,
    "size -1": entry(size=-1),
    "size 2^62": entry(size=1 << 62),
    "data file -1": entry(shard_id=-1),
    "data file 99999": entry(shard_id=99_999),
    "no data files": header(num_shards=0),
    "-1 data files": header(num_shards=-1),
    "2e9 data files": header(num_shards=2_000_000_000),
    "two data files, of which there is one": header(num_shards=2),
    "the other byte order": header(endianness=1),
    "a format of the future": header(min_consumer=99),
    "no header": headerless,
    "a part of negative extent": parts([(0, -4), (0, 3)]),
    "a part that begins before the variable": parts([(-1, 4), (0, 3)]),
    "a part of another rank": parts([(0, 4)]),
    "parts without entries": parts([(0, 2), (0, 3)], [(2, 2), (0, 3)]),
    "a part twice": parts([(0, 2), (0, 3)], [(0, 2), (0, 3)]),
    "a key of a mebibyte": long_key,
    "an entry twice": twice,
    "keys that are not sorted": unsorted,
    "an entry that is no message": garbled,
}


def seal(folder: Folder, name: str) -> None:
    """Puts the digests of the files as they are into the sidecar."""
    record = decode(folder.read(f"{name}.json", SIZE_LIMIT), name, folder.path)
    files = tuple(CheckpointFile(file.name, *folder.digest(file.name)) for file in record.files)
    folder.replace(f"{name}.json", encode(msgspec.structs.replace(record, files=files)))


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_index_is_refused_and_the_model_is_untouched(saved, tmp_path, model, name) -> None:
    """Be it that of a checkpoint which others wrote, or of one whose sidecar agrees with it."""
    run = tmp_path / "run"
    shutil.copytree(saved, run)
    bundle = read(run / "ckpt-10")
    WRONG[name](bundle)
    bundle.write(run / "ckpt-10")
    with Folder(run) as folder:
        seal(folder, "ckpt-10")
    bundle.write(tmp_path / "other")
    before = bits(model)

    for path in (run / "ckpt-10", tmp_path / "other"):
        with pytest.raises(DamagedCheckpointError, match=rf"{path} cannot be trusted: .*index"):
            kc.restore(model, path)
        assert bits(model) == before

    with pytest.warns(UserWarning, match="ckpt-10 cannot be trusted: .*Going back to ckpt-5"):
        assert kc.restore(model, run).step == 5


def test_an_index_of_too_many_entries_is_refused(saved, monkeypatch) -> None:
    """Each takes a hundred times its bytes in memory."""
    monkeypatch.setattr(bundles, "_ENTRY_LIMIT", 10)

    with Folder(saved) as folder, pytest.raises(DamagedCheckpointError, match="more than 10 entries"):
        read_index(folder, "ckpt-10")


def test_a_manager_refuses_what_tensorflow_would_crash_on(tmp_path) -> None:
    """TensorFlow's own `restore` reads the whole index."""
    manager = kc.CheckpointManager(tf.train.Checkpoint(x=tf.Variable(1.0)), tmp_path)
    bundle = read(manager.save())
    bundle.entry(f"x{SUFFIX}").shape.dim.add(size=-1)
    bundle.write(tmp_path / "ckpt-1")
    with Folder(tmp_path) as folder:
        seal(folder, "ckpt-1")

    with pytest.raises(
        DamagedCheckpointError, match=r"ckpt-1 cannot be trusted: the entry 'x/.*' of its index has a shape"
    ):
        manager.restore_or_initialize()


GRAPHS = {
    "none": lambda graph: None,
    "no message": lambda graph: b"\xff" * 9,
    "empty": lambda graph: b"",
    "a child 999": lambda graph: setattr(graph.nodes[0].children[0], "node_id", 999),
    "a child -1": lambda graph: setattr(graph.nodes[0].children[0], "node_id", -1),
    "a slot 999": lambda graph: graph.nodes[0].slot_variables.add(slot_variable_node_id=999) and None,
    "a slot of -1": lambda graph: graph.nodes[0].slot_variables.add(original_variable_node_id=-1) and None,
    "keys that are not there": lambda graph: (
        [setattr(attribute, "checkpoint_key", "gone") for node in graph.nodes for attribute in node.attributes] and None
    ),
}


def graph_of(prefix: str) -> trackable_object_graph_pb2.TrackableObjectGraph:
    """The object graph of a checkpoint."""
    graph = trackable_object_graph_pb2.TrackableObjectGraph()
    graph.ParseFromString(tf.train.load_checkpoint(prefix).get_tensor(GRAPH))
    return graph


def foreign(tmp_path: pathlib.Path, model: keras.Model) -> tuple[str, Bundle, object]:
    """A checkpoint that TensorFlow wrote, and its object graph."""
    prefix = tf.train.Checkpoint(model=model).write(str(tmp_path / "theirs"))
    return prefix, read(prefix), graph_of(prefix)


@pytest.mark.parametrize("name", GRAPHS)
def test_a_wrong_object_graph_is_refused(tmp_path, model, name) -> None:
    """TensorFlow restores nothing from some of them, and says that all is well."""
    prefix, bundle, graph = foreign(tmp_path, model)
    content = GRAPHS[name](graph)
    if name == "none":
        bundle.entries = [(key, each) for key, each in bundle.entries if key != GRAPH.encode()]
    else:
        bundle.append(bundle.entry(GRAPH), *string(graph.SerializeToString() if content is None else content))
    bundle.write(prefix)
    before = bits(model)

    with pytest.raises(DamagedCheckpointError, match="cannot be trusted"):
        kc.restore(model, prefix)

    assert bits(model) == before


def test_an_object_graph_may_have_cycles(tmp_path, model) -> None:
    """Keras's own models have some."""
    prefix, bundle, graph = foreign(tmp_path, model)
    graph.nodes[1].children.add(node_id=0, local_name="back")
    graph.nodes[1].children.add(node_id=1, local_name="self")
    bundle.append(bundle.entry(GRAPH), *string(graph.SerializeToString()))
    bundle.write(prefix)
    before = bits(model)

    kc.restore(model, prefix)

    assert bits(model) == before


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A sound checkpoint of all sorts: numbers of many types, strings, variants, a variable in parts, no elements."""
    path = tmp_path_factory.mktemp("many") / "sound"
    iterator = iter(tf.data.Dataset.range(3))
    types = [tf.float32, tf.float64, tf.int64, tf.int8, tf.bool, tf.bfloat16, tf.half, tf.complex128]
    tensors = {f"typed_{dtype.name}": tf.cast(tf.reshape(tf.range(6), (2, 3)), dtype) for dtype in types}
    tensors |= {
        "none": tf.zeros((0, 5)),
        "no texts": tf.constant([], tf.string),
        "text": tf.constant(b"text"),
        "texts": tf.constant([[b"", b"a"], [b"bc", b"d" * 300]]),
        "iterator": tf.raw_ops.SerializeIterator(resource_handle=iterator._iterator_resource),
    }
    sliced = [(0, 100), (100, 200)]
    tf.raw_ops.SaveV2(
        prefix=str(path),
        tensor_names=[*tensors, *["in parts"] * 2],
        shape_and_slices=[*[""] * len(tensors), *[f"300 2 {start},{length}:0,2" for start, length in sliced]],
        tensors=[*tensors.values(), *[tf.fill((length, 2), start) for start, length in sliced]],
    )
    return path


def test_a_sound_index_is_accepted(many) -> None:
    """Whatever TensorFlow can save."""
    with Folder(many.parent) as folder:
        names = read_index(folder, many.name).variables

    assert names == tf.train.load_checkpoint(str(many)).get_variable_to_shape_map().keys()


def test_a_checkpoint_of_several_data_files_is_restored(tmp_path) -> None:
    """TensorFlow cuts variables into parts to keep each file small."""
    variable = tf.Variable(tf.range(3000))
    manager = kc.CheckpointManager(tf.train.Checkpoint(x=variable), tmp_path)
    policy = tf.train.experimental.MaxShardSizePolicy(5000)
    manager.save(options=tf.train.CheckpointOptions(experimental_sharding_callback=policy))
    variable.assign_add(tf.ones_like(variable))

    manager.restore_or_initialize()

    assert len(list(tmp_path.glob("*.data-*"))) > 2
    assert (variable.numpy() == range(3000)).all()


@pytest.mark.parametrize("start", [0, 1, 63, 64, 300, 8191, 8192, 1 << 20, (1 << 20) - 1])
def test_a_variable_in_parts_may_be_cut_anywhere(tmp_path, start) -> None:
    """The places are in the keys of the parts, in an encoding of TensorFlow's own."""
    rows = start + 10
    pieces = [(at, length) for at, length in [(0, start), (start, 10)] if length]
    tf.raw_ops.SaveV2(
        prefix=str(tmp_path / "sound"),
        tensor_names=["a\0b"] * len(pieces),
        shape_and_slices=[f"{rows} 1 {at},{length}:0,1" for at, length in pieces],
        tensors=[tf.zeros((length, 1), tf.int8) for _, length in pieces],
    )

    with Folder(tmp_path) as folder:
        assert read_index(folder, "sound").variables == {"a\0b"}


def test_an_index_of_many_blocks_is_accepted(tmp_path) -> None:
    """TensorFlow begins another block after 256 KiB."""
    names = [f"{'long' * 20}_{number}" for number in range(8000)]
    tf.raw_ops.SaveV2(
        prefix=str(tmp_path / "sound"),
        tensor_names=names,
        shape_and_slices=[""] * len(names),
        tensors=[tf.constant(0)] * len(names),
    )

    with Folder(tmp_path) as folder:
        assert read_index(folder, "sound").variables == set(names)


NUMBERS = st.sampled_from([*range(-2, 40), 254, 999, 2**31 - 1, -(2**31)])
LARGE = NUMBERS | st.sampled_from([2**31, 2**32, 2**40, 2**62, 2**63 - 1, -(2**63)])


def change_field(draw: st.DrawFn, bundle: Bundle, message: Entry) -> None:
    field = draw(st.sampled_from(["dtype", "shard_id", "offset", "size", "crc32c"]))
    value = draw(LARGE if field in ("offset", "size") else NUMBERS)
    setattr(message, field, value & 0xFFFFFFFF if field == "crc32c" else value)


def change_type(draw: st.DrawFn, bundle: Bundle, message: Entry) -> None:
    message.dtype = draw(st.integers(1, 33))


def change_shape(draw: st.DrawFn, bundle: Bundle, message: Entry) -> None:
    known = [each.size for each in message.shape.dim]
    sizes = draw(
        st.permutations(known)
        | st.lists(LARGE, max_size=4)
        | st.just([*known, 1])
        | st.just([1] * draw(st.integers(250, 260)))
        | st.just([each.size for each in draw(st.sampled_from(bundle.entries))[1].shape.dim])
    )
    del message.shape.dim[:]
    for size in sizes:
        message.shape.dim.add(size=size)


def change_parts(draw: st.DrawFn, bundle: Bundle, message: Entry) -> None:
    if message.slices and draw(st.booleans()):
        del message.slices[draw(st.integers(0, len(message.slices) - 1))]
        return
    extents = (message.slices[0] if message.slices else message.slices.add()).extent
    for _ in range(draw(st.integers(1, 3))):
        extents.add(start=draw(LARGE), length=draw(LARGE))


def change_places(draw: st.DrawFn, bundle: Bundle, message: Entry) -> None:
    """Two entries change places in the data file."""
    other = draw(st.sampled_from(bundle.entries))[1]
    message.offset, other.offset = other.offset, message.offset


def change_header(draw: st.DrawFn, bundle: Bundle, message: Entry) -> None:
    bundle.header.num_shards = draw(NUMBERS)
    bundle.header.endianness = draw(st.integers(0, 1))
    bundle.header.version.producer = draw(NUMBERS)
    bundle.header.version.min_consumer = draw(NUMBERS)
    bundle.header.version.bad_consumers.extend(draw(st.lists(NUMBERS, max_size=2)))


def change_key(draw: st.DrawFn, bundle: Bundle, message: Entry) -> None:
    place = draw(st.integers(0, len(bundle.entries) - 1))
    key, each = bundle.entries[place]
    key = draw(st.binary(max_size=20) | st.sampled_from([key + b"~", key[:-1], key + b"\xff", b"a" * 5000]))
    bundle.entries[place] = (key, each)
    if draw(st.booleans()):
        bundle.entries.sort(key=lambda pair: pair[0])


def change_entries(draw: st.DrawFn, bundle: Bundle, message: Entry) -> None:
    """One more, one less, or two in each other's place."""
    one, other = (draw(st.integers(0, len(bundle.entries) - 1)) for _ in range(2))
    kind = draw(st.integers(0, 2))
    if kind == 0:
        del bundle.entries[one]
    elif kind == 1:
        bundle.entries.insert(one, bundle.entries[other])
    else:
        bundle.entries[one], bundle.entries[other] = bundle.entries[other], bundle.entries[one]


def change_blocks(draw: st.DrawFn, bundle: Bundle, message: Entry) -> None:
    bundle.per_block = draw(st.integers(1, 20))
    bundle.restart_interval = draw(st.integers(1, 20))
    kind = draw(st.integers(0, 5))
    if kind == 0:
        bundle.restarts = tuple(draw(st.lists(st.integers(0, 300) | st.integers(0, 2**32 - 1), max_size=5)))
    elif kind == 1:
        bundle.compression = draw(st.integers(0, 255))
    elif kind == 2:
        bundle.shift = draw(st.tuples(LARGE, LARGE))
    elif kind == 3:
        bundle.bad_checksums = (draw(st.integers(0, 5)),)


def change_lengths(draw: st.DrawFn, bundle: Bundle, message: Entry) -> None:
    """A string of another length than its own, all checksums as they should be."""
    length = draw(st.none() | st.integers(0, 6) | st.sampled_from([2**31, 2**32, 2**33, 2**50, 2**62, 2**64 - 1]))
    message.Clear()
    message.dtype = tf.string.as_datatype_enum
    bundle.append(message, *string(b"text", length))


def change_data(draw: st.DrawFn, bundle: Bundle, message: Entry) -> None:
    bundle.data = scrambled(draw, bundle.data)


def change_message(draw: st.DrawFn, bundle: Bundle, message: Entry) -> None:
    """Bytes that may be no message."""
    place = draw(st.integers(0, len(bundle.entries) - 1))
    key, each = bundle.entries[place]
    fields = st.tuples(st.integers(0, 130), st.integers(0, 2**64 - 1))
    more = b"".join(varint(number) for pair in draw(st.lists(fields, max_size=2)) for number in pair)
    bundle.entries[place] = (key, RawEntry(scrambled(draw, each.SerializeToString() + more)))


class RawEntry(bytes):
    """Bytes in an entry's place."""

    __slots__ = ()

    def SerializeToString(self) -> bytes:  # noqa: N802 - the name of Protocol Buffers
        return self


CHANGES = [
    change_field,
    change_type,
    change_shape,
    change_parts,
    change_places,
    change_header,
    change_key,
    change_entries,
    change_blocks,
    change_lengths,
    change_data,
    change_message,
]


def scrambled(draw: st.DrawFn, data: bytes) -> bytes:
    """Some bytes set, inserted, removed or cut off."""
    scrambled = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(scrambled)))
        with_bytes = draw(st.binary(max_size=3))
        scrambled[at : at + draw(st.sampled_from([0, 1, 1, 1, 3, 1000]))] = with_bytes
    return bytes(scrambled)


@st.composite
def hostile(draw: st.DrawFn, sound: Bundle) -> tuple[bytes, bytes]:
    """An index and a data file that are not quite as they should be."""
    bundle = copy.deepcopy(sound)
    for change in draw(st.lists(st.sampled_from(CHANGES), max_size=2)):
        messages = [each for _, each in bundle.entries if isinstance(each, Entry)]
        if len(messages) == len(bundle.entries) > 0:
            change(draw, bundle, draw(st.sampled_from(messages)))
    index = bundle.index()
    return scrambled(draw, index) if draw(st.integers(0, 3)) == 0 else index, bundle.data


def read_all(prefix: str) -> None:
    """Reads a checkpoint as this package does: everything but variants, which no model has."""
    reader = tf.train.load_checkpoint(prefix)
    types = reader.get_variable_to_dtype_map()
    for key in reader.get_variable_to_shape_map():
        if types[key] == tf.variant:
            continue
        with contextlib.suppress(Exception):
            tf.raw_ops.RestoreV2(prefix=prefix, tensor_names=[key], shape_and_slices=[""], dtypes=[types[key]])


def fates(prefixes: Sequence[str]) -> dict[str, str]:
    """What becomes of processes that read checkpoints with TensorFlow: those that end by a signal, with its name."""
    fates, left = {}, list(prefixes)
    while left:
        progress = mmap.mmap(-1, 8)
        child = os.fork()
        if child == 0:
            _read_in_child(left, progress)
        _, status = os.waitpid(child, 0)
        at = int.from_bytes(progress[:], "little")
        if os.WIFSIGNALED(status):
            fates[left[at]] = signal.Signals(os.WTERMSIG(status)).name
        else:
            assert at == len(left), os.WEXITSTATUS(status)
        left = left[at + 1 :]
    return fates


def _read_in_child(prefixes: Sequence[str], progress: mmap.mmap) -> None:
    """Never returns. A process that takes too much memory or time ends by a signal too."""
    status = 1
    try:
        size = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + (2 << 30),) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        faulthandler.disable()
        for number, prefix in enumerate(prefixes):
            progress[:] = number.to_bytes(8, "little")
            signal.alarm(30)
            with contextlib.suppress(Exception):  # an error is as good as an answer
                read_all(prefix)
        progress[:] = len(prefixes).to_bytes(8, "little")
        status = 0
    finally:
        os._exit(status)


def test_a_process_that_tensorflow_ends_is_seen(saved, tmp_path) -> None:
    """The harness below can tell, and goes on with what is left."""
    bundle = read(saved / "ckpt-10")
    bundle.write(tmp_path / "sound")
    entry(dimensions=(4, -3))(bundle)
    bundle.write(tmp_path / "wrong")

    sound, wrong = str(tmp_path / "sound"), str(tmp_path / "wrong")
    assert fates([sound, wrong, sound, wrong]) == {wrong: "SIGABRT"}


def test_tensorflow_survives_what_is_not_refused(many, tmp_path, long, tally) -> None:
    """Changed by structure, with checksums that hold, or byte by byte."""
    sound = read(many)
    waiting: list[str] = []

    def let_tensorflow_read() -> None:
        tally["invalid"] += len(found := fates(waiting))
        assert not found
        for prefix in waiting:
            for path in tmp_path.glob(f"{pathlib.Path(prefix).name}.*"):
                path.unlink()
        waiting.clear()

    @settings(
        max_examples=100_000 if long else 1000,
        phases=[Phase.generate],
        deadline=None,
        database=None,
        derandomize=not long,
        suppress_health_check=list(HealthCheck),
    )
    @given(hostile(sound))
    def check(files: tuple[bytes, bytes]) -> None:
        name = f"trial-{tally['trials']}"
        tally["trials"] += 1
        index, data = files
        (tmp_path / f"{name}.index").write_bytes(index)
        (tmp_path / f"{name}.data-00000-of-00001").write_bytes(data)
        try:
            read_index(folder, name)
        except DamagedCheckpointError:
            tally["refused"] += 1
            for path in tmp_path.glob(f"{name}.*"):
                path.unlink()
            return
        tally["accepted"] += 1
        waiting.append(str(tmp_path / name))
        if len(waiting) == BATCH:
            let_tensorflow_read()

    with Folder(tmp_path) as folder:
        check()
    let_tensorflow_read()
    assert tally["accepted"] > tally["trials"] / 40
