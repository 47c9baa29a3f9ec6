"""One answer while it is being written, and what is said about each of its tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from stages.inference.sampling import Candidate
from stages.inference.settings import Sampling
from stages.inference.transcript import FinishReason, Transcript

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """One token of an answer, and what the model could have said in its place.

    Log-probabilities are natural, of the model's own distribution, before temperature and top_p.
    """

    token_id: int
    text: str
    logprob: float
    offset: int
    """Where in the answer's text it begins; of a token that goes on with a character, where that character does."""
    top: tuple[TokenLogprob, ...] = ()
    """The most probable tokens by falling probability; the chosen one may be among them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What one more token brought: text that can no longer change (often none), and the token itself."""

    text: str
    tokens: tuple[TokenLogprob, ...] = ()
    """The token with its log-probability where those were asked for; none for the end token."""
    finish_reason: FinishReason | None = None


class Answer:
    """A prompt, how its tokens are drawn, and what is written so far. `push` is called by whoever decodes it."""

    def __init__(self, prompt_ids: Sequence[int], sampling: Sampling, decode: Decode, end_token_id: int) -> None:
        self.prompt_ids = tuple(prompt_ids)
        self.sampling = sampling
        self.logprobs: list[TokenLogprob] = []
        self._transcript = Transcript(decode, end_token_id=end_token_id, stop=sampling.stop)
        self._decode = decode
        self._generator = torch.Generator().manual_seed(sampling.seed) if sampling.temperature else None

    @property
    def text(self) -> str:
        return self._transcript.text

    @property
    def token_ids(self) -> list[int]:
        """Without the end token."""
        return self._transcript.token_ids

    @property
    def finish_reason(self) -> FinishReason | None:
        """None while more tokens may come."""
        return self._transcript.finish_reason

    def uniform(self) -> float:
        """The random number of the next token, in [0, 1); 0 where nothing is drawn."""
        if self._generator is None:
            return 0.0
        return float(torch.rand((), generator=self._generator, dtype=torch.float64))

    def push(self, token_id: int, chosen: Candidate | None = None, top: Sequence[Candidate] = ()) -> Piece:
        """Take the next token."""
        before, offset = len(self.token_ids), self._transcript.characters
        text = self._transcript.push(token_id)
        written = self.token_ids[before:]
        if self.finish_reason is None and len(self.token_ids) == self.sampling.max_new_tokens:
            text += self._transcript.close("length")
        tokens: tuple[TokenLogprob, ...] = ()
        if chosen is not None and written:
            alternatives = tuple(self._token(candidate, offset) for candidate in top)
            tokens = (self._token(chosen, offset, alternatives),)
            self.logprobs += tokens
        return Piece(text=text, tokens=tokens, finish_reason=self.finish_reason)

    def _token(self, candidate: Candidate, offset: int, top: tuple[TokenLogprob, ...] = ()) -> TokenLogprob:
        text = self._decode([candidate.token_id])
        return TokenLogprob(token_id=candidate.token_id, text=text, logprob=candidate.logprob, offset=offset, top=top)
