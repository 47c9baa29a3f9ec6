"""The command line as a user meets it: in its own process, from another folder, with its exit codes and error lines."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CLI = Path(__file__).resolve().parent.parent.parent / "cli.py"


@pytest.fixture
def cli(tmp_path: Path):  # type: ignore[no-untyped-def]
    """Run `python cli.py …` from an empty folder."""

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(CLI), *words]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)

    return run


def test_help_names_every_verb_and_imports_nothing_heavy(cli) -> None:  # type: ignore[no-untyped-def]
    done = cli("--help")
    assert done.returncode == 0
    for verb in ("demo", "prepare", "teacher-cache", "distill", "evaluate", "generate", "inspect-shard", "doctor"):
        assert verb in done.stdout
    code = f"import sys; sys.path.insert(0, {str(CLI.parent)!r}); import cli; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "vllm", "deepspeed", "pyarrow", "numpy"} & set(loaded)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["prepare", "--recipe", "nowhere"], 2, "no recipe 'nowhere'"),
        (["prepare", "--recipe", "smollm2-demo", "--set", "corpus.sed=3"], 2, "unknown key corpus.sed"),
        (["prepare", "--recipe", "qwen3-8b"], 2, "no data given"),
        (["prepare", "--recipe", "qwen3-8b", "--data", "missing.jsonl"], 2, "missing.jsonl"),
        (["prepare", "--recipe", "smollm2-demo", "--name", "../out"], 2, "'../out' cannot name a run"),
        (["distill", "--recipe", "smollm2-demo", "--gpus", "2"], 1, "no shards in"),
        (["distill", "--recipe", "smollm2-demo", "--gpus", "5"], 2, "does not divide the global batch of 4"),
        (["evaluate"], 1, "no finished run"),
        (["evaluate", "--name", "absent"], 1, "no run 'absent'"),
        (["inspect-shard", "absent.arrow"], 1, "absent.arrow"),
        (["verify-shards", "absent"], 1, "absent"),
        (["demo", "--gpus", "0"], 2, "GPUS=0 does not divide"),
        (["generate", "--file", "absent.txt"], 2, "absent.txt cannot be read"),
        (["generate", "one", "--file", "prompts.txt"], 2, "a prompt and --file cannot both be given"),
        (["compare", "--json", "--html", "page.html"], 2, "--html and --json cannot both be given"),
        (["inspect-shard", "shards", "--position", "3"], 2, "--position shows a token of a sample"),
        (["estimate", "shards", "--plan", "--rate", "5"], 2, "a shard set and --rate can say nothing with --plan"),
        (["estimate", "--plan", "--machines", "1"], 2, "--machines can say nothing with --plan"),
        (["estimate", "shards", "--positions", "9", "--peak", "5"], 2, "--peak can say nothing without --plan"),
    ],
)
def test_bad_input_is_one_clear_line_with_what_to_do(cli, words: list[str], code: int, said: str) -> None:  # type: ignore[no-untyped-def]
    done = cli(*words)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "error: " in done.stderr
    assert "hint: " in done.stderr
    assert "Traceback" not in done.stderr


def test_make_evaluate_passes_on_run_and_set() -> None:
    words = ["make", "-n", "--no-print-directory", "-o", "setup", "evaluate", "NAME=mine", "SHARDS=s3://bucket/set"]
    done = subprocess.run(words, cwd=CLI.parent, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-5:] == ["evaluate", "--name", "mine", "--shards", "s3://bucket/set"]


def test_debug_shows_the_traceback(cli) -> None:  # type: ignore[no-untyped-def]
    done = cli("--debug", "evaluate")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "error: no finished run" in done.stderr


def test_a_wrong_option_is_a_usage_error(cli) -> None:  # type: ignore[no-untyped-def]
    assert cli("distill", "--gpu", "2").returncode == 2
    assert cli("inspect-shard").returncode == 2
    assert cli("fly").returncode == 2
