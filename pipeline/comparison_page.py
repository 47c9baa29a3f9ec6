"""A comparison of student and teacher as a page: one file that needs nothing else."""

from __future__ import annotations

import html
from collections.abc import Sequence

from pipeline.compare import FULL_KL, summary, visible
from stages.distill.compare import ComparedToken, Likely

_LEVELS = 10
"""Of colour."""


def page_text(title: str, prompt: str, compared: Sequence[ComparedToken]) -> str:
    """Each word of the response leads to its row."""
    words = "".join(
        f'<a href="#t{token.position}" class="k{_level(token.kl)}">{html.escape(token.label)}</a>' for token in compared
    )
    attention = any(token.teacher_looks for token in compared)
    heads = ["", "label", "KL", "teacher", "student", *(["teacher looks at", "student looks at"] if attention else [])]
    rows = "\n".join(_row(token, attention) for token in compared)
    return _PAGE.format(
        title=html.escape(title),
        summary=html.escape(summary(compared)),
        prompt=html.escape(prompt),
        words=words,
        heads="".join(f'<th scope="col">{head}</th>' for head in heads),
        rows=rows,
        levels="".join(f".k{level}{{--heat:{5 * level}%}}" for level in range(_LEVELS + 1)),
    )


def _level(kl: float) -> int:
    return round(_LEVELS * min(max(kl, 0.0) / FULL_KL, 1.0))


def _row(token: ComparedToken, attention: bool) -> str:
    by_teacher = "not kept" if token.label_by_teacher is None else f"{token.label_by_teacher:.1%}"
    shares = f"<small>{by_teacher} · {token.label_by_student:.1%}</small>"
    cells = [
        f"<code>{html.escape(visible(token.label))}</code><br>{shares}",
        f"{token.kl:.2f}",
        _likely(token.teacher),
        _likely(token.student),
        *([_likely(token.teacher_looks), _likely(token.student_looks)] if attention else []),
    ]
    told = "".join(f"<td>{cell}</td>" for cell in cells)
    return f'<tr id="t{token.position}" class="k{_level(token.kl)}"><th scope="row">{token.position}</th>{told}</tr>'


def _likely(tokens: Sequence[Likely]) -> str:
    return "<br>".join(f"<code>{html.escape(visible(t.text))}</code> <small>{t.share:.1%}</small>" for t in tokens)


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --ground: light-dark(#f4f6f4, #0d1413); --ink: light-dark(#14201e, #e6efec);
  --soft: light-dark(#566662, #93a6a1); --line: light-dark(#dbe3e0, #263431); --warm: light-dark(#e0860f, #f0a63c);
  font: 16px/1.5 system-ui, sans-serif; }}
{levels}
body {{ margin: 0 auto; max-width: 72rem; padding: 1.5rem 1rem 4rem; background: var(--ground); color: var(--ink); }}
h1 {{ font-size: 1.3rem; margin: 0; }}
p, small, summary {{ color: var(--soft); }}
pre, .words {{ white-space: pre-wrap; overflow-wrap: anywhere; font: inherit; color: var(--ink); }}
.words {{ line-height: 1.9; border: 1px solid var(--line); border-radius: 0.8rem; padding: 1rem; }}
.words a {{ color: inherit; text-decoration: none; border-radius: 0.2rem; }}
.words a, td:nth-of-type(2) {{ background: color-mix(in oklab, var(--warm) var(--heat), transparent); }}
.words a:hover, :focus-visible, tr:target {{ outline: 2px solid var(--warm); }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: left; vertical-align: top; padding: 0.35rem 0.7rem; border-bottom: 1px solid var(--line); }}
th {{ color: var(--soft); font-weight: 500; }}
code {{ font-family: ui-monospace, monospace; white-space: pre; }}
</style>
<h1>{title}</h1>
<p>{summary}. The warmer a token, the further the student is from its teacher there. Below a label stand its
probabilities by teacher and by student.</p>
<details><summary>The prompt</summary><pre>{prompt}</pre></details>
<p class="words">{words}</p>
<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>
{rows}
</tbody></table></div>
</html>
"""
