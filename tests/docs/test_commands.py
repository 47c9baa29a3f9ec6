"""Every block of code in a page of documentation works: commands are parsed by the real command line and Makefile,
Python runs against a finished run, data parses, and the demo's summary has the lines that `pipeline.summary` prints."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer._click.exceptions import ClickException

import cli
from pipeline.recipe import load
from pipeline.run import RunFolder
from pipeline.shard_tools import export
from pipeline.summary import demo_lines
from stages.inference.server.app import create_app
from stages.inference.server.models import ServedModel
from stages.inference.server.settings import ServerSettings

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = ("README.md", "README.zh.md", "docs/placement.md", "docs/teacher_cache.md")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
OWN = ("cli.py", "minicodformer")
OTHERS = {"source", "screen", "apt-get", "curl", "cat", "echo"}
"""Programs that a README may use without our parsing them."""
SERVED = "http://127.0.0.1:8000"
"""Where a README says that the server is; the test's own stands elsewhere."""
EXPORTED = "decoded"
"""Where a README has exported a shard set to."""
LANGUAGES = {"sh", "python", "json", "toml", "text"}


@dataclass(frozen=True, slots=True)
class Block:
    document: str
    line: int
    language: str
    code: str

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"


def blocks(*languages: str) -> list[Block]:
    found: list[Block] = []
    for document in PAGES:
        text = (ROOT / document).read_text("utf-8")
        found += [Block(document, text.count("\n", 0, m.start()) + 1, m[1], m[2]) for m in BLOCK.finditer(text)]
    return [block for block in found if not languages or block.language in languages]


def test_every_block_names_a_language_that_is_checked_here() -> None:
    assert {block.language for block in blocks()} <= LANGUAGES
    assert len(blocks("sh")) >= 4


def commands(script: str) -> Iterator[list[str]]:
    """The words of each command of a shell script, comments gone, pipes and lists taken apart."""
    for line in script.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>()")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word and set(word) <= set("|&;"):
                if words:
                    yield words
                words = []
            else:
                words.append(word)


def check_all(script: str) -> None:
    for words in commands(script):
        check(words)


def check(words: list[str]) -> None:
    """Raise or assert where a command cannot be one of ours."""
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    if Path(words[0]).name in ("python", "python3") and len(words) > 1:
        words = words[1:]
    program = Path(words[0]).name
    if program == "make":
        check_make(words[1:])
    elif program in OWN:
        check_cli(words[1:])
    else:
        assert program in OTHERS, f"{program} is no program that a README may use"


def check_make(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for word in words:
        name, equals, _ = word.partition("=")
        if equals:
            assert f"$({name})" in makefile, f"the Makefile knows no variable {name}"
        else:
            assert re.search(rf"^{re.escape(name)}:", makefile, re.MULTILINE), f"the Makefile has no target {name}"


def check_cli(words: list[str]) -> None:
    """Parse as the app does, without running the verb."""
    app = typer.main.get_command(cli.app)
    if words and words[0] in ("--install-completion", "--show-completion", "--help"):
        return
    context = app.make_context("cli.py", list(words))
    name, verb, rest = app.resolve_command(context, [*context._protected_args, *context.args])
    verb.make_context(name, rest, parent=context)


@pytest.mark.parametrize("block", blocks("sh"), ids=str)
def test_every_command_is_one_that_exists(block: Block) -> None:
    check_all(block.code)


def test_every_command_in_running_text_is_one_that_exists() -> None:
    for document in PAGES:
        text = BLOCK.sub("", (ROOT / document).read_text("utf-8"))
        for quoted in re.findall(r"`((?:make|python cli\.py|minicodformer) [^`]+)`", text):
            check_all(quoted)


@pytest.mark.parametrize(
    "command",
    [
        "make fly",
        "make demo SPEED=9",
        "python cli.py fly",
        "python cli.py distill --gpu 2",
        "python cli.py distill --gpus two",
        "echo x | .venv/bin/python cli.py generate --temperature hot",
        "wget something",
    ],
)
def test_the_check_itself_refuses_what_does_not_exist(command: str) -> None:
    with pytest.raises((AssertionError, ClickException)):
        check_all(command)


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python_runs_beside_a_finished_run(
    block: Block, finished_run: Path, serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished_run.parent.parent)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(finished_run.parent / "code"))
    for name in set(re.findall(r"runs/([\w.-]+)", block.code)) - {"tiny"}:
        (finished_run.parent / name).symlink_to(finished_run)
    if EXPORTED in block.code:
        export(str(finished_run / "shards"), EXPORTED, kind="parquet")
    if SERVED not in block.code:
        exec(compile(block.code, str(block), "exec"), {})
        return
    (name,) = re.findall(r'model="([^"]+)"', block.code)
    model = ServedModel.load(name, finished_run / "final_model")
    with serve(create_app([model], ServerSettings(max_new_tokens=8))) as address:
        exec(compile(block.code.replace(SERVED, address), str(block), "exec"), {})


@pytest.mark.parametrize("block", blocks("json", "toml"), ids=str)
def test_data_parses(block: Block, tmp_path: Path) -> None:
    if block.language == "json":
        for line in block.code.splitlines():
            json.loads(line)
    elif "[corpus]" in block.code or "[distill]" in block.code:
        (tmp_path / "recipe.toml").write_text(block.code, encoding="utf-8")
        load(str(tmp_path / "recipe.toml"))
    else:
        tomllib.loads(block.code)


def shape(line: str) -> str:
    """A line without its figures."""
    return re.sub(r"\d[\d,.]*", "0", line).strip()


@pytest.mark.parametrize("block", [block for block in blocks("text") if "the demo's summary" in block.code], ids=str)
def test_the_demos_summary_reads_as_it_is_printed(block: Block, finished_run: Path) -> None:
    printed = [line.replace("runs/tiny", "runs/smollm2-demo") for line in printed_summary(finished_run)]
    shapes = {shape(line) for line in printed}
    for line in block.code.splitlines():
        if line.startswith(("prompt", "answer", "label")):
            assert line[:10].strip() in {known[:10].strip() for known in printed}
        elif line.endswith("…"):
            assert any(known.startswith(shape(line[:-1])) for known in shapes), line
        else:
            assert not line or shape(line) in shapes, line


FIDELITY = {"positions": 558.0} | dict.fromkeys(
    (
        "KL(full || decoded), the rest as one, mean",
        "mass of the kept ids, mean",
        *(f"share of the KL kept at T = {temperature}" for temperature in ("1", "1.25", "1.5", "2", "4")),
    ),
    0.5,
)
"""Of what the demo measures; the fixture's made-up teacher was never asked."""


def printed_summary(run: Path) -> list[str]:
    here = Path("runs") / run.name

    class Named(RunFolder):
        """The run as it would be named from its user's folder."""

        def summary(self):  # type: ignore[no-untyped-def]
            facts = RunFolder(run).summary()
            facts["teacher_cache"]["fidelity"] = FIDELITY
            return facts

    return demo_lines(Named(here), 1.0)
