"""Small documents of a shard set: canonical JSON with a seal over itself, so that a flipped bit anywhere is found."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from shards.errors import Corrupt, Incomplete, Truncated
from shards.storage import RESTORE_FILE, Storage

MAX_DOCUMENT_BYTES = 1 << 28
_END = b"\n}\n"


def sealed(document: Mapping[str, Any]) -> bytes:
    """Canonical JSON with one more member, the sha256 of that JSON without it."""
    digest = hashlib.sha256(canonical(document)).hexdigest()
    return canonical({**document, "seal": digest})


def canonical(document: Mapping[str, Any]) -> bytes:
    """Equal documents have equal bytes."""
    return json.dumps(document, sort_keys=True, indent=1, ensure_ascii=True, allow_nan=False).encode() + b"\n"


def read_sealed(storage: Storage, name: str, *, hint: str) -> dict[str, Any]:
    """The document without its seal. Raises Incomplete with `hint` where there is none, Truncated, Corrupt."""
    where = storage.where(name)
    try:
        content = storage.read(name, most=MAX_DOCUMENT_BYTES)
    except Incomplete as error:
        raise Incomplete(str(error), hint=hint) from error
    except ValueError as error:
        raise Corrupt(str(error), hint=RESTORE_FILE) from error
    if not content.endswith(_END):
        raise Truncated(f"{where} ends after {len(content)} bytes, within its contents", hint=RESTORE_FILE)
    try:
        document: dict[str, Any] = json.loads(content)
        document.pop("seal")
        intact = sealed(document) == content
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        intact = False
    if not intact:
        raise Corrupt(f"{where} differs from its seal", hint=RESTORE_FILE)
    return document
