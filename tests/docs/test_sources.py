"""What the sources must not contain, whatever the linters are configured to."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
ROOMS = ("pipeline", "shards", "stages")
FORBIDDEN_MODULES = {"pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
FORBIDDEN_CALLS = {"eval", "exec", "torch.load"}


def _violations(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in FORBIDDEN_MODULES]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module or ""] if (node.module or "").split(".")[0] in FORBIDDEN_MODULES else []
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in FORBIDDEN_CALLS:
            found.append(ast.unparse(node.func))
    return found


def test_S4_nothing_that_a_user_can_supply_is_unpickled_or_evaluated() -> None:
    files = [path for room in ROOMS for path in (ROOT / room).rglob("*.py")] + [ROOT / "cli.py"]
    found = {str(path): bad for path in files if (bad := _violations(path.read_text("utf-8")))}
    assert not found


def test_the_search_itself_finds_what_it_looks_for() -> None:
    source = "import pickle\nfrom dill import loads\nimport torch\ntorch.load('x')\neval('1')\nmodel.eval()\n"
    assert _violations(source) == ["pickle", "dill", "torch.load", "eval"]
