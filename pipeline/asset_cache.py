"""Assets that were fetched or made once a machine, outside the repository, checked at every use.

    <cache>/<kind>/<name>-<sha256>/asset/{files/…, stock.json}

An entry appears by one rename, so a killed fetch is never taken for whole. `stock.json` holds the sha256 of each file;
an entry that differs from it is removed with a note and made again. One process works on an entry at a time.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import PipelineError
from shards.durable import file_sha256, sync
from stages.corpus.publish import exclusive
from stages.events import Emit, Note


@contextmanager
def kept(home: Path, emit: Emit) -> Iterator[tuple[Path | None, Path]]:
    """Hold a cache entry alone and yield its whole, checked files, if it has them, and an empty staging folder."""

    def waiting() -> None:
        emit(Note(stage="fetch", text=f"another process fetches {home.name}: waiting for it"))

    try:
        with exclusive(home, waiting=waiting) as staging:
            entry = home / "asset"
            damage = _damage(entry)
            if damage:
                emit(Note(stage="fetch", text=f"{entry}: {damage}; fetching it again", level="warning"))
                shutil.rmtree(entry)
            yield (entry / "files" if entry.is_dir() else None), staging
    except OSError as error:
        raise PipelineError(
            f"cannot fetch {home.name} into {home.parent}: {error}",
            hint="make room or fix the permissions, or set MINICODFORMER_CACHE to another folder",
        ) from error


def publish(made: Path, home: Path) -> Path:
    """Take stock of made/files and rename the whole to its final name, durably."""
    stock = {path.name: file_sha256(path) for path in sorted((made / "files").iterdir())}
    (made / "stock.json").write_text(json.dumps(stock, indent=2) + "\n", encoding="utf-8")
    for path in (*(made / "files").iterdir(), made / "stock.json", made / "files", made):
        sync(path)
    made.rename(home / "asset")
    sync(home)
    return home / "asset" / "files"


def _damage(entry: Path) -> str | None:
    """How a published entry differs from its stock, in words; None where it does not, or is not there."""
    if not entry.is_dir():
        return None
    try:
        stock = json.loads((entry / "stock.json").read_text(encoding="utf-8"))
        for name, expected in stock.items():
            found = file_sha256(entry / "files" / name)
            if found != expected:
                return f"{name} has sha256 {found}, it was stored with {expected}"
    except (OSError, ValueError, AttributeError) as error:
        return f"cannot be checked ({error})"
    return None
