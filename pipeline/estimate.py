"""What a planned teacher cache will take: bytes, hours and money, from a small one, before anything is spent."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline import figures
from pipeline.json_output import json_text
from pipeline.locations import standing_set
from pipeline.run import RunFolder
from shards.estimate import estimate_size


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Of a planned cache."""

    positions: int
    bytes: float
    bytes_margin: float
    bytes_per_position: float
    sampled_records: int
    positions_per_second: float | None
    """Of one machine like that of the sample; None where nobody measured it."""
    machines: int
    hours: float | None
    cost: float | None


def estimate(
    place: str, positions: int, *, rate: float | None, machines: int, price: float | None, as_json: bool
) -> list[str]:
    """Extrapolate a set to `positions` response tokens on so many machines of `price` an hour each.

    `rate` is in response tokens a second; by default that of the run in which the set was made, its start included.
    Raises InvalidRequest where the set is too small.
    """
    where = standing_set(place)
    size = estimate_size(where, positions)
    measured = rate is None
    rate = _measured_rate(where) if rate is None else rate
    hours = None if rate is None else positions / (rate * machines) / 3600
    found = Estimate(
        positions=positions,
        bytes=size.bytes,
        bytes_margin=size.margin,
        bytes_per_position=size.bytes_per_position,
        sampled_records=size.sampled,
        positions_per_second=rate,
        machines=machines,
        hours=hours,
        cost=None if hours is None or price is None else hours * machines * price,
    )
    return [json_text(found)] if as_json else _lines(found, measured=measured)


def _measured_rate(where: Path | str) -> float | None:
    """From summary.json of the run that a set lies in, if that tells of this set."""
    if isinstance(where, str):
        return None
    try:
        facts = RunFolder(where.parent).summary()["teacher_cache"]
        if Path(facts["where"]).resolve() != where.resolve():
            return None
        return float(facts["captured"]) / float(facts["seconds"]) or None
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
        return None


def _lines(found: Estimate, *, measured: bool) -> list[str]:
    low, high = found.bytes - found.bytes_margin, found.bytes + found.bytes_margin
    sizes = f"{figures.size(found.bytes)} (95 %: {figures.size(low)} to {figures.size(high)})"
    lines = [
        f"planned    {found.positions:,} response tokens, told from {found.sampled_records:,} records",
        f"bytes      {sizes}, {found.bytes_per_position:.1f} a position",
    ]
    if found.hours is None:
        return [*lines, "hours      not known: give --rate in response tokens a second"]
    rate = f"{figures.rate(found.positions_per_second or 0)} tokens/s each"
    counted = ", loading the teacher included" if measured else ""
    lines.append(f"hours      {figures.number(found.hours)} on {found.machines} machines at {rate}{counted}")
    return lines if found.cost is None else [*lines, f"cost       {figures.number(found.cost)}"]
