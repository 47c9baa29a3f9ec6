"""DistillKit's compressed log-probabilities: Parquet files beside the YAML that says how they were compressed.

A row of their Parquet (arcee-ai/DistillKit, `sample_common.py`, `compressed_logit_schema`) is one sample:

    input_ids            tokens
    compressed_logprobs  for each position, from the first, the bytes of its k log-probabilities, falling
    bytepacked_indices   for each position its k ids, ceil(log2 d) bits each, the highest bit first

The bytes of a position (`compression/monotonic_logprobs.py`): `exact_k` values in `exact_dtype`; the coefficients of a
fit of the others over `polynomial_terms` of their place 0, 1, …; for each of `residual_bins` a scale and whole numbers,
packed as ids are, which are added to the fit. With `delta_encoding` all are differences to the value before.

- What the layout loses is lost. Where a fit puts the sum of a position above 1, it is scaled to 1.
- A position predicts the token after it. `labels` of -100, where there are any, say which tokens are the prompt; else
  the first one is. A last token that only pads is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml  # type: ignore[import-untyped]
from numpy.typing import NDArray

from shards.record import Float32, Int32
from stages.errors import StageError

CONFIG_FILE = "compression_config.yaml"
COLUMNS = ("input_ids", "compressed_logprobs", "bytepacked_indices")
_DTYPES = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64")}
_NO_LABEL = -100


@dataclass(frozen=True, slots=True, kw_only=True)
class Bin:
    """So many residuals, of so many bits each under one scale."""

    scale: torch.dtype
    bits: int
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How positions were compressed: their `DistributionQuantizationConfig`."""

    index_bits: int
    k: int
    exact_k: int
    exact: torch.dtype
    terms: tuple[int | str, ...]
    """Powers of the place, "sqrt" or "exp"."""
    term: torch.dtype
    bins: tuple[Bin, ...]
    deltas: bool
    normalised: bool
    """Whether places run from 0 to 1."""

    @property
    def index_bytes(self) -> int:
        return -(-self.k * self.index_bits // 8)

    @property
    def logprob_bytes(self) -> int:
        bins = sum(each.scale.itemsize - (-each.count * each.bits // 8) for each in self.bins)
        return self.exact_k * self.exact.itemsize + len(self.terms) * self.term.itemsize + bins

    def decode(self, packed_NB: NDArray[np.uint8], indices_NB: NDArray[np.uint8]) -> tuple[Int32, Float32]:
        """Ids and log-probabilities [N, k] of positions, falling. Raises ValueError for bytes of another layout."""
        for name, array, width in (
            ("compressed_logprobs", packed_NB, self.logprob_bytes),
            ("bytepacked_indices", indices_NB, self.index_bytes),
        ):
            if array.ndim != 2 or array.shape[1] != width:
                raise ValueError(f"{name} has {array.shape[-1]} bytes a position, {CONFIG_FILE} says {width}")
        ids_NK = _whole_numbers(indices_NB, self.index_bits, self.k)
        logprobs_NK = self._logprobs(packed_NB)
        with np.errstate(invalid="ignore"):  # bytes that are no numbers are refused with the record
            total_N1 = np.logaddexp.reduce(logprobs_NK, axis=1, keepdims=True)
        logprobs_NK = logprobs_NK - total_N1.clip(min=0)
        order_NK = np.argsort(-logprobs_NK, axis=1, kind="stable")  # a fit may rise where the truth falls
        return (
            np.take_along_axis(ids_NK, order_NK, axis=1).astype(np.int32),
            np.take_along_axis(logprobs_NK, order_NK, axis=1).astype(np.float32),
        )

    def _logprobs(self, packed_NB: NDArray[np.uint8]) -> NDArray[np.float64]:
        rest = packed_NB
        exact_NE, rest = _taken(rest, self.exact, self.exact_k)
        coefficients_NT, rest = _taken(rest, self.term, len(self.terms))
        others_NO = torch.zeros(len(packed_NB), self.k - self.exact_k, dtype=torch.float64)
        if self.terms:  # in their precision, against which the residuals were taken
            others_NO += (self._terms_OT() * coefficients_NT.unsqueeze(-2)).sum(dim=-1).double()
        place = 0
        for each in self.bins:
            scale_N1, rest = _taken(rest, each.scale, 1)
            width = -(-each.count * each.bits // 8)
            levels = torch.from_numpy(_whole_numbers(rest[:, :width], each.bits, each.count)).double()
            centred = 2 * levels - 1 if each.bits == 1 else levels - 2 ** (each.bits - 1)
            others_NO[:, place : place + each.count] += centred * scale_N1.double()
            place, rest = place + each.count, rest[:, width:]
        values_NK = torch.cat([exact_NE.double(), others_NO], dim=-1)
        found: NDArray[np.float64] = (values_NK.cumsum(dim=-1) if self.deltas else values_NK).numpy()
        return found

    def _terms_OT(self) -> torch.Tensor:
        count = self.k - self.exact_k
        place_O = torch.linspace(0, 1, count, dtype=self.term) if self.normalised else torch.arange(count).to(self.term)
        named = {"sqrt": torch.sqrt, "exp": torch.exp}
        columns = [place_O**term if isinstance(term, int) else named[term](place_O) for term in self.terms]
        return torch.stack(columns, dim=-1)


def read_layout(folder: Path) -> Layout:
    """What compression_config.yaml of a folder says. Raises StageError where it is not there or says nothing known."""
    path = folder / CONFIG_FILE
    try:
        said: Mapping[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
        return _layout(said.get("logprob_compressor", said))
    except OSError as error:
        raise StageError(
            f"{path} cannot be read: {error.strerror}",
            hint="DistillKit writes it beside its Parquet; write down there how the files were compressed",
        ) from error
    except (yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StageError(
            f"{path} does not say how log-probabilities were compressed: {error!r}",
            hint="it must be DistillKit's configuration of its compressor: d, k, exact_k, …",
        ) from error


def _layout(said: Mapping[str, Any]) -> Layout:
    bins = tuple(
        Bin(scale=_DTYPES[each["scale_dtype"]], bits=int(each["element_bits"]), count=int(each["num_elements"]))
        for each in said["residual_bins"]
    )
    layout = Layout(
        index_bits=math.ceil(np.log2(np.float32(said["d"]))),  # in single precision, as there
        k=int(said["k"]),
        exact_k=int(said["exact_k"]),
        exact=_DTYPES[said.get("exact_dtype", "float32")],
        terms=tuple(said.get("polynomial_terms") or ()),
        term=_DTYPES[said.get("term_dtype", "float32")],
        bins=bins,
        deltas=bool(said.get("delta_encoding", True)),
        normalised=bool(said.get("normalize_t", False)),
    )
    if not 0 <= layout.exact_k <= layout.k or not 1 <= layout.k <= said["d"] or not 1 <= layout.index_bits <= 31:
        raise ValueError(f"d {said['d']}, k {layout.k}, exact_k {layout.exact_k}")
    if sum(each.count for each in bins) > layout.k - layout.exact_k or any(not 1 <= each.bits <= 52 for each in bins):
        raise ValueError("residual_bins hold more than is left of k")
    if any(not isinstance(term, int) and term not in ("sqrt", "exp") for term in layout.terms):
        raise ValueError(f"polynomial_terms {layout.terms}")
    return layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One sample: position n of [N, k] predicts response token n."""

    prompt_ids_P: Int32
    response_ids_R: Int32
    ids_NK: Int32
    logprobs_NK: Float32


def read_row(found: Mapping[str, Any], layout: Layout, *, pad_id: int) -> Row:
    """A row of their Parquet. Raises ValueError for one that cannot be used, and says why."""
    if np.max(found.get("attention_mask") or [0]) > 1:
        raise ValueError("several samples are packed into the row: import what they were packed from")
    tokens = np.asarray(found["input_ids"]).astype(np.int32)
    packed_NB, indices_NB = (np.asarray(found[name], np.uint8) for name in COLUMNS[1:])
    if not len(tokens):
        raise ValueError("there are no tokens")
    if not len(packed_NB) == len(indices_NB) <= len(tokens):
        raise ValueError(f"{len(tokens)} tokens, {len(packed_NB)} and {len(indices_NB)} positions")
    tokens = tokens[: len(packed_NB) + 1]
    if tokens[-1] == pad_id:
        tokens = tokens[:-1]
    prompt = _prompt_length(found.get("labels"), len(tokens))
    if not 1 <= prompt < len(tokens):
        raise ValueError(f"{len(tokens)} tokens, of which {prompt} are the prompt: no response is left")
    rows = slice(prompt - 1, len(tokens) - 1)
    ids_NK, logprobs_NK = layout.decode(packed_NB[rows], indices_NB[rows])
    return Row(prompt_ids_P=tokens[:prompt], response_ids_R=tokens[prompt:], ids_NK=ids_NK, logprobs_NK=logprobs_NK)


def _prompt_length(labels: Any, tokens: int) -> int:
    """Tokens before the first that has a label; at least one."""
    if labels is None:
        return 1
    labelled = np.flatnonzero(np.asarray(labels, np.int64)[:tokens] != _NO_LABEL)
    return max(1, int(labelled[0])) if len(labelled) else tokens


def _taken(packed_NB: NDArray[np.uint8], dtype: torch.dtype, count: int) -> tuple[torch.Tensor, NDArray[np.uint8]]:
    """The first `count` numbers of each position, and the bytes after them."""
    width = count * dtype.itemsize
    numbers = torch.from_numpy(packed_NB[:, :width].copy()).view(dtype) if count else torch.zeros(len(packed_NB), 0)
    return numbers, packed_NB[:, width:]


def _whole_numbers(packed_NB: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.int64]:
    """[N, count] of so many bits each, the highest first."""
    unpacked = np.unpackbits(packed_NB, axis=1, count=bits * count).reshape(len(packed_NB), count, bits)
    numbers: NDArray[np.int64] = unpacked.astype(np.int64) @ (1 << np.arange(bits - 1, -1, -1, dtype=np.int64))
    return numbers
