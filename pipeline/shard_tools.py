"""What the command line makes out of shard sets, without the teacher: an export, a merged set, …"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pipeline import figures
from pipeline.errors import UsageError, as_usage
from pipeline.locations import new_folder, new_set, standing_set
from pipeline.sinks import listening
from shards.contract import Selection
from shards.export import FORMATS, export_parquet
from shards.manifest import Manifest
from shards.merge import copy_set, leaked_prompts, merge_sets
from shards.reselect import reselect_set
from stages.events import Progress


def export(place: str, target: str, *, kind: str) -> list[str]:
    """Decode a set into files of another format. Raises UsageError for a format that is none, InvalidRequest for a
    foreign target."""
    if kind not in FORMATS:
        raise UsageError(f"no format {kind!r}", hint=f"there is --to {', '.join(FORMATS)}")
    source, folder = standing_set(place), new_folder(target)
    with _told("export-shards") as progress:
        report = export_parquet(source, folder, progress=progress)
    kept = report.files - report.written
    there = f", {kept} of them there before" if kept else ""
    return [
        f"export     {report.files} files{there}, {report.records:,} records, {figures.size(report.bytes)}  {target}"
    ]


def merge(places: Sequence[str], target: str) -> list[str]:
    """Make one set of several. Raises InvalidRequest where a sample is in two of them."""
    sources = [standing_set(place) for place in places]
    with _told("merge") as progress:
        manifest = merge_sets(sources, new_set(target), progress=progress)
    leaked = leaked_prompts(sources)
    told = f"warning    prompts that validate in one of these sets and are trained on in another: {leaked:,}"
    return [_made("merged", manifest, target), *([told] if leaked else [])]


def copy(place: str, target: str) -> list[str]:
    """Make the same set in another place."""
    source = standing_set(place)
    with _told("copy-shards") as progress:
        manifest = copy_set(source, new_set(target), progress=progress)
    return [_made("copied", manifest, target)]


def reselect(place: str, target: str, *, k: int, mass: float | None, floor: float | None) -> list[str]:
    """Make a set that keeps fewer ids. Raises UsageError for no selection, InvalidRequest for one that the source does
    not hold."""
    source = standing_set(place)
    with as_usage("give a --k, a --mass and a --floor within these bounds"):
        kind = "topk" if mass is None and floor is None else "adaptive"
        selection = Selection(kind=kind, k=k, mass=1.0 if mass is None else mass, floor=floor or 0.0)
    with _told("reselect") as progress:
        manifest = reselect_set(source, new_set(target), selection, progress=progress)
    return [_made("reselected", manifest, target)]


def import_cache(dump: Path, target: str, *, teacher: str, k: int, thinking: bool) -> list[str]:
    """Make a set of what vLLM or DistillKit wrote. Raises UsageError where there is no dump."""
    from pipeline.assets import teacher_folder
    from stages.teacher_cache.dumps import import_dump
    from stages.teacher_cache.settings import CacheSettings

    if not dump.exists():
        raise UsageError(f"no dump {dump}", hint="name a file with one JSON object a line, or DistillKit's folder")
    made = new_set(target)
    with listening() as emit:
        folder = teacher_folder(teacher, None, emit)

        def told(done: int, total: int) -> None:
            emit(Progress(stage="import-cache", done=done, total=total, unit="bytes"))

        manifest = import_dump(
            dump,
            made,
            teacher=teacher,
            teacher_folder=folder,
            k=k,
            pca_width=CacheSettings().pca_width,
            thinking=thinking,
            progress=told,
        )
    return [
        _made("imported", manifest, target),
        "           the tail is not known: losses that need it refuse this set",
    ]


def _made(word: str, manifest: Manifest, target: str) -> str:
    totals = manifest.totals()
    counts = ", ".join(f"{totals[name]:,} {name}" for name in ("shards", "records", "positions"))
    each = totals["bytes"] / totals["positions"]
    return f"{word:<10} {counts}, {figures.size(totals['bytes'])}: {each:.1f} bytes a position in all  {target}"


@contextmanager
def _told(verb: str) -> Iterator[Callable[[int, int], None]]:
    """Progress in records."""
    with listening() as emit:
        yield lambda done, total: emit(Progress(stage=verb, done=done, total=total, unit="records"))
