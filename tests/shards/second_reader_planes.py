"""Sections 8 to 11 of FORMAT.md, codec `planes/3`, read without `shards`, number by number."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import zstandard

from tests.shards.second_reader_topk import number, planes


class Planes:
    """Sections 8 to 11, number by number."""

    def __init__(self, contract: dict[str, Any], tables: bytes) -> None:
        assert hashlib.sha256(tables).hexdigest() == contract["tables"]
        self.contract, self.selection, self.vocab = contract, contract["selection"], contract["vocab_size"]
        content = Cursor(zstandard.ZstdDecompressor().decompress(tables))
        steps, classes = content.varint(), content.varint()
        width = planes(self.vocab - 1)
        lists = []
        for _ in range(1 + classes):
            count = content.varint()
            parts = [np.frombuffer(content.take(count), np.uint8).astype(np.int64) for _ in range(width)]
            lists.append(number(parts).tolist())
        common, leading = lists[0], lists[1:]
        self.orders = []
        for lead in leading:
            front = [*lead, *(id_ for id_ in common if id_ not in set(lead))]
            self.orders.append([*front, *(id_ for id_ in range(self.vocab) if id_ not in set(front))])
        stated = """classes 1, sizes 1, least 1, labels 1, ids 20, levels 6, tail 1, entropy 1, drawn-labels 1,
            drawn 20, counts 1, log-probs 1, values 2, slopes 2, key-counts 1, key-orders 1, key-shares 1,
            keys 20, shares 3, masses 1, row-entropies 1"""
        self.frequencies = {}
        for kind, contexts in (words.split() for words in stated.split(",")):
            self.frequencies[kind] = frequencies_of(content.take(512 * int(contexts)), int(contexts))
        assert content.at == len(content.data)
        end, roots = min(192, steps), [3 * 0.55 ** (18 - j) for j in range(18)]
        roots += list(range(3, end + 1))
        while steps > 192 and roots[-1] < steps:
            roots.append(roots[-1] + 2)
        self.roots = np.array(roots) / steps

    def stream(self, cell: States, kind: str, contexts: Sequence[int]) -> list[int]:
        return [cell.number(self.frequencies[kind][context]) for context in contexts]

    def sets(self, cell: States, kind: str, sizes: Sequence[int]) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in sizes]
        for place in range(max(sizes)):
            for ranks, size in zip(found, sizes, strict=True):
                if size > place:
                    first = ranks[-1] + 1 if ranks else 0
                    wide = round(8 * np.log2(10 + min(first, 65_535))) - round(8 * np.log2(min(size - place, 4_095)))
                    ranks.append(first + cell.number(self.frequencies[kind][max(0, wide + 24) // 8]))
        return found

    def signal(self, data: bytes, labels: Sequence[int]) -> dict[str, np.ndarray]:
        cell, kind, positions = States(data), self.selection["kind"], len(labels)
        once = [0] * positions
        classes = self.stream(cell, "classes", once)
        known = self.selection["tail_known"]
        head: list[list[tuple[int, int]]] = [[] for _ in range(positions)]
        log_head, log_tail = np.full(positions, -np.inf), np.zeros(positions)
        entropy = np.full(positions, np.nan)
        if kind != "sample":
            sizes = [self.selection["k"]] * positions
            if kind == "adaptive":
                sizes = [size + 1 for size in self.stream(cell, "sizes", once)]
            head, least = self.head(cell, classes, sizes, labels)
            log_head, log_tail = self.masses(self.stream(cell, "tail", once), head, least)
            if known:
                rows = zip(self.stream(cell, "entropy", once), head, log_head, log_tail, strict=True)
                entropy = np.array([unfold(e) / 256 + self.guess(*row) for e, *row in rows])
        drawn: list[list[tuple[int, int, int | None]]] = [[] for _ in range(positions)]
        if self.selection["draws"]:
            drawn = self.draws(cell, classes, labels)
            if kind == "sample":
                shares = [np.array([count for _, count, _ in row]) / self.selection["draws"] for row in drawn]
                rest = zip(self.stream(cell, "entropy", once), shares, strict=True)
                entropy = np.array([unfold(e) / 256 - 1.4 * (q * np.log(q)).sum() for e, q in rest])
        arrays = self.entries(head, drawn, log_head)
        arrays["log_tail_N"] = (log_tail if known else np.full(positions, np.nan)).astype(np.float32)
        arrays["entropy_N"] = entropy.astype(np.float32)
        if self.contract["curve"]:
            arrays["curve_NJ"] = self.curve(cell, log_tail).astype(np.float32)
        cell.end()
        return arrays

    def head(
        self, cell: States, classes: list[int], sizes: list[int], labels: Sequence[int]
    ) -> tuple[list[list[tuple[int, int]]], list[int]]:
        """(id, level) of each position, and the least levels."""
        once = [0] * len(sizes)
        least, kept = self.stream(cell, "least", once), self.stream(cell, "labels", once)
        sets = self.sets(cell, "ids", [size - (x > 0) for size, x in zip(sizes, kept, strict=True)])
        found: list[list[tuple[int, int]]] = [[] for _ in sizes]
        for place in range(max(map(len, sets))):
            for n, ranks in enumerate(sets):
                if place < len(ranks):
                    context = 2 * ((least[n] >= 18) + (least[n] >= 23)) + (place >= 16)
                    level = least[n] + cell.number(self.frequencies["levels"][context])
                    found[n].append((self.orders[classes[n]][ranks[place]], level))
        for entries, x, low, label in zip(found, kept, least, labels, strict=True):
            assert label not in [id_ for id_, _ in entries]
            if x:
                entries.append((label, low + x - 1))
        return found, least

    def draws(self, cell: States, classes: list[int], labels: Sequence[int]) -> list[list[tuple[int, int, int | None]]]:
        """(id, count, code of the log-probability) of each position."""
        once = [0] * len(labels)
        sizes, hit = self.stream(cell, "sizes", once), self.stream(cell, "drawn-labels", once)
        sets = self.sets(cell, "drawn", [size - x for size, x in zip(sizes, hit, strict=True)])
        ids = [[self.orders[c][rank] for rank in ranks] for c, ranks in zip(classes, sets, strict=True)]
        counts: list[list[int]] = [[0] * len(row) for row in ids]
        for place in range(max(map(len, ids))):
            for row, x in zip(counts, hit, strict=True):
                if place < len(row) and (place or x):
                    row[place] = cell.number(self.frequencies["counts"][0]) + 1
        for n, (row, x) in enumerate(zip(counts, hit, strict=True)):
            assert labels[n] not in ids[n]
            rest = self.selection["draws"] - sum(row)
            if x:
                ids[n].append(labels[n])
                row.append(rest)
            elif row:
                row[0] = rest
            assert not row or rest > 0
        codes: list[list[int | None]] = [[None] * len(row) for row in ids]
        for place in range(max(sizes)) if self.selection["logprobs"] else ():
            for row in codes:
                if place < len(row):
                    row[place] = cell.number(self.frequencies["log-probs"][0])
        return [list(zip(*parts, strict=True)) for parts in zip(ids, counts, codes, strict=True)]

    def masses(
        self, tail: list[int], head: list[list[tuple[int, int]]], least: list[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        logs = []
        for t, entries, low in zip(tail, head, least, strict=True):
            squares = self.roots[[level for _, level in entries]] ** 2
            guess = np.log(self.roots[low] ** 2 * len(entries) / squares.sum()) + 1 / 3
            x = unfold(t - 1) / 64 + guess if t else -np.inf
            logs.append((-np.logaddexp(0, x), -np.logaddexp(0, -x)))
        return tuple(np.array(column) for column in zip(*logs, strict=True))  # type: ignore[return-value]

    def guess(self, entries: list[tuple[int, int]], log_head: float, log_tail: float) -> float:
        logprobs = self.logprobs(entries, log_head)
        tail = np.exp(log_tail)
        rest = tail * (np.log(self.vocab) - 1 - log_tail) if tail else 0.0
        return float(rest - (np.exp(logprobs) * logprobs).sum())

    def logprobs(self, entries: list[tuple[int, int]], log_head: float) -> np.ndarray:
        roots = self.roots[[level for _, level in entries]]
        return 2 * np.log(roots) + log_head - np.log((roots**2).sum())

    def entries(self, head: list, drawn: list, log_head: np.ndarray) -> dict[str, np.ndarray]:
        rows = []
        for entries, draws, log_mass in zip(head, drawn, log_head, strict=True):
            entries = sorted(entries, key=lambda entry: (-entry[1], entry[0]))
            by_count = not self.selection["logprobs"]
            draws = sorted(draws, key=lambda draw: (-draw[1] if by_count else draw[2], draw[0]))
            logprobs = self.logprobs(entries, log_mass).tolist() if entries else []
            logprobs += [0.0 if by_count else -code / 16 for _, _, code in draws]
            counts = [0] * len(entries) + [count for _, count, _ in draws]
            rows.append(([id_ for id_, *_ in (*entries, *draws)], logprobs, counts))
        heads, tails = max(map(len, head)), max(map(len, drawn))

        def padded(part: int, fill: float, dtype: type) -> np.ndarray:
            cut = [
                (row[part][: len(entries)], row[part][len(entries) :]) for row, entries in zip(rows, head, strict=True)
            ]
            full = [[*a, *[fill] * (heads - len(a)), *b, *[fill] * (tails - len(b))] for a, b in cut]
            return np.array(full).astype(dtype)

        arrays = {"ids_NK": padded(0, -1, np.int32)}
        if self.selection["logprobs"]:
            arrays["logprobs_NK"] = padded(1, -np.inf, np.float32)
        if self.selection["draws"]:
            arrays["draws_NK"] = padded(2, 0, np.int32)
        return arrays

    def curve(self, cell: States, log_tail: np.ndarray) -> np.ndarray:
        nodes, there = len(self.contract["curve"]), np.flatnonzero(~np.isneginf(log_tail))
        found = np.zeros((len(log_tail), 2 * nodes))
        found[:, :nodes] = -np.inf
        before = log_tail[there]
        for node in range(nodes):
            numbers = self.stream(cell, "values", [min(node, 1)] * len(there))
            before = before + np.array([n if node else unfold(n) for n in numbers]) / 1024
            found[there, node] = before
        before = np.zeros(len(there))
        for node in range(nodes):
            before = before - np.array(self.stream(cell, "slopes", [min(node, 1)] * len(there))) / 256
            found[there, nodes + node] = before
        return found

    def attention(self, data: bytes, positions: int, prompt: int) -> dict[str, np.ndarray]:
        cell, spec = States(data), self.contract["attention"]
        layers, top_m = len(spec["layers"]), spec["top_m"]
        sight = [*(range(1, prompt - 1) if spec["rows"] == "all" else ()), *[prompt - 1] * positions]
        counts = self.stream(cell, "key-counts", [0] * layers)
        keys = iter(self.stream(cell, "key-orders", [0] * sum(counts)))
        listed = [[next(keys) + 1 for _ in range(count)] for count in counts]
        shares = iter(self.stream(cell, "key-shares", [0] * sum(counts)))
        usual = [{key: next(shares) for key in order} for order in listed]
        orders = [[*order, *(key for key in range(1, prompt) if key not in order)] for order in listed]
        sizes = [min(top_m, seen) for seen in sight] * layers
        sets = self.sets(cell, "keys", sizes)
        rows = [
            [
                (orders[n // len(sight)][rank], usual[n // len(sight)].get(orders[n // len(sight)][rank], 1))
                for rank in ranks
            ]
            for n, ranks in enumerate(sets)
        ]
        contexts = [(code >= 2) + (code >= 4) for row in rows for _, code in row]
        differences = iter([unfold(x) for x in self.stream(cell, "shares", contexts)])
        masses = self.stream(cell, "masses", [0] * (2 * layers * len(sight)))
        entropies = self.stream(cell, "row-entropies", [0] * (layers * len(sight)))
        cell.end()

        def summed(folded: list[int], scale: int) -> np.ndarray:
            steps = np.array([unfold(x) for x in folded]).reshape(-1, layers, len(sight))
            return np.cumsum(steps, axis=-1) / scale

        (sink, mass), (entropy,) = summed(masses, 128), summed(entropies, 8)
        shape = (layers, len(sight), top_m)
        positions_LNM, weights_LNM = np.full(shape, -1, np.int32), np.zeros(shape, np.float32)
        for n, row in enumerate(rows):
            at = divmod(n, len(sight))
            codes = sorted((-code - next(differences), key) for key, code in row)
            parts = np.array([(code / 16) ** 2 for code, _ in codes])
            whole = len(row) == sight[at[1]]
            divisor = (parts.sum() or 1.0) if whole else max(1.0, parts.sum())
            positions_LNM[at][: len(row)] = [key for _, key in codes]
            weights_LNM[at][: len(row)] = parts / divisor * mass[at]
        names = {"sink_LN": sink, "prompt_LN": mass, "entropy_LN": entropy}
        return {
            "positions_LNM": positions_LNM,
            "weights_LNM": weights_LNM,
            **{name: array.astype(np.float32) for name, array in names.items()},
        }


class Cursor:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = bytes(data), 0

    def take(self, count: int) -> bytes:
        self.at += count
        assert self.at <= len(self.data)
        return self.data[self.at - count : self.at]

    def varint(self) -> int:
        value, shift = 0, 0
        while True:
            byte = self.take(1)[0]
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value


class States:
    """Section 8: a cell, symbol by symbol."""

    def __init__(self, data: bytes) -> None:
        self.states = list(struct.unpack_from("<8I", data))
        assert min(self.states) >= 1 << 16
        self.data, self.at, self.before = data, 32, len(data)

    def number(self, frequencies: list[int]) -> int:
        state, value = self.states[0] >> 12, self.states[0] & 4095
        first = symbol = 0
        while first + frequencies[symbol] <= value:
            first, symbol = first + frequencies[symbol], symbol + 1
        x = frequencies[symbol] * state + value - first
        if x < 1 << 16:
            x = x << 16 | struct.unpack_from("<H", self.data, self.at)[0]
            self.at += 2
        self.states = [*self.states[1:], x]
        sides = 0 if symbol < 192 else 3 if symbol == 255 else 1
        side = int.from_bytes(self.data[self.before - sides : self.before][::-1], "little")
        self.before -= sides
        return side if sides == 3 else (symbol - 192) * 256 + 192 + side if sides else symbol

    def end(self) -> None:
        assert self.states == [1 << 16] * 8
        assert self.at == self.before


def unfold(x: int) -> int:
    return -(x + 1) // 2 if x % 2 else x // 2


def frequencies_of(planes: bytes, contexts: int) -> list[list[int]]:
    low, high = planes[: 256 * contexts], planes[256 * contexts :]
    numbers = [a + 256 * b for a, b in zip(low, high, strict=True)]
    found = [numbers[at : at + 256] for at in range(0, len(numbers), 256)]
    assert all(not any(row) or (sum(row) == 4096 and row[255]) for row in found)
    return [row if any(row) else [16] * 256 for row in found]
