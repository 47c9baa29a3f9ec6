"""Records of every selection from the teacher's passages, for the codec to be measured on, and synthetic ones.

Synthetic ones (V = 151,936) have the rank curves, tails and entropies of real positions, and ids from a seeded noisy
Zipf law, whose noise is such that the 1,024 most frequent ids have their real share. Their label has the rank that it
has at the real position.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from benchmarks.peer_layouts import K
from benchmarks.teacher_logits import NODES, Passage
from shards.contract import Contract, Selection
from shards.planes.codec import Planes3
from shards.record import AttentionSummary, Record

VOCAB, WIDE_VOCAB = 49_152, 151_936
FREQUENT = 1_024


def contract_of(selection: Selection, vocab_size: int = VOCAB, **fields: object) -> Contract:
    text = ("teacher", "teacher_fingerprint", "tokenizer_fingerprint", "corpus_fingerprint", "engine", "dtype")
    given = dict.fromkeys(text, "") | {"codec": Planes3.name, "start_token_id": 0, "end_token_id": 0, "attention": None}
    return Contract(selection=selection, vocab_size=vocab_size, **(given | fields))  # type: ignore[arg-type]


def record_of(passage: Passage, kept_NC: NDArray[np.bool_], **fields: object) -> Record:
    """A record with the first ids of each position; the others are its tail."""
    width = int(kept_NC.sum(axis=1).max())
    logs_NC = passage.logprobs_NC.astype(np.float64)
    left_NC = np.where(kept_NC, -np.inf, logs_NC)
    log_tail_N = np.logaddexp(np.logaddexp.reduce(left_NC, axis=1), passage.log_rest_N)
    return Record(
        sample_id="",
        prompt_ids_P=passage.prompt_ids_P,
        response_ids_R=passage.response_ids_R,
        first_position=0,
        ids_NK=np.where(kept_NC, passage.ids_NC, -1)[:, :width],
        logprobs_NK=np.where(kept_NC, passage.logprobs_NC, np.float32(-np.inf))[:, :width],
        log_tail_N=log_tail_N.astype(np.float32),
        entropy_N=passage.entropy_N,
        **fields,  # type: ignore[arg-type]
    )


def topk(passage: Passage, k: int = K) -> Record:
    return record_of(passage, _first(passage, k))


def with_curve(passage: Passage) -> Record:
    logs_NC = np.where(_first(passage, K), -np.inf, passage.logprobs_NC.astype(np.float64))
    values, slopes = [], []
    for node, (b, rest_N) in enumerate(zip(NODES, passage.rest_curve_NJ.T[: len(NODES)], strict=True)):
        value_N = np.logaddexp(np.logaddexp.reduce(b * logs_NC, axis=1), rest_N)
        shares_NC = np.exp(b * logs_NC - value_N[:, None])
        slope_N = (shares_NC * np.maximum(logs_NC, -1e4)).sum(axis=1)
        slopes.append(slope_N + np.exp(rest_N - value_N) * passage.rest_curve_NJ[:, len(NODES) + node])
        values.append(value_N)
    return dataclasses.replace(topk(passage), curve_NJ=np.stack([*values, *slopes], axis=1).astype(np.float32))


def with_attention(passage: Passage) -> Record:
    sink_LN, prompt_LN, entropy_LN = passage.attention_scalars_3LN
    attention = AttentionSummary(
        positions_LNM=passage.attention_positions_LNM,
        weights_LNM=passage.attention_weights_LNM,
        sink_LN=sink_LN,
        prompt_LN=prompt_LN,
        entropy_LN=entropy_LN,
    )
    return dataclasses.replace(topk(passage), attention=attention)


def adaptive(selection: Selection) -> Callable[[Passage], Record]:
    def record(passage: Passage) -> Record:
        probs_NC = np.exp(passage.logprobs_NC.astype(np.float64))
        kept_NC = (probs_NC.cumsum(axis=1) - probs_NC < selection.mass) & (probs_NC >= selection.floor)
        kept_NC[:, 0] = True
        return record_of(passage, kept_NC & _first(passage, selection.k))

    return record


def sampled(draws: int) -> Callable[[Passage], Record]:
    def record(passage: Passage) -> Record:
        ids_NK, counts_NK = np.full((2, len(passage.draws_ND), draws), (-1,), np.int32)
        counts_NK[:] = 0
        for row, drawn in enumerate(passage.draws_ND[:, :draws]):
            ids, counts = np.unique(drawn, return_counts=True)
            order = np.lexsort((ids, -counts))
            ids_NK[row, : len(ids)], counts_NK[row, : len(ids)] = ids[order], counts[order]
        bare = record_of(passage, _first(passage, 1))
        none_N = np.zeros(len(ids_NK), np.float32)
        return dataclasses.replace(bare, ids_NK=ids_NK, logprobs_NK=None, draws_NK=counts_NK, log_tail_N=none_N)

    return record


def _first(passage: Passage, k: int) -> NDArray[np.bool_]:
    return np.broadcast_to(np.arange(passage.ids_NC.shape[1]) < k, passage.ids_NC.shape).copy()


def synthetic(real: Sequence[Record], taught: Sequence[Record]) -> list[Record]:
    """Records of V = 151,936: real values, ids of the largest scores under a noisy Zipf law."""
    rng = np.random.default_rng(0)
    kept = np.concatenate([record.ids_NK.ravel() for record in taught])
    share = np.sort(np.bincount(kept))[-FREQUENT:].sum() / kept.size
    law_V = -np.log(np.arange(WIDE_VOCAB, dtype=np.float32) + 2.7)
    shuffled = rng.permutation(WIDE_VOCAB).astype(np.int32)

    def draw(count: int, noise: float) -> NDArray[np.int32]:
        scores = law_V + np.float32(noise) * rng.standard_normal((count, WIDE_VOCAB), dtype=np.float32)
        top = np.argpartition(scores, -K, axis=1)[:, -K:]
        order = np.argsort(-np.take_along_axis(scores, top, 1), axis=1)
        return np.take_along_axis(top, order, 1).astype(np.int32)

    low, high = 0.1, 6.0
    for _ in range(8):
        noise = (low + high) / 2
        low, high = (noise, high) if (draw(60, noise) < FREQUENT).mean() > share else (low, noise)
    found = []
    for record in real:
        ranks_NK = np.concatenate([draw(min(64, record.positions - at), low) for at in range(0, record.positions, 64)])
        ids_NK = shuffled[ranks_NK]
        is_label_NK = record.ids_NK == record.labels_N[:, None]
        labels_N = np.where(is_label_NK.any(axis=1), (ids_NK * is_label_NK).sum(axis=1), _absent(ids_NK))
        found.append(dataclasses.replace(record, ids_NK=ids_NK, response_ids_R=labels_N.astype(np.int32)))
    return found


def _absent(ids_NK: NDArray[np.int32]) -> NDArray[np.intp]:
    """For each row the least id that it has not."""
    taken_NC = np.zeros((len(ids_NK), K + 1), bool)
    rows, places = np.nonzero(ids_NK <= K)
    taken_NC[rows, ids_NK[rows, places]] = True
    return (~taken_NC).argmax(axis=1)
