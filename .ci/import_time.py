"""Prints the time that `import keras_ckpt` adds to a bare interpreter, in medians of turns. Fails above 50 ms."""

import resource
import statistics
import subprocess
import sys

LIMIT = 0.05
TURNS = 21


def seconds(code: str) -> float:
    """The time that a processor takes for a Python process. Other processes do not count, as they do on a clock."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


turns = [(seconds("pass"), seconds("import keras_ckpt")) for _ in range(TURNS)]
bare, whole = map(statistics.median, zip(*turns, strict=True))
print(f"import keras_ckpt: {(whole - bare) * 1e3:.0f} ms more than the {bare * 1e3:.0f} ms of a bare interpreter")
sys.exit(whole - bare > LIMIT)
