"""The student in use: load a finished model and ask it.

    student = Student.load("runs/NAME/final_model")
    student.generate("How much is 6 x 7?")[0].text
    for piece in student.stream("How much is 6 x 7?"): ...

A prompt is one user message and passes through the same chat template as in training. The same call gives the same
answers; nothing here reads or moves a global random state. Streamed pieces joined are the text of `generate`.
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from stages.corpus.chat import read_thinking
from stages.corpus.rows import Message
from stages.corpus.tokenizer import ChatTokenizer, RefusedByTemplate
from stages.errors import StageError
from stages.inference.sampling import GumbelDraw, Sampling
from stages.inference.transcript import FinishReason, Transcript
from stages.student.config import MiniCodformerConfig
from stages.student.model import MiniCodformerForConditionalGeneration

BATCH = 32
"""Prompts answered at once; more are answered in turn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One answer."""

    text: str
    token_ids: tuple[int, ...]
    """Without the end token."""
    prompt_tokens: int
    finish_reason: FinishReason
    """"stop": the model ended the answer, or a stop string did. "length": it was cut at max_new_tokens."""


class Student:
    """A finished model with its tokenizer. Calls do not change it, so threads may share one."""

    def __init__(self, model: MiniCodformerForConditionalGeneration, tokenizer: ChatTokenizer) -> None:
        self._model = model.eval()
        self._tokenizer = tokenizer

    @classmethod
    def load(cls, path: Path | str, *, device: str | None = None) -> Student:
        """Read a model folder onto `device`, by default the GPU if there is one.

        Raises StageError where the folder is missing, damaged, or not a student.
        """
        folder = Path(path)
        _require_student(folder)
        tokenizer = ChatTokenizer.load(folder, thinking=read_thinking(folder))
        model = _load_model(folder)
        if tokenizer.vocab_size > model.config.vocab_size:
            raise StageError(
                f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model {model.config.vocab_size}",
                hint="the tokenizer files are another model's: export the student again",
            )
        model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return cls(model, tokenizer)

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        max_new_tokens: int = 160,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> list[Generation]:
        """Answer each prompt, in order. Raises ValueError for sampling values that mean nothing."""
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        return self.generate_from_ids(
            [self._prompt_ids(text) for text in texts],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop=stop,
        )

    def generate_from_ids(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int = 160,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> list[Generation]:
        """Answer prompts that are token ids already, chat template included. Raises ValueError."""
        sampling = _sampling(max_new_tokens, temperature, top_p, seed, stop)
        self._require_ids(prompts)
        answers: list[Generation] = []
        for start in range(0, len(prompts), BATCH):
            batch = prompts[start : start + BATCH]
            seeds = range(seed + start, seed + start + len(batch))
            transcripts = self._run(batch, sampling, seeds, lambda _: None, threading.Event())
            answers += [_generation(*pair) for pair in zip(batch, transcripts, strict=True)]
        return answers

    def stream(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 160,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> Iterator[str]:
        """The answer in pieces of whole characters, as they come. Closing the iterator ends the work."""
        sampling = _sampling(max_new_tokens, temperature, top_p, seed, stop)
        return self._pieces(self._prompt_ids(prompt), sampling)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of some ids, without the special tokens."""
        return self._tokenizer.decode(ids)

    def _prompt_ids(self, text: str) -> list[int]:
        try:
            (ids,) = self._tokenizer.encode_prompts([[Message(role="user", content=text)]])
        except RefusedByTemplate as error:
            raise ValueError(f"the chat template refuses this prompt: {error}") from error
        listed: list[int] = ids.tolist()
        return listed

    def _require_ids(self, prompts: Sequence[Sequence[int]]) -> None:
        for index, prompt in enumerate(prompts):
            if not prompt:
                raise ValueError(f"prompt {index} is empty")
            if not 0 <= min(prompt) <= max(prompt) < self._model.config.vocab_size:
                raise ValueError(f"prompt {index} holds an id outside the vocabulary")

    def _pieces(self, prompt: list[int], sampling: Sampling) -> Iterator[str]:
        """transformers pushes tokens where we are pulled for text: it runs in a thread of its own."""
        pieces: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()
        cancelled = threading.Event()

        def work() -> None:
            try:
                self._run([prompt], sampling, [sampling.seed], pieces.put, cancelled)
                pieces.put(None)
            except BaseException as error:
                pieces.put(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            while (piece := pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                if piece:
                    yield piece
        finally:
            cancelled.set()
            thread.join()

    @torch.inference_mode()
    def _run(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        on_text: Callable[[str], None],
        cancelled: threading.Event,
    ) -> list[Transcript]:
        config = self._model.config
        transcripts = [Transcript(self.decode, end_token_id=config.eos_token_id, stop=sampling.stop) for _ in prompts]
        ids_BP, mask_BP = _padded(prompts, config.pad_token_id)
        self._model.generate(
            input_ids=ids_BP.to(self._model.device),
            attention_mask=mask_BP.to(self._model.device),
            generation_config=GenerationConfig(
                max_new_tokens=sampling.max_new_tokens,
                do_sample=False,
                num_beams=1,
                pad_token_id=config.pad_token_id,
                eos_token_id=config.eos_token_id,
                decoder_start_token_id=config.decoder_start_token_id,
            ),
            logits_processor=LogitsProcessorList([GumbelDraw(sampling, seeds)] if sampling.temperature else []),
            stopping_criteria=StoppingCriteriaList([_Listener(transcripts, on_text, cancelled)]),
        )
        for transcript in transcripts:
            if transcript.finish_reason is None:
                on_text(transcript.close("length"))
        return transcripts


class _Listener(StoppingCriteria):
    """Writes each new token into its transcript; a row is done when its transcript is, or nobody listens any more."""

    def __init__(
        self, transcripts: Sequence[Transcript], on_text: Callable[[str], None], cancelled: threading.Event
    ) -> None:
        self._transcripts = transcripts
        self._on_text = on_text
        self._cancelled = cancelled

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:  # noqa: ARG002
        for transcript, token_id in zip(self._transcripts, input_ids[:, -1].tolist(), strict=True):
            if transcript.finish_reason is None:
                self._on_text(transcript.push(token_id))
        done = [self._cancelled.is_set() or row.finish_reason is not None for row in self._transcripts]
        return torch.tensor(done, device=input_ids.device)


def _sampling(max_new_tokens: int, temperature: float, top_p: float, seed: int, stop: Sequence[str]) -> Sampling:
    strings = (stop,) if isinstance(stop, str) else tuple(stop)
    return Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed, stop=strings)


def _generation(prompt: Sequence[int], transcript: Transcript) -> Generation:
    assert transcript.finish_reason is not None
    return Generation(
        text=transcript.text,
        token_ids=tuple(transcript.token_ids),
        prompt_tokens=len(prompt),
        finish_reason=transcript.finish_reason,
    )


def _padded(prompts: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Ids and mask, [B, P], padded on the right."""
    width = max(map(len, prompts))
    ids_BP = torch.full((len(prompts), width), pad_token_id)
    mask_BP = torch.zeros_like(ids_BP)
    for row, prompt in enumerate(prompts):
        ids_BP[row, : len(prompt)] = torch.tensor(prompt)
        mask_BP[row, : len(prompt)] = 1
    return ids_BP, mask_BP


def _require_student(folder: Path) -> None:
    hint = "name the final_model folder of a finished run"
    try:
        model_type = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    except FileNotFoundError as error:
        raise StageError(f"no model in {folder}: there is no config.json", hint=hint) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StageError(f"{folder / 'config.json'} cannot be read: {error!r}", hint=hint) from error
    if model_type != MiniCodformerConfig.model_type:
        raise StageError(f"{folder} holds a {model_type!r} model, not a student", hint=hint)


def _load_model(folder: Path) -> MiniCodformerForConditionalGeneration:
    hint = "the folder is damaged: copy it again, or run make distill, which writes it again"
    try:
        model, loaded = MiniCodformerForConditionalGeneration.from_pretrained(
            str(folder), local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # safetensors and transformers raise bare Exception for damaged files
        raise StageError(f"the student in {folder} cannot be read: {error}", hint=hint) from error
    wrong = sorted(
        {str(name) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in loaded[kind]}
    )
    if wrong:
        raise StageError(f"the weights in {folder} do not fit its config.json: {', '.join(wrong[:3])} …", hint=hint)
    student: MiniCodformerForConditionalGeneration = model
    return student
