"""What the restart of a backed-up fit reads before its first new batch."""

import json

import pytest

PROGRAM = """
import collections, json, os, signal, sys
import keras
import keras_ckpt as kc
from keras_ckpt.formats import bundle_index, targets
from keras_ckpt.store import checks, commit, listing
from support.models import X, Y, dense_model

path, last = sys.argv[1], int(sys.argv[2])
counts = collections.Counter()

def count(module, name, what):
    function = getattr(module, name)
    def counting(*arguments):
        counts.update(what(*arguments))
        return function(*arguments)
    setattr(module, name, counting)

count(listing, "_listed", lambda *_: ["listings"])
count(commit, "recover", lambda *_: ["recoveries"])
for module in (checks, bundle_index, targets):
    count(module, "refuse_changed", lambda file, size, digest: [file.name] if digest else [])

class Ends(keras.callbacks.Callback):
    def on_train_batch_begin(self, batch, logs=None) -> None:
        if not last:
            print(json.dumps({"batch": batch, **counts}), flush=True)
            os._exit(0)
        if self.model.optimizer.iterations == last:
            os.kill(os.getpid(), signal.SIGKILL)

data = kc.ResumableDataset(X, Y, batch_size=4, shuffle=True, seed=1)
backup = kc.BackupAndRestore(path, save_freq=int(sys.argv[3]), data=data, save_on_background=False)
keras.utils.set_random_seed(1)
dense_model().fit(data, epochs=3, shuffle=False, verbose=0, callbacks=[backup, Ends()])
"""


@pytest.mark.parametrize(("step", "batch"), [(4, 4), (10, 0)])
def test_a_restart_lists_twice_recovers_once_and_reads_every_digest_once(fork_server, tmp_path, step, batch) -> None:
    """A restart within an epoch restores the model twice. The second time reads files that the first has verified."""
    fork_server.run(PROGRAM, tmp_path, step + 1, step)
    printed = fork_server.run(PROGRAM, tmp_path, 0, step).stdout
    [told] = [line for line in printed.splitlines() if line.startswith("{")]
    counts = json.loads(told)

    assert counts.pop("batch") == batch
    assert counts.pop("listings") <= 2
    assert counts.pop("recoveries") == 1
    assert counts == {f"ckpt-{step}.index": 1, f"ckpt-{step}.data-00000-of-00001": 1}
