"""A recipe: one TOML file, checked once, frozen from then on.

Every key is a field of one of the stages' settings; an unknown key, a wrong type or a value out of bounds is a usage
error that names the key. Overrides are given as "section.key=value", the value written as in TOML.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import UsageError
from stages.corpus.settings import CorpusSettings
from stages.distill.settings import DistillSettings, ObjectiveSettings
from stages.inference.settings import GenerationSettings
from stages.student.shape import StudentShape
from stages.teacher_cache.settings import CacheSettings, RespondSettings, TeacherSettings

RECIPES = Path(__file__).parent / "recipes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything that decides what a run produces."""

    name: str
    corpus: CorpusSettings = field(default_factory=CorpusSettings)
    teacher: TeacherSettings = field(default_factory=TeacherSettings)
    respond: RespondSettings = field(default_factory=RespondSettings)
    cache: CacheSettings = field(default_factory=CacheSettings)
    student: StudentShape = field(default_factory=StudentShape)
    distill: DistillSettings = field(default_factory=DistillSettings)
    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    generation: GenerationSettings = field(default_factory=GenerationSettings)

    def values(self, sections: Iterable[str]) -> dict[str, Any]:
        """Flat "section.key" -> value of some sections, in the order of the file."""
        return {
            f"{section}.{item.name}": getattr(getattr(self, section), item.name)
            for section in sections
            for item in dataclasses.fields(getattr(self, section))
        }

    def fingerprint(self) -> str:
        """sha256 of all values: equal recipes, however they were written, have equal fingerprints."""
        return hashlib.sha256(json.dumps(self.values(SECTIONS), sort_keys=True).encode()).hexdigest()

    def to_toml(self) -> str:
        """The resolved recipe with every default spelled out; `load` reads it back equal."""
        lines = [f"# fingerprint {self.fingerprint()}", f"name = {json.dumps(self.name)}"]
        for section in SECTIONS:
            lines += ["", f"[{section}]"]
            for item in dataclasses.fields(getattr(self, section)):
                lines.append(f"{item.name} = {_toml(getattr(getattr(self, section), item.name))}")
        return "\n".join(lines) + "\n"


_TOML_WHOLE = 2**63
"""Beyond it a whole number is none of TOML's."""
_SECTION_TYPES: dict[str, type] = {
    name: kind for name, kind in typing.get_type_hints(Recipe).items() if kind is not str
}
SECTIONS = tuple(_SECTION_TYPES)


def shipped() -> tuple[str, ...]:
    """Names of the recipes that come with the project."""
    return tuple(sorted(path.stem for path in RECIPES.glob("*.toml")))


def load(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a shipped recipe by name, or any TOML file by path, and apply "section.key=value" overrides.

    Raises UsageError naming the file and key of whatever is wrong.
    """
    path = RECIPES / f"{name_or_path}.toml"
    if not path.is_file():
        path = Path(name_or_path)
    if not path.is_file():
        raise UsageError(
            f"no recipe {name_or_path!r}", hint=f"name one of {', '.join(shipped())}, or give the path of a TOML file"
        )
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: {error}", hint="correct the file; it must be TOML in UTF-8") from error
    name = raw.pop("name", path.stem)
    sections = _build_sections(raw, str(path))
    for override in overrides:
        section, key, value = _parse_override(override)
        raw.setdefault(section, {})[key] = value
    if overrides:  # the file is right by itself: what is wrong now was set
        sections = _build_sections(raw, "--set")
    return Recipe(name=str(name), **sections)


def _parse_override(text: str) -> tuple[str, str, Any]:
    target, equals, value = text.partition("=")
    section, dot, key = target.strip().partition(".")
    if not (equals and dot and key):
        raise UsageError(f"--set {text!r} is not of the form section.key=value", hint="e.g. --set distill.epochs=5")
    _require_sections({section: {}}, f"--set {text!r}")
    try:
        return section, key, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return section, key, value.strip()


def _build_sections(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    _require_sections(raw, where)
    return {section: _build_section(section, values, where) for section, values in raw.items()}


def _require_sections(raw: Mapping[str, Any], where: str) -> None:
    for section, values in raw.items():
        if section not in _SECTION_TYPES:
            raise UsageError(f"{where}: unknown section [{section}]", hint=_suggest(section, SECTIONS))
        if not isinstance(values, Mapping):
            raise UsageError(f"{where}: {section} must be a section", hint=f"write it as [{section}]")


def _build_section(section: str, values: Mapping[str, Any], where: str) -> Any:
    kind = _SECTION_TYPES[section]
    hints = typing.get_type_hints(kind)
    converted: dict[str, Any] = {}
    for key, value in values.items():
        if key not in hints:
            raise UsageError(f"{where}: unknown key {section}.{key}", hint=_suggest(key, hints))
        converted[key] = _convert(value, hints[key], f"{where}: {section}.{key}")
    try:
        return kind(**converted)
    except ValueError as error:
        raise UsageError(f"{where}: {error}", hint=f"correct the value in [{section}]") from error


def _is_unicode(text: str) -> bool:
    """Foreign bytes of the command line are there as halves of characters, which no TOML can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _convert(value: Any, kind: Any, where: str) -> Any:
    """Check a TOML value against a field's type; an int is a float too, and "none" and "auto" stand where they may."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        options = typing.get_args(kind)
        words = [word for option in options if typing.get_origin(option) is Literal for word in typing.get_args(option)]
        if value in words:
            return value
        if value == "none" and type(None) in options:
            return None
        (kind,) = (one for one in options if one is not type(None) and typing.get_origin(one) is not Literal)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise UsageError(f"{where} must be a list, not {value!r}", hint="write it as [a, b, c]")
        return tuple(_convert(item, typing.get_args(kind)[0], where) for item in value)
    if kind is float and type(value) is int and abs(value) < _TOML_WHOLE:
        return float(value)
    if type(value) is float and not math.isfinite(value):
        raise UsageError(f"{where} must be finite, not {value}", hint="write a number")
    if type(value) is str and not _is_unicode(value):
        raise UsageError(f"{where} must be UTF-8 text, not {value!r}", hint="rename the file, or write it in UTF-8")
    if type(value) is not kind:
        raise UsageError(f"{where} must be of type {kind.__name__}, not {value!r}", hint="see README.md, Recipes")
    return value


def _suggest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"


def _toml(value: Any) -> str:
    if value is None:
        return '"none"'
    if isinstance(value, tuple):
        return f"[{', '.join(_toml(item) for item in value)}]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # the one character that TOML refuses
