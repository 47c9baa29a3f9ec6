"""The report is one whole page: every curve of the log, nothing from elsewhere, words escaped, light and dark."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pipeline import evaluation
from pipeline.errors import PipelineError
from pipeline.history import Curve
from pipeline.report import REPORT, chart, write_report
from pipeline.run import RunFolder
from pipeline.sinks import listening
from pipeline.summary import evaluation_lines
from pipeline.word_problems import final_answer
from shards.reader import ShardSet
from stages.events import Answered, Metric

VOID = {"meta", "line", "polyline", "circle"}


class Outline(HTMLParser):
    """Fails on tags that do not close in order; collects text and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture
def run(finished_run: Path) -> RunFolder:
    run = RunFolder(finished_run)
    with listening(run.events) as emit:
        for step in range(1, 40):
            values = {"kl": 5.0 / step, "lr": 1e-3, "kept": 0.99, "data_wait": 0.001, "<i>own</i>": float(step)}
            emit(Metric(stage="distill", step=step, values=values))
        for step, answer in ((0, " \n"), (10, "<10>"), (20, "<20>")):
            emit(Answered(stage="distill", step=step, prompt="6 x 7?", answer=answer, label="42"))
    evaluate = run.summary()["evaluate"]
    run.report("evaluate", {**evaluate, "samples": [{"prompt": "<script>x</script>", "answer": "&", "label": "2"}]})
    return run


def test_it_holds_every_curve_and_needs_no_other_file(run: RunFolder) -> None:
    path = write_report(run)
    assert path == run.path / REPORT
    page = path.read_text(encoding="utf-8")
    outline = Outline()
    outline.feed(page)
    assert outline.open == []
    assert outline.tags.count("svg") == 5
    assert not {"script", "link", "img", "iframe"} & set(outline.tags)
    assert not {"src", "href"} & {name for name, _ in outline.attributes}
    assert "url(" not in page
    assert "&lt;script&gt;x" in page
    assert "&lt;i&gt;own" in page
    over_time = re.findall(r"after (\d+) steps</dt><dd>([^<]*)", page[page.index("Answers over time") :])
    assert over_time == [("0", "(nothing)"), ("10", "&lt;10&gt;"), ("20", "&lt;20&gt;")]
    labels = [value for name, value in outline.attributes if name == "aria-label"]
    assert "KL to the teacher, nats: 0.128 at step 39" in labels
    assert not list(run.path.glob(f".{REPORT}*")), "no half-written file is left"


def test_bytes_are_of_the_set_that_the_student_was_trained_from(run: RunFolder) -> None:
    run.report("teacher_cache", {**run.summary()["teacher_cache"], "positions": 1, "bytes": 777})
    assert "777.0 B" not in write_report(run).read_text(encoding="utf-8")
    facts = run.summary()
    del facts["distill"]
    run.summary_file.write_text(json.dumps(facts), encoding="utf-8")
    assert "777.0 B" in write_report(run).read_text(encoding="utf-8"), "before training, it is the run's own"


def test_a_curve_is_where_its_values_are_and_breaks_where_there_are_none() -> None:
    curve = Curve()
    for step, value in [(0, 0.0), (10, 10.0), (20, math.nan), (30, 5.0), (40, 0.0)]:
        curve.add(step, value)
    drawn = chart("it", curve)
    pieces = re.findall(r'points="([^"]+)"', drawn)
    dots = [[tuple(map(float, dot.split(","))) for dot in piece.split()] for piece in pieces]
    assert [len(piece) for piece in dots] == [2, 2]
    (low, high), (half, end) = dots
    assert low[1] == end[1] > half[1] > high[1], "more is higher up"
    assert half[1] == pytest.approx((low[1] + high[1]) / 2, abs=0.1)
    assert high[0] - low[0] == pytest.approx(end[0] - half[0], abs=0.1)
    assert ">10</text>" in drawn


@pytest.mark.parametrize("values", [[1.0], [3.0, 3.0], [0.0, 0.0], [1e-9, 2e-9], [-5.0, 1e6], [math.inf]])
def test_any_values_can_be_drawn(values: list[float]) -> None:
    curve = Curve()
    for step, value in enumerate(values):
        curve.add(step, value)
    assert "nan" not in chart("it", curve).replace("no finite value", "")


def test_a_browser_shows_it_light_and_dark(run: RunFolder) -> None:
    from playwright.sync_api import sync_playwright

    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    path = write_report(run)
    with sync_playwright() as playwright:
        if program is None and not Path(playwright.chromium.executable_path).exists():
            pytest.skip("no Chromium here: apt-get install chromium, or playwright install chromium")
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        grounds = {}
        for scheme in ("light", "dark"):
            page = browser.new_page(color_scheme=scheme, viewport={"width": 390, "height": 800})
            complaints: list[str] = []
            page.on("console", lambda message, complaints=complaints: complaints.append(message.text))
            page.goto(path.as_uri())
            grounds[scheme] = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert page.evaluate("document.documentElement.scrollWidth") <= 390, "no sideways scrolling on a phone"
            assert page.locator("svg").count() == 5
            assert complaints == []
        browser.close()
    bright = {scheme: sum(map(int, re.findall(r"\d+", ground))) for scheme, ground in grounds.items()}
    assert bright["light"] > 600 > bright["dark"]


def with_recipe(folder: Path, old: str, new: str) -> RunFolder:
    run = RunFolder(folder)
    text = run.recipe_file.read_text(encoding="utf-8")
    assert old in text
    run.recipe_file.write_text(text.replace(old, new), encoding="utf-8")
    return run


def test_beside_the_teacher_itself_the_whole_kl_is_told(
    finished_run: Path, tmp_path: Path, save_byte_tokenizer: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    contract = ShardSet(RunFolder(finished_run).shards).contract
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape = Qwen3Config(vocab_size=contract.vocab_size, num_key_value_heads=1, head_dim=8, **sizes)
    Qwen3ForCausalLM(shape).save_pretrained(tmp_path / "teacher")
    save_byte_tokenizer(tmp_path / "teacher")
    run = with_recipe(finished_run, '"demo:smollm2-135m-instruct"', json.dumps(str(tmp_path / "teacher")))
    with pytest.raises(PipelineError, match=r"is not the teacher of these shards \(made-up/teacher\)"):
        evaluation.evaluate(run, shards=None, teacher=True)
    without = evaluation.evaluate(run, shards=None)
    assert without["whole"] is None
    monkeypatch.setattr("stages.teacher_cache.teacher.weights_fingerprint", lambda _: contract.teacher_fingerprint)
    facts = evaluation.evaluate(run, shards=None, teacher=True)
    assert facts["whole"]["positions"] == facts["validation"]["positions"]
    assert f"{facts['whole']['kl']:.4f} nats over the whole vocabulary" in "\n".join(evaluation_lines(facts, run))
    assert "KL over the whole vocabulary, nats" in (run.path / REPORT).read_text(encoding="utf-8")
    assert evaluation.evaluate(run, shards=None) == facts, "what was measured stays, without a teacher too"
    (tmp_path / "rows.jsonl").write_text(json.dumps({"input": "What is 7 + 7?", "content": "It is 14."}))
    rows = evaluation.evaluate_rows(run, tmp_path / "rows.jsonl", teacher=True)
    assert rows["whole"]["positions"] == rows["positions"] > 0
    save_byte_tokenizer(tmp_path / "teacher", "three four five six")
    with pytest.raises(PipelineError, match="has another tokenizer than"):
        evaluation.evaluate_rows(run, tmp_path / "rows.jsonl", teacher=True)


def test_evaluation_measures_seen_and_unseen_records_answers_and_speed(finished_run: Path) -> None:
    run = with_recipe(finished_run, "prompts = 3", "prompts = 1")
    facts = evaluation.evaluate(run, shards=None)
    assert facts["training"]["positions"] > 0
    assert facts["training"] != facts["validation"]
    assert 0 <= facts["validation"]["ece"] <= 1
    assert facts["positions_per_s"] > 0 < facts["generated_tokens_per_s"]
    match = facts["exact_match"]
    assert match["share"] == 0.0, "an untrained student solves nothing"
    unseen = ShardSet(run.shards).split("dev")
    assert match["answers"] == len(unseen) > len(facts["samples"]) == run.recipe().generation.prompts
    lines = "\n".join(evaluation_lines(facts, run))
    assert "exact match     0.0% of 2 answers end as the label does (95 % interval 0.0% to 65.8%)" in lines
    assert "of 2 answers are right; 95 % interval 0.0% to" in (run.path / REPORT).read_text(encoding="utf-8")
    assert "training split  KL" in lines
    assert (run.path / REPORT).is_file()
    assert evaluation.evaluate(run, shards=None) == facts


@pytest.mark.parametrize(("hits", "count"), [(0, 3), (3, 3), (1, 40), (20, 40), (7, 200)])
def test_the_interval_is_the_shares_that_would_not_be_rejected(hits: int, count: int) -> None:
    """Wilson's ends p solve |hits / n - p| = 1.96 sqrt(p (1 - p) / n)."""
    for end in evaluation.wilson_interval(hits, count):
        assert (hits / count - end) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / count, abs=1e-12)
    low, high = evaluation.wilson_interval(hits, count)
    assert 0 <= low <= hits / count + 1e-12
    assert hits / count - 1e-12 <= high <= 1
    assert low < high


def test_an_answer_comes_to_its_last_line() -> None:
    assert final_answer("5 + 5 = 10\n\n10 \n") == "10"
    assert final_answer(" \n") == ""
