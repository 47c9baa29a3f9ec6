"""One sample of a shard in words: its text, and at chosen positions what the teacher would have said and looked at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from shards.errors import InvalidRequest
from shards.record import AttentionSummary, Record
from shards.shard import ShardReader

Decode = Callable[[Sequence[int]], str]

ALTERNATIVES = 5
"""How many of the teacher's candidates are shown a position."""
POSITIONS = 8
"""How many positions are shown where none are chosen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """An id, and its text where that is known."""

    id: int
    text: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """A candidate for one position."""

    token: Token
    probability: float
    """The teacher's; where only draws are kept, their share."""
    draws: int | None
    """How often it was drawn; 0 for an exact id, None for selections without draws."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttendedKey:
    """A prompt token that the teacher looked at."""

    position: int
    token: Token
    weight: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerView:
    """Where one layer's heads looked on average, when it predicted a position."""

    layer: int
    sink: float
    prompt: float
    """Mass on the prompt, without the sink."""
    keys: tuple[AttendedKey, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PositionView:
    """One predicted token and what the teacher thought there."""

    position: int
    """Which token of the response."""
    token: Token
    coverage: float
    """Probability mass of the kept ids."""
    entropy: float
    alternatives: tuple[Alternative, ...]
    """The most probable ids."""
    attended: tuple[LayerView, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleView:
    """One sample; the texts are None where no `decode` was given."""

    row: int
    """Its row in its shard."""
    sample_id: str
    prompt: str | None
    response: str | None
    positions: tuple[PositionView, ...]


def view_sample(
    shard: ShardReader, row: int, *, decode: Decode | None, positions: Sequence[int] | None = None
) -> SampleView:
    """Decode a row. `positions` count response tokens; by default those of the highest entropy are shown.

    Raises Corrupt naming shard and row, InvalidRequest for a position without a prediction.
    """
    record = shard[row]
    first, last = record.first_position, record.first_position + record.positions - 1
    if positions is None:
        uncertain = np.sort(np.argsort(-record.entropy_N, kind="stable")[:POSITIONS])
        positions = (first + uncertain).tolist()
    if outside := [position for position in positions if not first <= position <= last]:
        raise InvalidRequest(
            f"the teacher predicted positions {first} to {last} of this sample, not {outside[0]}",
            hint="positions are response tokens, counted from 0",
        )
    say = _Speaker(decode)
    layers = shard.contract.attention.layers if shard.contract.attention is not None else ()
    return SampleView(
        row=row,
        sample_id=record.sample_id,
        prompt=say.text(record.prompt_ids_P.tolist()),
        response=say.text(record.response_ids_R.tolist()),
        positions=tuple(_position(record, position - first, layers, say) for position in positions),
    )


class _Speaker:
    def __init__(self, decode: Decode | None) -> None:
        self._decode = decode

    def text(self, ids: Sequence[int]) -> str | None:
        return None if self._decode is None else self._decode(ids)

    def token(self, id_: int) -> Token:
        return Token(id=id_, text=self.text([id_]))


def _position(record: Record, n: int, layers: Sequence[int], say: _Speaker) -> PositionView:
    position = record.first_position + n
    return PositionView(
        position=position,
        token=say.token(int(record.response_ids_R[position])),
        coverage=float(record.coverage_N[n]),
        entropy=float(record.entropy_N[n]),
        alternatives=_alternatives(record, n, say),
        attended=() if record.attention is None else _attended(record, record.attention, n, layers, say),
    )


def _alternatives(record: Record, n: int, say: _Speaker) -> tuple[Alternative, ...]:
    kept_K = record.ids_NK[n] >= 0
    ids_K = record.ids_NK[n][kept_K]
    draws_K = None if record.draws_NK is None else record.draws_NK[n][kept_K]
    if record.logprobs_NK is not None:
        probabilities_K = np.exp(record.logprobs_NK[n][kept_K].astype(np.float64))
    else:
        assert draws_K is not None, "a selection keeps log-probabilities or draws"
        probabilities_K = draws_K / draws_K.sum()
    best = np.argsort(-probabilities_K, kind="stable")[:ALTERNATIVES]
    return tuple(
        Alternative(
            token=say.token(int(ids_K[k])),
            probability=float(probabilities_K[k]),
            draws=None if draws_K is None else int(draws_K[k]),
        )
        for k in best
    )


def _attended(
    record: Record, attention: AttentionSummary, n: int, layers: Sequence[int], say: _Speaker
) -> tuple[LayerView, ...]:
    row = attention.sink_LN.shape[1] - record.positions + n  # rows of prompt positions, where kept, stand before
    return tuple(
        LayerView(
            layer=layer,
            sink=float(attention.sink_LN[index, row]),
            prompt=float(attention.prompt_LN[index, row]),
            keys=tuple(
                AttendedKey(position=key, token=say.token(int(record.prompt_ids_P[key])), weight=weight)
                for key, weight in zip(
                    attention.positions_LNM[index, row].tolist(),
                    attention.weights_LNM[index, row].tolist(),
                    strict=True,
                )
                if key >= 0
            ),
        )
        for index, layer in enumerate(layers)
    )
