"""Encoded prompts, kept for when they come again: the least recently used ones make room for new ones."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from stages.inference.stepping import EncodedPrompt, encode
from stages.student.model import MiniCodformerForConditionalGeneration

DEFAULT_BYTES = 256 << 20


class PromptCache:
    """Not for several threads at once."""

    def __init__(self, model: MiniCodformerForConditionalGeneration, capacity: int = DEFAULT_BYTES) -> None:
        self._model = model
        self._capacity = capacity
        self._encoded: OrderedDict[tuple[int, ...], EncodedPrompt] = OrderedDict()
        self.bytes = 0
        self.hits = 0
        self.misses = 0

    def __contains__(self, prompt: tuple[int, ...]) -> bool:
        return prompt in self._encoded

    def encoded(self, prompts: Sequence[tuple[int, ...]]) -> list[EncodedPrompt]:
        """Each prompt's encoding; what is not at hand is computed, once for equal prompts."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._encoded]
        new = dict(zip(missing, encode(self._model, missing), strict=True))
        self.misses += len(missing)
        self.hits += len(prompts) - len(missing)
        found = [new[prompt] if prompt in new else self._encoded[prompt] for prompt in prompts]
        for prompt in prompts:
            if prompt in self._encoded:
                self._encoded.move_to_end(prompt)
            elif new[prompt].bytes <= self._capacity:
                self._encoded[prompt] = new[prompt]
                self.bytes += new[prompt].bytes
        while self.bytes > self._capacity:
            _, oldest = self._encoded.popitem(last=False)
            self.bytes -= oldest.bytes
        return found
