"""The model card of a run: README.md in its final model, from the facts of the run and from nothing else.

A number that the run does not hold is said to be absent. Nothing is claimed about licences, languages or uses.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.measured import summary_of_this_model
from pipeline.run import ELSEWHERE, RunFolder, write_atomically
from stages.corpus.chat import read_thinking

CARD = "README.md"
ABSENT = "not known"
_FRONT_MATTER = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- minicodformer
- knowledge-distillation
---"""

_ELSEWHERE = """\
Where MiniCodformer is not, torch and transformers are enough; `trust_remote_code` runs the modelling files of this
folder. Assisted decoding is refused: a recurrent state cannot be taken back to an earlier token.

```python
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

folder = "path/of/this/folder"
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForSeq2SeqLM.from_pretrained(folder, trust_remote_code=True)
messages = [{"role": "user", "content": "How many eggs are in three dozen?"}]
prompt = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, enable_thinking=THINKING, return_dict=True, return_tensors="pt"
)
print(tokenizer.decode(model.generate(prompt["input_ids"], max_new_tokens=128)[0], skip_special_tokens=True))
```"""


def write_card(run: RunFolder) -> Path:
    """Write the card into the run's final model and return its path. Raises PipelineError where there is no model."""
    path = run.final_model / CARD
    write_atomically(path, model_card(run))
    return path


def model_card(run: RunFolder) -> str:
    """The card's text. Raises PipelineError where the run has no final model."""
    run.require_model()
    training = _json(run.final_model / "training.json")
    config = _json(run.final_model / "config.json")
    summary = summary_of_this_model(run)
    parts = [
        _FRONT_MATTER.splitlines(),
        [f"# {run.path.name}"],
        [
            "A student of offline knowledge distillation: an encoder over the prompt and a liquid (LTC-NCP) decoder",
            "whose state has a fixed size, trained from cached distributions of its teacher.",
        ],
        ["## Use", "", *_use(run.final_model)],
        ["## Model", "", *table(_model(config, run.final_model))],
        ["## Teacher and data", "", *table(_teacher(training))],
        ["## Training", "", *table(_training(training, summary))],
        ["## Evaluation", "", *_evaluation(summary, training)],
        ["## Answers", "", *_answers(summary)],
        ["## Limits", "", *_limits(summary)],
        [
            "## Licence",
            "",
            f"{ABSENT[0].upper()}{ABSENT[1:]}: no file of the run says it. Those of teacher and data apply.",
        ],
    ]
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def table(facts: Mapping[str, Any]) -> Iterator[str]:
    """Facts as a table of two columns; None is said to be absent."""
    yield "| | |"
    yield "|---|---|"
    for name, value in facts.items():
        yield f"| {name} | {_cell(value)} |"


def _cell(value: Any) -> str:
    if value is None or value == "":
        return ABSENT
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def _use(folder: Path) -> list[str]:
    lines = [
        "from stages.inference import Student  # of MiniCodformer",
        "",
        'student = Student.load("path/of/this/folder")',
        'print(student.generate("How many eggs are in three dozen?")[0].text)',
    ]
    return ["```python", *lines, "```", *_use_elsewhere(folder)]


def _use_elsewhere(folder: Path) -> Iterator[str]:
    """For a model that brings its code, and a tokenizer whose template writes the prompts of its training."""
    template = (folder / "chat_template.jinja").is_file() or "chat_template" in _json(folder / "tokenizer_config.json")
    if template and "auto_map" in _json(folder / "config.json"):
        yield from ("", *_ELSEWHERE.replace("THINKING", str(read_thinking(folder))).splitlines())


def _model(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    return {
        "architecture": ", ".join(config.get("architectures") or []) or None,
        "parameters": _parameters(folder),
        "vocabulary": config.get("vocab_size"),
        "width": config.get("hidden_size"),
        "encoder and decoder layers": _pair(config.get("num_encoder_layers"), config.get("num_hidden_layers")),
        "heads": config.get("num_attention_heads"),
        "feed-forward width": config.get("intermediate_size"),
        "weights": config.get("dtype"),
    }


def _pair(first: int | None, second: int | None) -> str | None:
    return None if first is None or second is None else f"{first} and {second}"


def _parameters(folder: Path) -> int | None:
    """Of the model that the folder's config describes, a tied weight once, without the buffers that are stored too."""
    import torch

    from stages.student.config import MiniCodformerConfig
    from stages.student.model import MiniCodformerForConditionalGeneration

    if not (folder / "config.json").is_file():
        return None
    with torch.device("meta"):
        model = MiniCodformerForConditionalGeneration(MiniCodformerConfig.from_pretrained(folder))
    return sum(int(parameter.numel()) for parameter in model.parameters())


def _teacher(training: Mapping[str, Any]) -> dict[str, Any]:
    identity, cached = training.get("identity", {}), training.get("result", {}).get("cached", {})
    fingerprint = identity.get("contract.teacher_fingerprint")
    corpus = identity.get("contract.corpus_fingerprint")
    return {
        "teacher": identity.get("contract.teacher"),
        "teacher's fingerprint (sha256)": fingerprint and fingerprint[:16],
        "engine": identity.get("contract.engine"),
        "precision of body and head": identity.get("contract.dtype"),
        "kept of a distribution": _selection(identity),
        "corpus fingerprint (sha256)": corpus and corpus[:16],
        "records cached": cached.get("records"),
        "positions cached": cached.get("positions"),
    }


def _selection(identity: Mapping[str, Any]) -> str | None:
    """As the contract says it, in either of its forms."""
    selection = identity.get("contract.selection")
    if isinstance(selection, Mapping):
        settings = {name: value for name, value in selection.items() if name != "kind"}
        return f"{selection.get('kind')} ({', '.join(f'{name} {value}' for name, value in settings.items())})"
    k = identity.get("contract.k")
    return selection and (f"{selection}, k {k}" if k else str(selection))


def _training(training: Mapping[str, Any], summary: Mapping[str, Any]) -> dict[str, Any]:
    result = training.get("result") or summary.get("distill", {})
    identity = training.get("identity", {})
    settings = {name: value for name, value in identity.items() if name.startswith(("distill.", "objective."))}
    return {
        "steps": result.get("steps"),
        "positions trained on": result.get("positions"),
        "seconds in steps": result.get("seconds"),
        "ranks": result.get("ranks"),
        "precision": result.get("precision"),
        **{f"`{name}`": value for name, value in settings.items()},
    }


def _evaluation(summary: Mapping[str, Any], training: Mapping[str, Any]) -> list[str]:
    result, evaluated = training.get("result", {}), summary.get("evaluate", {})
    before = result.get("untrained") or {}
    after = evaluated.get("validation") or result.get("validation")
    if not after:
        return ["Not measured: this run has no validation report."]
    lines = ["Against the teacher's cached distributions, on the validation split.", ""]
    lines += ["| | untrained | trained |", "|---|---|---|"]
    for name, value in after.items():
        lines.append(f"| {name.replace('_', ' ')} | {_cell(before.get(name))} | {_cell(value)} |")
    kl_is = evaluated.get("kl_is") or result.get("kl_is")
    return [*lines, "", f"`kl` is KL(teacher || student) in nats{f' {kl_is}' if kl_is else ''}."]


def _answers(summary: Mapping[str, Any]) -> list[str]:
    samples = summary.get("evaluate", {}).get("samples") or []
    if not samples:
        return ["None recorded: `evaluate` has not been run."]
    generation = summary["evaluate"].get("made_from", {}).get("generation", {})
    how = ", ".join(f"{name} {value}" for name, value in generation.items() if name != "prompts")
    lines = [f"Validation prompts, none chosen{f' ({how})' if how else ''}."]
    for sample in samples:
        for name in ("prompt", "answer", "label"):
            lines += ["", f"{name}:", "", *_quoted(str(sample.get(name, ABSENT)))]
    return lines


def _quoted(text: str) -> list[str]:
    """Text as an indented block, so that nothing in it is markup."""
    return [f"    {line}" for line in text.strip().splitlines()] or ["    (empty)"]


def _limits(summary: Mapping[str, Any]) -> list[str]:
    others = ", ".join(summary[ELSEWHERE])
    beside = f" and on other text ({others})" if others else " only"
    lines = [f"- Measured on text of the training corpus's own kind{beside}; on any other text nothing is known."]
    lines += [] if "validation" in summary.get("evaluate", {}) else ["- `evaluate` has not been run on this model."]
    return [*lines, "- Not tested for bias, safety or truth."]


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return facts
