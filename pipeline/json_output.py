"""What `--json` prints: dataclasses as JSON that every parser reads; a number that is not finite becomes null."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any


def json_text(value: Any) -> str:
    """A dataclass, or a sequence of them, as indented JSON."""
    return json.dumps(_plain(value), ensure_ascii=False, indent=2, allow_nan=False)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
