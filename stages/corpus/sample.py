"""One training example as token ids: what leaves the corpus and enters the teacher."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A prompt, rendered up to the point where the answer begins, and the answer."""

    sample_id: str
    """16 hex digits that depend on the text alone."""
    prompt_ids: NDArray[np.int32]
    """[P], P >= 1: the chat template with its generation prompt."""
    response_ids: NDArray[np.int32]
    """[R], R >= 1: closed by the end token, unless the length limit cut it."""
