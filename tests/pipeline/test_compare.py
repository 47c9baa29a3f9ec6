"""`compare` as people see it."""

from __future__ import annotations

import html.parser
import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.compare import compare
from pipeline.errors import UsageError
from pipeline.run import RunFolder


def told(run: Path, **options: Any) -> str:
    asked = {"shards": None, "split": "validation", "record": 0, "page": None, "as_json": False, **options}
    return "\n".join(compare(RunFolder(run), **asked))


def test_the_terminal_shows_response_and_worst_tokens(standing_run: Path) -> None:
    text = told(standing_run)
    assert "tiny, validation record 0 (sample-4)" in text
    assert told(standing_run, split="dev") == text
    assert "mean KL" in text
    assert "It is 8. <b>&" in text
    assert "\x1b" not in text, "no colours where the output is no terminal"


def test_json_has_every_token(standing_run: Path) -> None:
    tokens = json.loads(told(standing_run, as_json=True))
    assert "".join(token["label"] for token in tokens) == "It is 8. <b>&<|im_end|>"
    assert all(token["kl"] >= 0 and token["teacher"] and token["teacher_looks"] for token in tokens)


def test_the_page_is_whole_and_what_a_record_says_is_text_in_it(standing_run: Path, tmp_path: Path) -> None:
    said = told(standing_run, page=tmp_path / "page.html")
    assert said.startswith(f"wrote {tmp_path / 'page.html'}: ")
    page = (tmp_path / "page.html").read_text("utf-8")
    assert "<b>&<" not in page
    assert "src=" not in page, "nothing is fetched from anywhere"

    class Reader(html.parser.HTMLParser):
        rows: list[str] = []  # noqa: RUF012
        links: list[str] = []  # noqa: RUF012
        words = ""
        inside = False

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            given = dict(attrs)
            self.inside = tag == "a"
            if tag == "a":
                self.links.append((given["href"] or "")[1:])
            if tag == "tr" and "id" in given:
                self.rows.append(given["id"] or "")

        def handle_endtag(self, tag: str) -> None:
            self.inside = False

        def handle_data(self, data: str) -> None:
            self.words += data if self.inside else ""

    reader = Reader()
    reader.feed(page)
    assert reader.words == "It is 8. <b>&<|im_end|>"
    assert reader.rows == reader.links
    assert len(reader.rows) > 5


@pytest.mark.parametrize(
    ("options", "said"), [({"record": 2}, "no record 2"), ({"split": "test"}, "has no test split")]
)
def test_what_is_not_there_is_named(standing_run: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        told(standing_run, **options)
