"""Cards say what the run holds and admit what it does not; an export is whole, equal, and never over something else."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.card import model_card, write_card
from pipeline.errors import PipelineError, UsageError
from pipeline.export import export_model
from pipeline.run import RunFolder
from pipeline.share import dataset_card, share
from shards.durable import file_sha256
from shards.errors import ShardError
from shards.manifest import FIDELITY_FILE, publish_teacher_files, read_manifest, seal
from shards.reader import ShardSet
from shards.verify import verify_shards
from stages.corpus.chat import CHAT_FILE, chat_document
from stages.inference.generate import Student
from stages.inference.loading import load_model, newest_model


@pytest.fixture
def run(finished_run: Path) -> RunFolder:
    return RunFolder(finished_run)


def rows(card: str) -> dict[str, str]:
    """The tables of a card: first cell -> the rest."""
    return {m[1]: m[2] for m in re.finditer(r"^\| (.+?) \| (.+) \|$", card, re.MULTILINE)}


def test_the_model_card_has_the_figures_of_the_run(run: RunFolder) -> None:
    told = rows(model_card(run))
    validation = run.summary()["evaluate"]["validation"]
    assert told["kl"] == f"not known | {validation['kl']:.4g}"
    assert told["steps"] == "3"
    assert told["parameters"] == f"{sum(p.numel() for p in load_model(run.final_model).parameters()):,}"
    assert "answer:\n\n    3\n" in model_card(run)


def test_what_was_not_measured_is_said_to_be_absent(run: RunFolder) -> None:
    run.summary_file.unlink()
    (run.final_model / "training.json").write_text("{}", encoding="utf-8")
    card = model_card(run)
    told = rows(card)
    assert {told[name] for name in ("teacher", "engine", "steps", "precision", "records cached")} == {"not known"}
    assert "Not measured: this run has no validation report." in card
    assert "None recorded: `evaluate` has not been run." in card
    assert "- `evaluate` has not been run on this model." in card


def test_an_evaluation_of_other_weights_is_not_this_models(run: RunFolder) -> None:
    evaluate = run.summary()["evaluate"]
    for sha, present in ((file_sha256(run.final_model / "model.safetensors"), True), ("0" * 64, False)):
        run.report("evaluate", {**evaluate, "made_from": {"model_sha256": sha}})
        assert ("answer:\n\n    3\n" in model_card(run)) == present


def test_what_is_cached_is_told_of_the_set_that_the_model_was_trained_from(run: RunFolder) -> None:
    cached = run.summary()["teacher_cache"]
    run.report("teacher_cache", {**cached, "records": 999, "positions": 9_999})
    told, own = rows(model_card(run)), read_manifest(run.shards).totals()
    assert told["records cached"] == f"{own['records']:,}"
    assert told["positions cached"] == f"{own['positions']:,}"


def test_the_card_says_what_its_kl_is(run: RunFolder) -> None:
    whole = "`kl` is KL(teacher || student) in nats over the kept ids and one bucket for the rest (a lower bound"
    assert whole in model_card(run)
    run.report("evaluate", {**run.summary()["evaluate"], "kl_is": "as somebody guessed it"})
    assert "`kl` is KL(teacher || student) in nats as somebody guessed it." in model_card(run)


def test_text_of_samples_cannot_become_markup(run: RunFolder) -> None:
    evil = "# heading\n<script>\n```"
    samples = [{"prompt": evil, "answer": evil, "label": ""}]
    run.report("evaluate", {**run.summary()["evaluate"], "samples": samples})
    card = model_card(run)
    assert card.count("    # heading") == 2
    assert "\n# heading" not in card
    assert "\n<script>" not in card


def test_a_card_needs_a_model(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="no final model"):
        write_card(RunFolder(tmp_path))


def test_an_export_is_the_whole_model_with_its_card_and_answers_alike(run: RunFolder, tmp_path: Path) -> None:
    write_card(run)
    target = tmp_path / "given" / "away"
    (line,) = export_model(run, target)
    assert "README.md" in line
    names = {path.name for path in run.final_model.iterdir()}
    assert {path.name for path in target.iterdir()} == names
    for name in names:
        assert (target / name).read_bytes() == (run.final_model / name).read_bytes()
    ours, theirs = (Student.load(folder).generate("hallo", max_new_tokens=4) for folder in (run.final_model, target))
    assert ours == theirs
    assert [path.name for path in target.parent.iterdir()] == ["away"]


def test_an_export_never_overwrites(run: RunFolder, tmp_path: Path) -> None:
    file, folder, link = tmp_path / "file", tmp_path / "folder", tmp_path / "link"
    file.write_text("mine", encoding="utf-8")
    folder.mkdir()
    link.symlink_to(tmp_path / "nowhere")
    for target in (file, folder, link):
        with pytest.raises(UsageError, match="is there already"):
            export_model(run, target)
    assert file.read_text(encoding="utf-8") == "mine"
    assert list(folder.iterdir()) == []


def test_an_export_that_fails_leaves_nothing(run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipeline.export.sync", full)
    with pytest.raises(OSError, match="No space"):
        export_model(run, tmp_path / "out" / "model")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_model_that_is_not_whole_is_not_exported(run: RunFolder, tmp_path: Path) -> None:
    (run.final_model / "tokenizer.json").unlink()
    with pytest.raises(PipelineError, match=r"lacks tokenizer\.json"):
        export_model(run, tmp_path / "model")


def test_the_dataset_card_has_the_sets_sizes_contract_and_quality(run: RunFolder) -> None:
    told = rows(dataset_card(run.shards))
    manifest = read_manifest(run.shards)
    for split in ("train", "dev"):
        (info,) = [info for info in manifest.shards if info.split == split]
        assert f"1 | {info.records:,} | {info.positions:,}" in dataset_card(run.shards)
    for field in dataclasses.fields(manifest.contract):
        assert f"`{field.name}`" in told
    assert told["`teacher`"] == "made-up/teacher"
    split = ShardSet(run.shards).split("dev")
    masses = [mass for index in range(len(split)) for mass in split[index].coverage_N.tolist()]
    coverage, least, *_ = told["dev"].split(" | ")
    assert float(coverage) == pytest.approx(sum(masses) / len(masses), abs=2e-3)
    assert float(least) == pytest.approx(min(masses), abs=2e-3)


def test_fidelity_is_told_where_it_was_measured(run: RunFolder) -> None:
    """On this very set: the run around it may have made another since."""
    cached = run.summary()["teacher_cache"]
    run.report("teacher_cache", {**cached, "fidelity": {"mean KL to the live teacher": 0.5}})
    assert "Not measured" in dataset_card(run.shards)
    manifest = read_manifest(run.shards)
    (run.shards / "manifest.json").unlink()
    publish_teacher_files(run.shards, {FIDELITY_FILE: b'{"mean KL to the live teacher": 0.25}'})
    seal(run.shards, manifest.contract, manifest.shards)
    assert rows(dataset_card(run.shards))["mean KL to the live teacher"] == "0.25"


def test_a_shared_set_stays_intact_and_its_reading_example_runs(run: RunFolder) -> None:
    share(str(run.shards))
    assert verify_shards(run.shards).intact
    (example,) = re.findall(r"```python\n(.*?)```", (run.shards / "README.md").read_text("utf-8"), re.DOTALL)
    exec(example.replace("path/of/this/folder", str(run.shards)), {})
    (run.shards / "manifest.json").unlink()
    with pytest.raises(ShardError):
        share(str(run.shards))


def test_licences_are_told_where_the_set_holds_them(run: RunFolder) -> None:
    assert "Of the teacher and of the corpus: not known" in dataset_card(run.shards)
    (run.shards / "teacher" / "LICENSE").write_text("Apache-2.0", encoding="utf-8")
    assert "The teacher's own, in `teacher/`: LICENSE" in dataset_card(run.shards)


def test_a_new_card_makes_no_older_model_the_newest(run: RunFolder) -> None:
    newer = run.path.with_name("newer")
    shutil.copytree(run.path, newer)
    (newer / "final_model" / "model.safetensors").touch()
    write_card(run)
    assert newest_model(run.path.parent) == newer / "final_model"


def examples(run: RunFolder) -> list[str]:
    found = re.findall(r"```python\n(.*?)```", model_card(run), re.DOTALL)
    return [example.replace("path/of/this/folder", str(run.final_model)) for example in found]


def test_every_example_of_the_model_card_runs(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(examples(run)) == 2
    for example in examples(run):
        exec(example, {})
        assert capsys.readouterr().out


@pytest.mark.parametrize("thinking", [True, False])
def test_elsewhere_the_student_is_asked_as_it_was_trained(run: RunFolder, thinking: bool) -> None:
    template = run.final_model / "chat_template.jinja"
    switched = "{% if enable_thinking is false %}<think></think>{% endif %}"
    template.write_text(template.read_text(encoding="utf-8") + switched, encoding="utf-8")
    (run.final_model / CHAT_FILE).write_bytes(chat_document(thinking=thinking))
    names: dict[str, Any] = {}
    exec(examples(run)[1], names)
    ours = Student.load(run.final_model).prompt_ids("How many eggs are in three dozen?")
    assert names["prompt"]["input_ids"].tolist() == [ours]


def test_without_a_template_no_prompt_is_promised_elsewhere(run: RunFolder) -> None:
    (run.final_model / "chat_template.jinja").unlink()
    (example,) = examples(run)
    exec(example, {})
