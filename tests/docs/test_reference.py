"""docs/cli.md is what the command line says of itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def test_the_reference_is_generated_from_the_command_line_of_today(tmp_path: Path) -> None:
    (recipe,) = [line for line in (ROOT / "Makefile").read_text("utf-8").splitlines() if "utils docs" in line]
    assert "--output docs/cli.md" in recipe
    command = recipe.strip().removeprefix("@").replace("docs/cli.md", str(tmp_path / "cli.md"))
    command = command.replace(".venv/bin/typer", f"{sys.executable} -m typer")
    subprocess.run(["bash", "-c", command], cwd=ROOT, check=True, capture_output=True)
    written = (ROOT / "docs/cli.md").read_text("utf-8")
    assert written == (tmp_path / "cli.md").read_text("utf-8"), "docs/cli.md is stale: run `make reference`"
