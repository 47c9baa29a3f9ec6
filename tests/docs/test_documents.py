"""Documents that fail when they lie: links lead somewhere, guarantees name tests that exist, the two READMEs agree."""

from __future__ import annotations

import dataclasses
import re
import subprocess
from pathlib import Path

import pytest

from stages.student.shape import StudentShape

ROOT = Path(__file__).resolve().parent.parent.parent
DOCUMENTS = sorted(
    path
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("shards/*.md"), *ROOT.glob("benchmarks/*.md"))
)
LINK = re.compile(r"\[[^\]]+\]\(([^)#\s]+)(?:#[^)]*)?\)")
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_to_a_file(document: Path) -> None:
    broken = [link for link in LINK.findall(document.read_text("utf-8")) if not (document.parent / link).exists()]
    assert not broken


def rows_of(document: str, beginning: str) -> list[list[str]]:
    """The cells of all rows of a document's tables that begin so."""
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (ROOT / document).read_text("utf-8").splitlines()
        if re.match(rf"\| {beginning}", line)
    ]


def missing_tests(held_by: str) -> list[str]:
    """Of the tests that a cell names, those that do not exist."""
    tests = TEST.findall(held_by)
    return [f"{file}::{name}" for file, name in tests if f"def {name}(" not in (ROOT / file).read_text("utf-8")]


def test_every_guarantee_names_a_test_that_exists_or_says_not_yet() -> None:
    rows = rows_of("docs/guarantees.md", r"[WRTS]\d")
    assert {word for row in rows for word in row[0].split()} == {
        *(f"W{n}" for n in range(1, 8)),
        *(f"R{n}" for n in range(1, 8)),
        *(f"T{n}" for n in range(1, 7)),
        *(f"S{n}" for n in range(1, 6)),
    }
    for name, _, held_by in rows:
        assert TEST.search(held_by) or held_by.startswith("not yet"), name
        assert not missing_tests(held_by), name


def test_every_oracle_of_the_student_names_tests_that_exist() -> None:
    rows = rows_of("docs/student.md", r"O\d")
    assert [row[0] for row in rows] == [f"O{n}" for n in range(1, 10)]
    for name, _, held_by in rows:
        assert f"::test_{name}_" in held_by, name
        assert not missing_tests(held_by), name
        assert not TEST.sub("", held_by).strip(), f"{name}: only tests by their whole names"


def test_every_key_of_the_student_is_in_its_table_with_its_default() -> None:
    told = {}
    for keys, defaults, _ in rows_of("docs/student.md", "`"):
        told |= dict(zip(re.findall(r"`(\w+)`", keys), defaults.replace("`", "").split(", "), strict=True))
    assert told == {item.name: str(item.default).lower() for item in dataclasses.fields(StudentShape)}


def test_the_two_readmes_say_the_same_commands_show_the_same_lines_and_link_the_same_places() -> None:
    english, chinese = ((ROOT / name).read_text("utf-8") for name in ("README.md", "README.zh.md"))

    def commands(text: str) -> list[str]:
        blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
        return [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]

    assert commands(english) == commands(chinese)
    summary = re.compile(r"```text\n(the demo's summary\n.*?)```", re.DOTALL)
    assert summary.findall(english) == summary.findall(chinese) != []
    assert len(re.findall(r"^## ", english, re.MULTILINE)) == len(re.findall(r"^## ", chinese, re.MULTILINE))
    own = {"README.md", "README.zh.md"}
    assert set(LINK.findall(english)) - own == set(LINK.findall(chinese)) - own


def test_no_file_names_a_network_host() -> None:
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    url = re.compile(rb"https?://(?!localhost|127\.0\.0\.1)[\w.-]+")
    found = {name: url.findall((ROOT / name).read_bytes()) for name in files if (ROOT / name).is_file()}
    assert not {name: hosts for name, hosts in found.items() if hosts}
