"""One row of a shard: a sample's tokens and what the teacher said about them. Numpy only.

Shape suffixes used across the house:
    B batch   P prompt tokens   R response tokens   N predicted positions   T decoder positions
    K kept ids a position   V vocabulary   D hidden width   H heads   L layers   M attention positions kept
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSummary:
    """Head-mean attention rows of chosen teacher layers, reduced to what a student can match.

    Row n is the teacher row that predicts the n-th predicted position. Prompt keys are 1..P-1; key 0 is the
    attention sink and is kept apart. The mass of prompt keys that were not kept is `prompt - sum(weights)`.
    """

    positions_LNM: Int32
    """Key positions in 1..P-1 by falling weight; -1 where the prompt has fewer keys."""
    weights_LNM: Float32
    """Weight of each kept key; 0 where the position is -1."""
    sink_LN: Float32
    """Weight of key 0."""
    prompt_LN: Float32
    """Weight of all prompt keys 1..P-1, kept or not."""
    entropy_LN: Float32
    """Entropy of the whole head-mean row, in nats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A sample and its teacher signal.

    The N predicted positions are the response tokens `first_position .. first_position + N - 1`; row n holds the
    teacher's distribution for response token `first_position + n`, computed from everything before it.
    """

    sample_id: str
    prompt_ids_P: Int32
    response_ids_R: Int32
    first_position: int
    topk_ids_NK: Int32
    """The k most probable ids by falling log-probability (ties by rising id)."""
    topk_logprobs_NK: Float32
    """True log-probabilities in nats: the normaliser is the full softmax, never the kept ids."""
    log_tail_N: Float32
    """log of the mass outside the kept ids; -inf where nothing is left."""
    entropy_N: Float32
    """Entropy of the full distribution, in nats."""
    attention: AttentionSummary | None = None

    @property
    def positions(self) -> int:
        """N, the number of predicted positions."""
        return int(self.topk_ids_NK.shape[0])
