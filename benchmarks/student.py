"""The student beside its peers: the liquid scan, and decoding one token at a growing context.

Prints a table and writes results/student.json. Every figure is CPU time of this process on one thread, the lower
quartile of several runs, so that other work on the machine disturbs it little; `ratio` is reference / ours, how many
times as fast ours is (of bytes: as small), and `bound` the least ratio that is still good, where there is one.

    python benchmarks/student.py
"""

from __future__ import annotations

import json
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from ncps.torch import LTC
from ncps.wirings import AutoNCP
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from stages.student.model import build_student
from stages.student.scan_chunked import scan_chunked
from stages.student.scan_naive import scan_naive
from stages.student.shape import StudentShape

RESULTS = Path(__file__).parent / "results" / "student.json"
PACKAGES = ("torch", "transformers", "ncps")
HEADS, HEAD_SIZE = 4, 64
WIDTH = HEADS * HEAD_SIZE
LENGTHS = (256, 512, 1024, 2048, 4096)
LOOP_LENGTHS = (256, 512, 1024)
NCPS_LENGTHS = (256, 512)
NCPS_UNITS = 128
CONTEXTS = (64, 256, 1024, 4096)
PROMPT, VOCAB = 128, 1_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    case: str
    metric: str
    unit: str
    ours: float
    reference: float
    reference_name: str
    ratio: float
    bound: float | None


def compare(
    case: str, metric: str, unit: str, ours: float, reference: float, name: str, bound: float | None = None
) -> Row:
    row = Row(
        case=case,
        metric=metric,
        unit=unit,
        ours=round(ours, 3),
        reference=round(reference, 3),
        reference_name=name,
        ratio=round(reference / ours, 2),
        bound=bound,
    )
    verdict = "" if bound is None else f"bound {bound:g} {'held' if row.ratio >= bound else 'MISSED'}"
    print(
        f"{row.case:24} {row.metric:22} {row.ours:10.2f} {row.unit:6} {row.reference:10.2f} {row.reference_name:28} "
        f"{row.ratio:8.2f}x {verdict}",
        flush=True,
    )
    return row


def milliseconds(work: Callable[[], object], runs: int) -> float:
    work()
    spent = []
    for _ in range(runs):
        start = time.process_time()
        work()
        spent.append(time.process_time() - start)
    return 1e3 * sorted(spent)[len(spent) // 4]


def sequence_rows() -> Iterator[Row]:
    """Forward and backward over one sequence of hidden size 256, without projections."""
    gru = nn.GRU(WIDTH, WIDTH, batch_first=True)
    liquid = LTC(NCPS_UNITS, AutoNCP(NCPS_UNITS, NCPS_UNITS // 4))
    for steps in LENGTHS:
        query, key, value = (torch.randn(1, steps, HEADS, HEAD_SIZE, requires_grad=True) for _ in range(3))
        log_decay = (-2 * torch.rand(1, steps, HEADS, HEAD_SIZE)).requires_grad_()
        hidden = torch.randn(1, steps, WIDTH, requires_grad=True)
        runs = max(3, 4096 // steps)

        def trained(compute: Callable[[], Tensor], runs: int = runs) -> float:
            return milliseconds(lambda: compute().sum().backward(), runs)

        def attention(query: Tensor = query, key: Tensor = key, value: Tensor = value) -> Tensor:
            heads = (tensor.transpose(1, 2) for tensor in (query, key, value))
            return F.scaled_dot_product_attention(*heads, is_causal=True)

        inputs = (query, key, value, log_decay)
        ours = trained(lambda inputs=inputs: scan_chunked(*inputs)[0])
        case, metric = f"scan T={steps}", "forward + backward"
        if steps in LOOP_LENGTHS:
            loop = trained(lambda inputs=inputs: scan_naive(*inputs)[0], 3)
            yield compare(case, metric, "ms", ours, loop, "the same recurrence, looped", 4)
        yield compare(
            case, metric, "ms", ours, trained(attention), "causal SDPA", 1 if steps >= LOOP_LENGTHS[-1] else None
        )
        yield compare(case, metric, "ms", ours, trained(lambda hidden=hidden: gru(hidden)[0]), "nn.GRU 256")
        if steps in NCPS_LENGTHS:
            narrow = torch.randn(1, steps, NCPS_UNITS)
            ltc = trained(lambda narrow=narrow: liquid(narrow)[0], 1)
            yield compare(case, metric, "ms", ours, ltc, f"ncps LTC, {NCPS_UNITS} units", 20)


def decode_rows() -> Iterator[Row]:
    """One more token after a context, beside a decoder-only Transformer of the same width, depth and heads."""
    shape = StudentShape()
    student = build_student(shape, vocab_size=VOCAB, start_token_id=0, end_token_id=1, seed=0).eval()
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_hidden_layers=shape.decoder_layers,
            num_attention_heads=shape.heads,
            max_position_embeddings=max(CONTEXTS) + 64,
        )
    ).eval()
    prompt = torch.randint(VOCAB, (1, PROMPT))
    token = torch.randint(VOCAB, (1, 1))
    ours = {}
    with torch.inference_mode():
        for context in CONTEXTS:
            ids = torch.randint(VOCAB, (1, context))
            past = student(prompt, decoder_input_ids=ids, use_cache=True, logits_to_keep=1)
            encoded = student.get_encoder()(prompt)
            cache = past.past_key_values

            def ours_step(encoded=encoded, cache=cache) -> None:  # type: ignore[no-untyped-def]
                student(encoder_outputs=encoded, decoder_input_ids=token, past_key_values=cache, use_cache=True)

            llama_cache = llama(torch.cat([prompt, ids], 1), use_cache=True, logits_to_keep=1).past_key_values
            ours[context] = milliseconds(ours_step, 40)
            theirs = milliseconds(lambda cache=llama_cache: llama(token, past_key_values=cache, use_cache=True), 40)
            case = f"decode after {context}"
            yield compare(case, "time a token", "ms", ours[context], theirs, "Llama, same width, KV cache")
            own = sum(
                layer.recurrent_states[0].nbytes + layer.conv_states[0].nbytes
                for layer in cache.self_attention_cache.layers
            ) + sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.cross_attention_cache.layers)
            kept = sum(2 * shape.hidden_size * 4 * (PROMPT + context) for _ in range(shape.decoder_layers))
            yield compare(case, "state, prompt included", "kB", own / 1e3, kept / 1e3, "Llama, same width, KV cache")
    yield compare(
        f"decode after {CONTEXTS[-1]}",
        "time a token",
        "ms",
        ours[CONTEXTS[-1]],
        ours[CONTEXTS[0]],
        f"our own after {CONTEXTS[0]}",
        0.8,
    )


def commit() -> str:
    git = ["git", "-C", str(RESULTS.parent.parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = [asdict(row) for row in (*sequence_rows(), *decode_rows())]
    RESULTS.parent.mkdir(exist_ok=True)
    report = {
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, 1 thread",
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "commit": commit(),
        "clock": "CPU time of the process, lower quartile",
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
