"""A finished student measured: the standing report of its run, and the same measures on other text.

The standing report compares it with its teacher on the validation split and on as many records of the training split,
and has it answer prompts. Other text is either split of any set of the same tokenizer, or rows that nobody cached.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.assets import teacher_folder
from pipeline.card import write_card
from pipeline.errors import PipelineError
from pipeline.matching import known_split, require_same_tokens, require_trained_on
from pipeline.measured import model_sha256, summary_of_this_model
from pipeline.report import write_report
from pipeline.run import ELSEWHERE, RunFolder
from pipeline.sinks import listening
from pipeline.steps import shards_of, silence_loading_bars
from pipeline.word_problems import SOURCE, final_answer
from stages.events import Emit, Note

if TYPE_CHECKING:
    from shards.contract import Contract
    from stages.distill.evaluate import EvaluationReport
    from stages.distill.own_text import TextReport
    from stages.distill.passages import Text


def evaluate(run: RunFolder, *, shards: str | None, teacher: bool = False) -> Mapping[str, Any]:
    """The standing report: the student against the teacher's cached distributions, and its answers to prompts.

    With `teacher`, the teacher is loaded too, for the KL over the whole vocabulary. Nothing is computed again for the
    same model, shards and generation settings. Raises UsageError for a set that it was not trained on, or without a
    validation split.
    """
    from shards.reader import ShardSet
    from stages.distill.evaluate import evaluate_model
    from stages.distill.identity import shards_sha256
    from stages.distill.losses.table import what_kl_is

    silence_loading_bars()
    with run.lock("evaluate"), listening(run.events) as emit:
        shard_set = ShardSet(shards_of(run, shards))
        require_same_tokens(run, shard_set)
        require_trained_on(run, shard_set)
        _, dev_name = known_split(shard_set, "validation")
        made_from = {
            "model_sha256": model_sha256(run),
            "shards_sha256": shards_sha256(shard_set),
            "generation": dataclasses.asdict(run.recipe().generation),
            "report": 4,  # what is measured; older reports lack some of it
        }
        standing = run.summary().get("evaluate", {})
        whole = standing.get("whole") if standing.get("made_from") == made_from else None
        if standing.get("made_from") == made_from and (whole or not teacher):
            emit(Note(stage="evaluate", text="the report of this model is up to date"))
            return dict(standing)
        dev = shard_set.split(dev_name)
        report, rate = _timed(lambda: evaluate_model(run.final_model, shard_set, split=dev_name, emit=emit))
        seen = evaluate_model(run.final_model, shard_set, split="train", records=len(dev), emit=emit)
        facts = {
            "validation": report,
            "kl_is": what_kl_is(shard_set.contract.selection),
            "whole": _beside_teacher(run, dev, shard_set.contract, emit) if teacher else whole,
            "training": dataclasses.asdict(seen),
            "positions_per_s": rate,
            **_answered(run, dev, checkable=run.recipe().corpus.source == SOURCE),
            "made_from": made_from,
        }
        run.report("evaluate", facts)
        write_card(run)
        write_report(run)
    return facts


def evaluate_split(run: RunFolder, *, shards: str | None, split: str, teacher: bool = False) -> Mapping[str, Any]:
    """One split of a set of the student's tokenizer, whichever it was trained on.

    Raises UsageError for no such split, PipelineError for other tokens or, with `teacher`, another teacher.
    """
    from shards.reader import ShardSet
    from stages.distill.evaluate import evaluate_model
    from stages.distill.losses.table import what_kl_is

    silence_loading_bars()
    with run.lock("evaluate"), listening(run.events) as emit:
        shard_set = ShardSet(shards_of(run, shards))
        require_same_tokens(run, shard_set)
        split, name = known_split(shard_set, split)
        records = shard_set.split(name)
        report, rate = _timed(lambda: evaluate_model(run.final_model, shard_set, split=name, emit=emit))
        facts = {
            **report,
            "kl_is": what_kl_is(shard_set.contract.selection),
            "whole": _beside_teacher(run, records, shard_set.contract, emit) if teacher else None,
            "positions_per_s": rate,
            **_answered(run, records, checkable=run.recipe().corpus.source == SOURCE),
        }
        return _told(run, f"{split} split of {shard_set.where}", facts)


def evaluate_rows(run: RunFolder, source: Path, *, teacher: bool = False) -> Mapping[str, Any]:
    """Rows of a JSONL that no teacher has read: against their own tokens and, with `teacher`, the recipe's teacher.

    An answer is exact where its last line is the row's. Raises StageError for a file without a usable row.
    """
    import stages.student.model  # noqa: F401  Known to transformers before it meets a student's folder.
    from stages.corpus.chat import read_thinking
    from stages.corpus.unseen import read_unseen
    from stages.distill.own_text import evaluate_text
    from stages.distill.passages import Passage

    silence_loading_bars()
    with run.lock("evaluate"), listening(run.events) as emit:
        samples = read_unseen(
            source,
            tokenizer_folder=run.final_model,
            settings=dataclasses.replace(run.recipe().corpus, thinking=read_thinking(run.final_model)),
            rejects=run.path / "evaluate-rejects.jsonl",
            emit=emit,
        )
        passages = [Passage(prompt_ids_P=sample.prompt_ids, response_ids_R=sample.response_ids) for sample in samples]
        report, rate = _timed(lambda: evaluate_text(run.final_model, passages, emit=emit))
        facts = {
            **report,
            "whole": _beside_teacher(run, passages, None, emit) if teacher else None,
            "positions_per_s": rate,
            **_answered(run, passages, checkable=True),
        }
        return _told(run, f"rows of {source}", facts)


def _told(run: RunFolder, where: str, facts: Mapping[str, Any]) -> Mapping[str, Any]:
    """Keep the last measures of this student on each text, for card and report."""
    of_this_model = {**facts, "made_from": {"model_sha256": model_sha256(run)}}
    run.report(ELSEWHERE, {**summary_of_this_model(run)[ELSEWHERE], where: of_this_model})
    write_card(run)
    write_report(run)
    return {"where": where, **facts}


def _timed(measure: Callable[[], EvaluationReport | TextReport]) -> tuple[dict[str, Any], float]:
    """A report, and the positions a second that it took."""
    start = time.monotonic()
    report = measure()
    return dataclasses.asdict(report), round(report.positions / (time.monotonic() - start), 1)


def _beside_teacher(run: RunFolder, texts: Sequence[Text], contract: Contract | None, emit: Emit) -> dict[str, Any]:
    """Raises PipelineError where the recipe's teacher is not the one of `contract`, or of another tokenizer."""
    from stages.corpus.fingerprint import tokenizer_fingerprint
    from stages.distill.whole_kl import whole_kl
    from stages.teacher_cache.teacher import weights_fingerprint

    settings = run.recipe().teacher
    folder = teacher_folder(settings.model, settings.revision, emit)
    hint = "leave --teacher out, or evaluate a run whose recipe names that teacher"
    if contract is not None and weights_fingerprint(folder) != contract.teacher_fingerprint:
        raise PipelineError(f"{settings.model} is not the teacher of these shards ({contract.teacher})", hint=hint)
    if tokenizer_fingerprint(folder) != tokenizer_fingerprint(run.final_model):
        raise PipelineError(f"{settings.model} has another tokenizer than {run.final_model}", hint=hint)
    return dataclasses.asdict(whole_kl(run.final_model, folder, texts, emit=emit))


def _answered(run: RunFolder, texts: Sequence[Text], *, checkable: bool) -> dict[str, Any]:
    """The student's answers to the first prompts: how fast, how many are exact, and some of them."""
    from stages.inference.generate import Student

    settings = run.recipe().generation
    student = Student.load(run.final_model)
    count = max(settings.prompts, settings.checked) if checkable else settings.prompts
    asked = [texts[index] for index in range(min(count, len(texts)))]
    start = time.monotonic()
    answers = student.generate_from_ids([text.prompt_ids_P.tolist() for text in asked], **settings.sampling())
    seconds = time.monotonic() - start
    samples = [
        {
            "prompt": student.decode(text.prompt_ids_P.tolist()),
            "answer": answer.text,
            "label": student.decode(text.response_ids_R.tolist()),
        }
        for text, answer in zip(asked, answers, strict=True)
    ]
    return {
        "generated_tokens_per_s": round(sum(len(answer.token_ids) for answer in answers) / seconds, 1),
        "exact_match": _exact_match(samples) if checkable and samples else None,
        "samples": samples[: settings.prompts],
    }


def _exact_match(answers: Sequence[Mapping[str, str]]) -> dict[str, float]:
    """Share of answers whose last line is the label's, with its 95 % interval."""
    hits = sum(final_answer(answer["answer"]) == final_answer(answer["label"]) for answer in answers)
    low, high = wilson_interval(hits, len(answers))
    return {"share": hits / len(answers), "low": low, "high": high, "answers": len(answers)}


def wilson_interval(hits: int, count: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson, 1927), which holds for few answers and for none or all right."""
    z, share = 1.959964, hits / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)
