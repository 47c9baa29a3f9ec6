"""benchmarks/RESULTS.md, made from results/*.json: every figure with its peer, its bound and the command beside it.

python -m benchmarks.report
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.plots import PLOTS, charts
from benchmarks.record import RESULTS

REPORT = RESULTS.parent / "RESULTS.md"
HEAD = """# Results

Made by `make bench` from `benchmarks/results/*.json`; nothing here is typed by hand. *Ratio* is how many times better
ours is, above 1 ahead; *bound* is what it has to reach, where something is promised.
"""


def report() -> str:
    results = ((path.stem, json.loads(path.read_text(encoding="utf-8"))) for path in sorted(RESULTS.glob("*.json")))
    return "\n".join([HEAD, *("\n".join(_section(name, facts)) for name, facts in results), *_not_measured()])


def _section(name: str, facts: dict[str, Any]) -> Iterator[str]:
    versions = ", ".join(f"{package} {version}" for package, version in facts["versions"].items())
    yield f"## {name}\n"
    yield f"{_purpose(name)}\n"
    yield f"`python -m benchmarks.{name}` at commit {facts['commit']}; {facts['machine']}; {versions}."
    yield f"Clock: {facts['clock']}.\n"
    for file, (growth, _) in charts().items():
        if growth.benchmark == name:
            yield f"![{growth.title}]({PLOTS.relative_to(REPORT.parent)}/{file})\n"
    yield "| case | metric | ours | reference | | ratio | bound |"
    yield "|---|---|---:|---:|---|---:|---|"
    for row in facts["rows"]:
        figures = f"{row['ours']:g} {row['unit']} | {row['reference']:g} {row['unit']}"
        named = [row[name].replace("|", r"\|") for name in ("case", "metric", "reference_name")]
        yield f"| {named[0]} | {named[1]} | {figures} | {named[2]} | {_ratio(row)} |"
    yield ""


def _ratio(row: dict[str, Any]) -> str:
    bound, ratio = row["bound"], f"{row['ratio']:.3g}"
    if bound is None:
        return f"{ratio} | "
    return f"{ratio} | {bound:.3g}: {'held' if row['ratio'] >= bound else '**missed**'}"


def _purpose(name: str) -> str:
    """The first paragraph of the benchmark's own docstring."""
    source = (RESULTS.parent / f"{name}.py").read_text(encoding="utf-8")
    text = ast.get_docstring(ast.parse(source)) or ""
    return text.split("\n\n")[0]


ON_A_GPU = {
    "capture, tokens a second": "bare prefill + head product; vLLM prompt_logprobs",
    "attention summary in capture": "capture without",
    "distillation loss, time and peak memory": "the same dense",
    "liquid scan, fla's kernel": "causal SDPA; our chunked scan",
    "decode and serving": "generate, one prompt at a time",
    "training, tokens a second at 1, 2 and 3 GPUs": "one GPU",
}
"""What the same benchmarks would say of a GPU, and beside what. None was at hand for any committed result."""


def _not_measured() -> Iterator[str]:
    yield "## On a GPU\n"
    yield "No committed result was taken on a GPU. `python -m pytest -m gpu` says what has to agree there and is"
    yield "skipped, with its reason, where there is none; the tests of capture and of ZeRO-3 with offload run on"
    yield "whatever device there is, so far on CPUs alone. `cli.py estimate --plan` assumes a GPU's rates.\n"
    yield "| what | ours | reference | |"
    yield "|---|---|---|---|"
    for what, reference in ON_A_GPU.items():
        yield f"| {what} | not measured | not measured | {reference} |"
    yield ""


def main() -> None:
    PLOTS.mkdir(exist_ok=True)
    drawn = charts()
    for old in set(PLOTS.glob("*.svg")) - {PLOTS / file for file in drawn}:
        old.unlink()
    for file, (_, svg) in drawn.items():
        (PLOTS / file).write_text(svg, encoding="utf-8")
    REPORT.write_text(report(), encoding="utf-8")
    print(f"wrote {REPORT.relative_to(Path.cwd()) if REPORT.is_relative_to(Path.cwd()) else REPORT}")


if __name__ == "__main__":
    main()
