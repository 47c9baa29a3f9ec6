"""Where a shard set lies, as the command line names it: a word becomes a folder, a file or a URL of a known kind."""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import PipelineError, UsageError
from shards.remote import SCHEMES

_STORES = " or ".join(f"{scheme}://" for scheme in SCHEMES)
_SET = f"the folder of a shard set, or its {_STORES} URL"


def set_or_shard(text: str) -> Path | str:
    """A set, or one shard of it. Raises PipelineError where a path leads nowhere, UsageError for another URL."""
    return _standing(text, f"give a .arrow file, {_SET}")


def standing_set(text: str) -> Path | str:
    """A set that is there. Raises as `set_or_shard`, and UsageError for a file."""
    place = _standing(text, f"give {_SET}")
    if isinstance(place, Path) and not place.is_dir():
        raise UsageError(f"{text} is a file, not a shard set", hint=f"give {_SET}")
    return place


def new_set(text: str) -> Path | str:
    """Where a set is made, or gone on with. Raises UsageError for a file and for another URL."""
    hint = f"give a folder, or an {_STORES} URL"
    place = _place(text, hint)
    if isinstance(place, Path) and place.exists() and not place.is_dir():
        raise UsageError(f"nothing can be made at {text}: it is a file", hint=hint)
    return place


def new_folder(text: str) -> Path:
    """Where files are written that are no set. Raises as `new_set`, and UsageError for any URL."""
    place = new_set(text)
    if isinstance(place, str):
        raise UsageError(f"{text} is no folder", hint="write to a folder, then copy it there")
    return place


def local_set(text: str) -> Path:
    """A set in a folder. Raises as `standing_set`, and UsageError for any URL."""
    place = standing_set(text)
    if isinstance(place, str):
        raise UsageError(f"{text} is no folder", hint="only a set in a folder works here: copy-shards makes one of it")
    return place


def _standing(text: str, hint: str) -> Path | str:
    place = _place(text, hint)
    if isinstance(place, Path) and not place.exists():
        raise PipelineError(f"no shards at {text}", hint=hint)
    return place


def _place(text: str, hint: str) -> Path | str:
    scheme, url, _ = text.partition("://")
    if url and scheme not in SCHEMES:
        raise UsageError(f"no shard set can lie at {text}", hint=hint)
    return text if url else Path(text)
