"""Responses written anew for the prompts of a corpus, as a corpus of their own.

- The teacher's replace the corpus's own, in both splits: sequence-level distillation (Kim and Rush, 1606.07947).
- A student's join the corpus's own in the train split, so that the teacher also scores what the student would write
  (on-policy distillation, 2306.13649, here in offline rounds); the validation split stays what it is.
- Written part by part; stopped and started again, it goes on with the parts that are not there, or not whole. What is
  drawn depends on the seed and the part alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from shards.durable import file_sha256, publish
from stages.corpus.publish import exclusive
from stages.corpus.sample import Sample
from stages.corpus.store import Corpus, Samples, commit_corpus, read_commit, read_corpus, write_samples, write_split
from stages.errors import StageError
from stages.events import Emit, Note, Progress
from stages.teacher_cache.draws import draw_key
from stages.teacher_cache.plan import Unit, plan_units
from stages.teacher_cache.settings import RespondSettings

STAGE = "respond"
_PROMPTS_PER_PART = 64


class Author(Protocol):
    """Whoever writes."""

    def write(self, prompts: Sequence[Sequence[int]], seed: int) -> list[list[int]]:
        """A response to each prompt, closed by the end token unless the length limit cut it; prompt i is answered with
        seed + i."""

    def close(self) -> None:
        """Give the memory back."""


def respond(
    *, corpus: Corpus, settings: RespondSettings, identity: str, author: Callable[[], Author], out: Path, emit: Emit
) -> Corpus:
    """Make `out` the corpus with the responses of `author`, which `identity` tells from any other, and open it.

    The author is made only where something is left to write. Raises StageError where `out` holds another's responses.
    """
    inputs = {"corpus": corpus.fingerprint, "author": identity, "settings": dataclasses.asdict(settings)}
    facts = read_commit(out)
    if facts is not None:
        if facts["inputs"] != inputs:
            raise StageError(
                f"{out} holds responses to another corpus, by another author or with other settings",
                hint="give the new ones a run of their own with NAME=… (--name …)",
            )
        return read_corpus(out)
    with exclusive(out, waiting=lambda: emit(Note(stage=STAGE, text=f"another process writes {out}"))) as staging:
        job = _Job(corpus=corpus, settings=settings, author=author, folder=out / _parts_folder(inputs), emit=emit)
        written = {split: write_split(staging, split, samples) for split, samples in job.run().items()}
        report = {**corpus.report, **{split: part.rows for split, part in written.items()}}
        commit_corpus(staging, out, written, rendering=corpus, inputs=inputs, report=report)
        shutil.rmtree(job.folder)
    return read_corpus(out)


def _parts_folder(inputs: Mapping[str, object]) -> str:
    """Parts of one author and setting never mix with those of another."""
    return f"parts-{hashlib.sha256(repr(sorted(inputs.items())).encode()).hexdigest()[:16]}"


@dataclass(slots=True, kw_only=True)
class _Job:
    corpus: Corpus
    settings: RespondSettings
    author: Callable[[], Author]
    folder: Path
    emit: Emit

    def run(self) -> dict[str, Iterator[Sample]]:
        """Write what is missing; give out the samples of each split."""
        prompts = {"train": self.corpus.train} if self.settings.student else self.corpus.splits
        units = plan_units(prompts, _PROMPTS_PER_PART)
        self.folder.mkdir(parents=True, exist_ok=True)
        missing = [unit for unit in units if not self._is_whole(unit)]
        if missing:
            self.emit(Note(stage=STAGE, text=f"{len(missing)} of {len(units)} parts of responses to write"))
            author = self.author()
            try:
                for done, unit in enumerate(missing, start=len(units) - len(missing)):
                    self.emit(Progress(stage=STAGE, done=done, total=len(units), unit="parts"))
                    self._write(unit, unit.of(prompts[unit.split]), author)
            finally:
                author.close()
            self.emit(Progress(stage=STAGE, done=len(units), total=len(units), unit="parts"))
        return {split: self._collected(split, units) for split in self.corpus.splits}

    def _write(self, unit: Unit, samples: Sequence[Sample], author: Author) -> None:
        prompts = [sample.prompt_ids.tolist() for sample in samples for _ in range(self.settings.per_prompt)]
        responses = author.write(prompts, draw_key(self.settings.seed, unit.name) % 2**31)
        written = [
            Sample(
                sample_id=_sample_id(prompt, response),
                prompt_ids=np.array(prompt, np.int32),
                response_ids=np.array(response, np.int32),
            )
            for prompt, response in zip(prompts, responses, strict=True)
            if response
        ]
        temporary = self.folder / f".{unit.name}"
        write_samples(temporary, written)
        data = temporary.read_bytes()
        temporary.unlink()
        for path, content in ((self._sum(unit), hashlib.sha256(data).hexdigest().encode()), (self._path(unit), data)):
            path.unlink(missing_ok=True)  # of a part that is not whole
            publish(self.folder, path.name, content)

    def _collected(self, split: str, units: Sequence[Unit]) -> Iterator[Sample]:
        """Each sample once, though an author may write the same twice."""
        seen: set[str] = set()
        if self.settings.student:
            for sample in self.corpus.splits[split]:
                seen.add(sample.sample_id)
                yield sample
        for unit in units:
            for sample in Samples(self._path(unit)) if unit.split == split else ():
                if sample.sample_id not in seen:
                    seen.add(sample.sample_id)
                    yield sample

    def _is_whole(self, unit: Unit) -> bool:
        path, stated = self._path(unit), self._sum(unit)
        return path.exists() and stated.exists() and stated.read_bytes() == file_sha256(path).encode()

    def _path(self, unit: Unit) -> Path:
        return self.folder / f"{unit.name}.arrow"

    def _sum(self, unit: Unit) -> Path:
        """Where the sha256 of a part stands; published before it."""
        return self.folder / f"{unit.name}.sha256"


def _sample_id(prompt: Sequence[int], response: Sequence[int]) -> str:
    """16 hex digits that depend on the tokens alone."""
    content = struct.pack(f"<Q{len(prompt) + len(response)}i", len(prompt), *prompt, *response)
    return hashlib.sha256(content).hexdigest()[:16]
