"""What is found before work begins, of a plan or of a machine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """A fact; where it is not ok it says what to do."""

    name: str
    ok: bool
    fact: str
