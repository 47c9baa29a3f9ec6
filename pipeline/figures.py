"""Numbers as people read them: the one place where a rate, a time left or a size becomes text."""

from __future__ import annotations

import math

_BYTES = "bytes"


def number(value: float) -> str:
    """A measured number: three decimals, or none from 100 on; very small ones in powers of ten."""
    if not math.isfinite(value):
        return str(value)
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1e}" if 0 < abs(value) < 5e-4 else f"{value:.3f}"


def rate(value: float) -> str:
    """Of something a second."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2f}"


def pace(value: float, unit: str, *, named: bool = True) -> str:
    """So many of a unit a second, which is `named` unless that stands beside it; bytes as a size."""
    if unit == _BYTES:
        return f"{size(value)}/s"
    return f"{rate(value)} {unit}/s" if named else f"{rate(value)}/s"


def share(done: float, total: float, unit: str) -> str:
    """So many of all of a unit; bytes as sizes."""
    return f"{size(done)} of {size(total)}" if unit == _BYTES else f"{done:,.0f}/{total:,.0f} {unit}"


def clock(seconds: float) -> str:
    """m:ss, or h:mm:ss from an hour on."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def age(seconds: float) -> str:
    """How long ago, in its largest unit."""
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def size(count: float) -> str:
    """Bytes in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
