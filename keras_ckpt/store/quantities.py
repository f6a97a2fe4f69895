"""Sizes and times as people write them, such as `"50 GB"` and `"2 days"`."""

from __future__ import annotations

import datetime
import math
import numbers
import re
from collections.abc import Mapping

_SIZES = {"": 1, "B": 1, "bytes": 1}
_SIZES |= {f"{prefix}B": 1000**power for power, prefix in enumerate("kMGTP", 1)}
_SIZES |= {f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGTP", 1)}
_TIMES = {"s": 1, "min": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_TIMES |= {"seconds": 1, "minutes": 60, "hours": 3600, "days": 86400, "weeks": 7 * 86400}
_TIMES |= {"second": 1, "minute": 60, "hour": 3600, "day": 86400, "week": 7 * 86400}


def as_bytes(value: object, name: str) -> int:
    """A number of bytes, from a number or from a text such as `"50 GB"`.

    Args:
        value: The number or the text.
        name: The name of the argument, for an error.

    Raises:
        TypeError, ValueError: The value is no size.
    """
    expected = f"{name} expected a size above 0, such as '50 GB' or 50_000_000_000. Received: {value!r}"
    if isinstance(value, str):
        count = _in_units(value, _SIZES)
    elif isinstance(value, numbers.Real) and not isinstance(value, bool):
        count = float(value)
    else:
        raise TypeError(expected)
    if count is None or not (math.isfinite(count) and count >= 1):
        raise ValueError(f"{expected}. The units are kB, MB, GB, TB, PB, and KiB, MiB, GiB, TiB, PiB.")
    return int(count)


def as_seconds(value: object, name: str) -> float:
    """A number of seconds, from a `timedelta` or from a text such as `"2 days"`. Arguments and errors as above."""
    expected = f"{name} expected a time above 0, such as '2 days' or datetime.timedelta(days=2). Received: {value!r}"
    if isinstance(value, str):
        seconds = _in_units(value, _TIMES)
    elif isinstance(value, datetime.timedelta):
        seconds = value.total_seconds()
    else:
        raise TypeError(expected)
    if seconds is None or not (math.isfinite(seconds) and seconds > 0):
        raise ValueError(f"{expected}. The units are seconds, minutes, hours, days, weeks, and s, min, h, d, w.")
    return seconds


def _in_units(text: str, units: Mapping[str, int]) -> float | None:
    """The value of a number with a unit, `None` for any other text. Capitals have no meaning."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?)\s*([a-z]*)\s*", text, re.ASCII | re.IGNORECASE)
    factors = {unit.lower(): factor for unit, factor in units.items()}
    if match is None or (factor := factors.get(match[2].lower())) is None:
        return None
    return float(match[1]) * factor
