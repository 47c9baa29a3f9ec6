"""A served student under load, beside the same student answering one prompt at a time through `generate`.

The server is a process of its own (`cli.py serve`), the load comes from here over loopback: prompts of 128 to 512
tokens, 64 new tokens each, greedy and streamed. Closed loop: each of 32 clients asks again as soon as it is answered.
Open loop: requests arrive at random (Poisson) at four fifths of the rate that the closed loop reached. Between the
rounds `generate` answers prompts of the same kind in this process, while the server idles. The student has the shape
and vocabulary of the demo's and random weights, for what it says does not matter here; but it never ends an answer
early, nor writes a token that is no text by itself, which a stream would hold back.

Prints a table and writes results/serving.json. Throughputs are medians over rounds; `bound` of the ratio is what the
project asks for, and of the time to the first token one second.

    python -m benchmarks.serving [--quick]
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.record import Row, compare, parser, write
from benchmarks.teacher_logits import TEACHER
from pipeline.assets import teacher_folder
from stages.corpus.chat import CHAT_FILE, chat_document
from stages.corpus.tokenizer import ChatTokenizer
from stages.events import silent
from stages.inference.generate import Student
from stages.inference.stepping import advance, encode, fresh
from stages.student.model import build_student
from stages.student.shape import StudentShape

CLIENTS, REQUESTS_EACH = 32, 2
ROUNDS, QUICK_ROUNDS = 3, 1
PROMPT_TOKENS, NEW_TOKENS = (128, 512), 64
ALONE = 4
"""Prompts that `generate` answers between two rounds."""
ARRIVALS = 0.8
"""Of the closed loop's rate."""
ROOT = Path(__file__).parent.parent


@dataclass(frozen=True, slots=True)
class Answered:
    """One request; seconds from its sending."""

    first_token: float
    whole: float
    tokens: int


class Prompts:
    """Never the same twice, so that no prompt is found encoded."""

    def __init__(self, vocab_size: int) -> None:
        self._random = random.Random(0)
        self._vocab_size = vocab_size

    def next(self) -> list[int]:
        return [self._random.randrange(3, self._vocab_size) for _ in range(self._random.randint(*PROMPT_TOKENS))]


def save_student(folder: Path) -> None:
    """The demo's student before its training, with tokens that are all text and the tokenizer of the demo's teacher."""
    teacher = teacher_folder(TEACHER, None, silent)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (teacher / name).exists():
            (folder / name).write_bytes((teacher / name).read_bytes())
    (folder / CHAT_FILE).write_bytes(chat_document(thinking=True))
    tokenizer = ChatTokenizer.load(folder)
    student = build_student(
        StudentShape(),
        vocab_size=tokenizer.vocab_size,
        start_token_id=tokenizer.start_token_id,
        end_token_id=tokenizer.end_token_id,
        seed=0,
    )
    texts = [tokenizer.decode([token_id]) for token_id in range(tokenizer.vocab_size)]
    with torch.no_grad():  # a score of 0 is never the highest of 49,152
        student.output_weight()[[not text or "\ufffd" in text for text in texts]] = 0
    student.save_pretrained(folder)


@contextmanager
def server(folder: Path) -> Iterator[tuple[str, int]]:
    """Host and port of a server of this student."""
    command = [sys.executable, str(ROOT / "cli.py"), "serve", "--port", "0", "--queue", "256", f"bench={folder}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"at http://([\d.]+):(\d+) ", process.stdout.readline())
            assert found, "the server did not start"
            yield found[1], int(found[2])
        finally:
            process.terminate()


async def ask(address: tuple[str, int], prompt: Sequence[int]) -> Answered:
    """One streamed request, read without any client library: the load must not be the load generator's."""
    body = json.dumps(
        {
            "model": "bench",
            "prompt": prompt,
            "max_tokens": NEW_TOKENS,
            "temperature": 0,
            "stream": True,
            "logprobs": None,
        }
    ).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {address[0]}\r\nContent-Type: application/json\r\n"
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection(*address)
    writer.write(f"{head}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    first = None
    status = await reader.readline()
    assert b" 200 " in status, status
    while line := await reader.readline():
        if line.startswith(b"data: {"):
            first = first or time.perf_counter() - began
            assert b'"error"' not in line, line
        elif line.startswith(b"data: [DONE]"):
            break
    whole = time.perf_counter() - began
    writer.close()
    assert first is not None
    return Answered(first, whole, NEW_TOKENS)


async def closed_loop(address: tuple[str, int], prompts: Prompts) -> tuple[list[Answered], float]:
    """All clients begin at once."""

    async def client(asked: list[list[int]]) -> list[Answered]:
        return [await ask(address, prompt) for prompt in asked]

    wanted = [[prompts.next() for _ in range(REQUESTS_EACH)] for _ in range(CLIENTS)]
    began = time.perf_counter()
    answered = await asyncio.gather(*map(client, wanted))
    seconds = time.perf_counter() - began
    # By turns: first what all clients asked together at the beginning.
    return [several[turn] for turn in range(REQUESTS_EACH) for several in answered], seconds


async def poisson(address: tuple[str, int], prompts: Prompts, rate: float, count: int) -> list[Answered]:
    """`count` requests at `rate` a second, whether or not earlier ones are answered."""
    asked = []
    for gap in [random.Random(count).expovariate(rate) for _ in range(count)]:
        asked.append(asyncio.create_task(ask(address, prompts.next())))
        await asyncio.sleep(gap)
    return list(await asyncio.gather(*asked))


def alone(student: Student, prompts: Prompts) -> tuple[float, float]:
    """Tokens a second, and seconds to an answer's first token, of one prompt after the other."""
    rates, firsts = [], []
    for _ in range(ALONE):
        prompt = prompts.next()
        began = time.perf_counter()
        (generation,) = student.generate_from_ids([prompt], max_new_tokens=NEW_TOKENS)
        rates.append(len(generation.token_ids) / (time.perf_counter() - began))
        began = time.perf_counter()
        student.generate_from_ids([prompt], max_new_tokens=1)
        firsts.append(time.perf_counter() - began)
    return statistics.median(rates), statistics.median(firsts)


def best_ratio(student: Student, prompts: Prompts) -> float:
    """What the ratio could be if nothing but the model took time: from the times of prefill and of steps."""

    def milliseconds(rows: int) -> tuple[float, float]:
        asked = [prompts.next() for _ in range(rows)]
        began = time.perf_counter()
        state = fresh(student.model, encode(student.model, asked))
        prefill = time.perf_counter() - began
        steps = []
        for _ in range(12):
            began = time.perf_counter()
            advance(student.model, [5] * rows, state)
            steps.append(time.perf_counter() - began)
        return 1e3 * prefill / rows, 1e3 * statistics.median(steps)

    prefill, one = (statistics.median(times) for times in zip(*(milliseconds(1) for _ in range(5)), strict=True))
    prefill_32, many = milliseconds(CLIENTS)
    print(f"a step of 1 row takes {one:.1f} ms, of {CLIENTS} rows {many:.1f} ms; a prompt's prefill {prefill:.1f} ms")
    return (one + prefill / NEW_TOKENS) / (many / CLIENTS + prefill_32 / NEW_TOKENS)


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, round(share * len(values)))]


def measure(folder: Path, rounds: int) -> Iterator[Row]:
    student = Student.load(folder, device="cpu")
    prompts = Prompts(student.model.config.vocab_size)
    closed: list[Answered] = []
    under_way: list[Answered] = []
    rates, alone_rates, alone_firsts, ceilings = [], [], [], []
    with server(folder) as address:
        asyncio.run(poisson(address, prompts, rate=50, count=4))  # what is done once, is done now
        for _ in range(rounds):
            rate, first = alone(student, prompts)
            alone_rates.append(rate)
            alone_firsts.append(first)
            ceilings.append(best_ratio(student, prompts))
            answered, seconds = asyncio.run(closed_loop(address, prompts))
            closed += answered
            under_way += answered[CLIENTS:]
            rates.append(sum(one.tokens for one in answered) / seconds)
            print(f"alone {rate:.0f} tokens/s, {CLIENTS} clients {rates[-1]:.0f} tokens/s", flush=True)
        ours, single = statistics.median(rates), statistics.median(alone_rates)
        arrivals = ARRIVALS * ours / NEW_TOKENS
        opened = asyncio.run(poisson(address, prompts, arrivals, count=CLIENTS * REQUESTS_EACH))
    ceiling, name = statistics.median(ceilings), "generate, one prompt at a time"
    case = f"closed loop, {CLIENTS} clients"
    yield compare(case, "throughput", "tokens/s", ours, single, name, bound=6, more_is_better=True)
    yield compare(
        case, "throughput", "tokens/s", ours, ceiling * single, "the model alone, no server", more_is_better=True
    )
    firsts = [one.first_token for one in under_way]
    yield compare(case, "first token, p95, under way", "s", percentile(firsts, 0.95), 1.0, "one second", bound=1)
    for load, answered in ((case, closed), ("open loop, Poisson", opened)):
        firsts = [one.first_token for one in answered]
        yield compare(
            load, "first token, median", "s", statistics.median(firsts), statistics.median(alone_firsts), name
        )
        yield compare(load, "first token, p95", "s", percentile(firsts, 0.95), 1.0, "one second", bound=1)
        yield compare(
            load,
            "whole answer, median",
            "s",
            statistics.median(one.whole for one in answered),
            NEW_TOKENS / single,
            name,
        )


def main() -> None:
    quick: bool = parser(__doc__).parse_args().quick
    with tempfile.TemporaryDirectory() as folder:
        save_student(Path(folder))
        rows = list(measure(Path(folder), QUICK_ROUNDS if quick else ROUNDS))
    write(
        "serving",
        rows,
        clock="wall time; medians over rounds in which server and generate take turns; "
        f"the machine's load was {os.getloadavg()[1]:.1f}",
        packages=("torch", "transformers", "fastapi", "uvicorn"),
        threads=torch.get_num_threads(),
        quick=quick,
    )


if __name__ == "__main__":
    main()
