"""A real teacher small enough to be known in full: SmolLM2-135M-Instruct over its most frequent ids of Wikipedia.

Its softmax runs over those 4,096 ids alone. It continues stretches of BoolQ's passages that hold no others; all that it
says about its own responses is kept: whole distributions in fp16, and the attention of three layers. Each batch is two
files under data/, made where they are missing: a run that was stopped goes on where it was.

    python -m benchmarks.quality_teacher
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from benchmarks.teacher_logits import FOLDER, LAYERS, TEACHER, TOP_M, wikipedia
from pipeline.assets import teacher_folder
from shards.record import AttentionSummary
from stages.events import silent
from stages.teacher_cache.signals import summarise_attention
from stages.teacher_cache.teacher import head_components

VOCAB, PROMPT, RESPONSE = 4_096, 32, 64
START, END = 0, 1
"""Of the restricted vocabulary: SmolLM2's <|endoftext|> (0) and <|im_end|> (2); the others follow by frequency."""
BATCH = 128
DEV_BATCHES, TRAIN_BATCHES = 1, 3
HOME = FOLDER / "quality"


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """A prompt, what the teacher answered, and all that it thought while it did so."""

    prompt_ids_P: NDArray[np.int32]
    response_ids_R: NDArray[np.int32]
    attention: AttentionSummary
    logprobs_NV: NDArray[np.float16]

    def whole(self) -> Tensor:
        """[N, V] log-probabilities in fp32: the teacher of this benchmark is what fp16 leaves of it, renormalised."""
        return torch.from_numpy(np.asarray(self.logprobs_NV)).float().log_softmax(-1)


def responses(split: str) -> list[Response]:
    """Of "train" or "dev"; distributions stay on disk until they are looked at."""
    first, count = (0, DEV_BATCHES) if split == "dev" else (DEV_BATCHES, TRAIN_BATCHES)
    return [response for number in range(first, first + count) for response in _batch(number)]


def head_components_VD() -> NDArray[np.float32]:
    """The teacher's output layer in its principal directions, from which students start as they do in the product."""
    return np.asarray(np.load(HOME / "head_components.npy"))


class RestrictedTeacher:
    """SmolLM2 with the rows of its tied embedding that belong to the vocabulary; its body in bf16, its head in fp32."""

    def __init__(self) -> None:
        folder = teacher_folder(TEACHER, None, silent)
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        whole: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, attn_implementation="eager"
        ).eval()
        rows_VD = whole.get_input_embeddings().weight.detach()[torch.from_numpy(self.vocabulary).long()].clone()
        whole.set_input_embeddings(nn.Embedding.from_pretrained(rows_VD))
        self.body = whole.model
        self.head_VD = rows_VD.float()

    @cached_property
    def _passages(self) -> list[list[int]]:
        return [self._tokenizer(text)["input_ids"] for text in wikipedia()]

    @cached_property
    def vocabulary(self) -> NDArray[np.int32]:
        """SmolLM2's id of each id, [V]."""
        path = HOME / "vocabulary.npy"
        if not path.exists():
            counts = Counter(token for passage in self._passages for token in passage if token not in (0, 2))
            ids = [0, 2, *(token for token, _ in counts.most_common(VOCAB - 2))]
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, np.array(ids, np.int32))
        return np.asarray(np.load(path))

    def prompts(self) -> Iterator[NDArray[np.int32]]:
        """Of each passage the first PROMPT ids in a row that are all in the vocabulary, where there are so many."""
        place = {int(token): number for number, token in enumerate(self.vocabulary)}
        for passage in self._passages:
            ids = np.array([place.get(token, -1) for token in passage])
            inside = np.convolve(ids >= 0, np.ones(PROMPT, int), "valid") == PROMPT
            if len(ids) >= PROMPT and inside.any():
                start = int(inside.argmax())
                yield ids[start : start + PROMPT].astype(np.int32)

    @torch.inference_mode()
    def answer(self, prompt_ids_BP: Tensor, seed: int) -> dict[str, NDArray[Any]]:
        """Sample RESPONSE tokens for each prompt; every distribution and attention row on the way."""
        generator, cache = torch.Generator().manual_seed(seed), DynamicCache()
        fed_BT, tokens, logprobs, attentions = prompt_ids_BP, [], [], []
        for _ in range(RESPONSE):
            output = self.body(fed_BT, past_key_values=cache, use_cache=True, output_attentions=True)
            logits_BV = output.last_hidden_state[:, -1].float() @ self.head_VD.T
            logprobs.append(logits_BV.log_softmax(-1).half())
            # From what was kept, not from what was computed: then the kept distribution is that of the draw.
            fed_BT = torch.multinomial(logprobs[-1].float().softmax(-1), 1, generator=generator)
            tokens.append(fed_BT[:, 0])
            means = torch.stack([output.attentions[layer][:, :, -1].float().mean(1) for layer in LAYERS])
            summary = summarise_attention(means.flatten(0, 1), PROMPT, TOP_M)
            attentions.append([part.unflatten(0, (len(LAYERS), -1)) for part in summary])
        names = ("positions_LBNM", "weights_LBNM", "sink_LBN", "prompt_LBN", "entropy_LBN")
        parts = {
            name: torch.stack(part, 2).numpy() for name, part in zip(names, zip(*attentions, strict=True), strict=True)
        }
        return {
            "prompt_ids_BP": prompt_ids_BP.int().numpy(),
            "response_ids_BR": torch.stack(tokens, 1).int().numpy(),
            "logprobs_BNV": torch.stack(logprobs, 1).numpy(),
            **parts,
        }

    @torch.inference_mode()
    def live(self, response: Response) -> Tensor:
        """The distributions of a response computed anew, [N, V] log-probabilities in fp32: nothing is cached.

        In one pass, as a teacher at hand would. `answer` fed token by token, and what it said was kept in fp16.
        """
        ids = torch.from_numpy(np.concatenate([response.prompt_ids_P, response.response_ids_R[:-1]])).long()
        rows_ND = self.body(ids[None]).last_hidden_state[0, len(response.prompt_ids_P) - 1 :]
        return (rows_ND.float() @ self.head_VD.T).log_softmax(-1)


def _batch(number: int) -> Iterator[Response]:
    """The responses of one batch; a response ends behind the first END in it."""
    paths = _paths(number)
    if not all(path.exists() for path in paths):
        raise SystemExit("the teacher has not answered yet: python -m benchmarks.quality_teacher")
    logprobs_BNV = np.load(paths[0], mmap_mode="r")
    with np.load(paths[1]) as arrays:
        parts = dict(arrays)
    # Attention of a bf16 body sums to 1 within its rounding; a summary may not exceed 1.
    excess_LBN = np.maximum(parts["sink_LBN"] + parts["prompt_LBN"], 1)
    parts |= {name: parts[name] / excess_LBN for name in ("sink_LBN", "prompt_LBN")}
    parts["weights_LBNM"] = parts["weights_LBNM"] / excess_LBN[..., None]
    for row, response_ids_R in enumerate(parts["response_ids_BR"]):
        ends = np.flatnonzero(response_ids_R == END)
        length = int(ends[0]) + 1 if ends.size else RESPONSE
        yield Response(
            prompt_ids_P=parts["prompt_ids_BP"][row],
            response_ids_R=response_ids_R[:length],
            logprobs_NV=logprobs_BNV[row, :length],
            attention=AttentionSummary(
                positions_LNM=parts["positions_LBNM"][:, row, :length],
                weights_LNM=parts["weights_LBNM"][:, row, :length],
                sink_LN=parts["sink_LBN"][:, row, :length],
                prompt_LN=parts["prompt_LBN"][:, row, :length],
                entropy_LN=parts["entropy_LBN"][:, row, :length],
            ),
        )


def _paths(number: int) -> tuple[Path, Path]:
    return HOME / f"logprobs-{number:03}.npy", HOME / f"rest-{number:03}.npz"


def main() -> None:
    total = DEV_BATCHES + TRAIN_BATCHES
    if all(path.exists() for number in range(total) for path in _paths(number)):
        return
    torch.set_flush_denormal(True)
    teacher = RestrictedTeacher()
    np.save(HOME / "head_components.npy", head_components(teacher.head_VD, teacher.head_VD.shape[1]).numpy())
    prompts = list(dict.fromkeys(tuple(prompt.tolist()) for prompt in teacher.prompts()))
    prompts_BTP = torch.tensor(prompts)[torch.randperm(len(prompts), generator=torch.Generator().manual_seed(0))]
    print(f"{len(prompts)} prompts")
    for number in range(total):
        logprobs_path, rest_path = _paths(number)
        if not rest_path.exists():
            found = teacher.answer(prompts_BTP[number * BATCH : (number + 1) * BATCH], seed=number)
            np.save(logprobs_path, found.pop("logprobs_BNV"))
            made = rest_path.with_suffix(".tmp")  # last and under another name: where it is, the batch is whole
            with made.open("wb") as file:
                np.savez(file, **found)
            made.replace(rest_path)
        print(f"{number + 1} of {total} batches", flush=True)


if __name__ == "__main__":
    main()
