"""The student in use.

from stages.inference import Student
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stages.corpus.rows import Message
    from stages.inference.answer import Piece, TokenLogprob
    from stages.inference.generate import Generation, Student

__all__ = ["Generation", "Message", "Piece", "Student", "TokenLogprob"]

_HOMES = {
    "Message": "stages.corpus.rows",
    "Piece": "stages.inference.answer",
    "TokenLogprob": "stages.inference.answer",
    "Generation": "stages.inference.generate",
    "Student": "stages.inference.generate",
}


def __getattr__(name: str) -> Any:
    """Import torch when the first name is used, not when a settings class of this package is."""
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
