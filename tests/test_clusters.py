"""The script and the job of docs/guides/clusters.md, with real signals. A stub stands in for SLURM's two commands."""

import os
import pathlib
import re
import signal
import subprocess
import time

import pytest

import keras_ckpt as kc
from support.fork_server import ForkServer

PAGE = (pathlib.Path(__file__).parents[1] / "docs" / "guides" / "clusters.md").read_text()
SCRIPT = "\n".join(re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)[:2])
JOB = re.search(r"^```bash\n(#!/bin/bash\n.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)[1]


def handles(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal."""
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    return bool(int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16) >> number - 1 & 1)


def ended_by(fork_server: ForkServer, number: int) -> subprocess.CompletedProcess[str]:
    """Starts the script, and sends it a signal once its training has begun.

    Its process exits as one that no server has forked, with all objects in the reach of the garbage collector.
    """
    process = fork_server.start(f"import gc; gc.unfreeze()\n{SCRIPT}")
    while not handles(process.pid, number):
        time.sleep(0.001)
    os.kill(process.pid, number)
    return process.wait()


def test_the_script_ends_with_its_exit_code_and_a_backup_and_resumes_when_it_is_started_again(
    fork_server, tmp_path, monkeypatch
) -> None:
    """After its end, a further start trains nothing."""
    monkeypatch.chdir(tmp_path)

    ended = ended_by(fork_server, signal.SIGTERM)

    [backup] = kc.CheckpointDirectory("runs/job/backup")
    assert (ended.returncode, ended.stderr) == (75, "")
    assert ended.stdout.strip() == f"SIGTERM: backed up at step {backup.step} in {tmp_path}/runs/job/backup"
    assert 0 < backup.step < 160

    resumed, finished = fork_server.run(SCRIPT), fork_server.run(SCRIPT)

    assert [each.returncode for each in (resumed, finished)] == [0, 0]
    assert f"resuming from step {backup.step}, epoch" in resumed.stdout
    assert resumed.stdout.endswith("finished at epoch 5\n")
    assert "Found a finished run" in finished.stdout


@pytest.mark.parametrize(
    ("code", "requeued"), [(75, "requeue 7\n"), (143, "requeue 7\n"), (138, "requeue 7\n"), (0, ""), (1, "")]
)
def test_the_job_is_queued_again_if_its_training_was_ended_by_a_signal(tmp_path, code, requeued) -> None:
    """Otherwise not. The job has the exit code of the training."""
    for name, line in {"srun": f"exit {code}", "scontrol": 'echo "$@" >>requeued'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o700)
    (tmp_path / "requeued").touch()
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}

    ended = subprocess.run(["bash", "-c", JOB], check=False, cwd=tmp_path, env=environment)

    assert ended.returncode == code
    assert (tmp_path / "requeued").read_text() == requeued
