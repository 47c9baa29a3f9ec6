"""A second reader, written from FORMAT.md alone, against the golden files. It imports nothing from `shards`.

R6: the golden sets were written once by each codec version and must decode bit-equal for ever; they are never made
again. `expected.npz` holds what the version's reader gave on that day.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import zstandard

GOLDEN = Path(__file__).parent / "golden"
SETS = sorted(path.name for path in GOLDEN.iterdir())


def read_json(path: Path) -> dict[str, Any]:
    """Section 1."""
    content = path.read_bytes()
    document = json.loads(content)
    assert canonical(document) == content
    seal = document.pop("seal")
    assert hashlib.sha256(canonical(document)).hexdigest() == seal
    return dict(document)


def canonical(document: Any) -> bytes:
    return json.dumps(document, sort_keys=True, indent=1).encode("ascii") + b"\n"


def sha256(*parts: bytes) -> bytes:
    return hashlib.sha256(b"".join(parts)).hexdigest().encode()


class Shard:
    """Sections 3 and 4."""

    def __init__(self, data: bytes) -> None:
        file = pa.ipc.open_file(pa.py_buffer(data))
        self.contract = json.loads(file.schema.metadata[b"contract"])
        assert self.contract["format_version"] in (1, 2)
        assert self.contract["codec"] in ("topk-planes/1", "planes/2", "planes/3")
        assert file.schema.metadata[b"bytes"] == b"%020d" % len(data)
        assert file.num_record_batches == 1
        self.batch = file.get_batch(0)
        index, seal = file.metadata[b"index"], file.metadata[b"seal"]
        assert sha256(data.replace(seal, b"s" * 64)) == seal

        start = 8
        for _ in ("schema", "record batch"):
            start += 8 + struct.unpack_from("<i", data, start + 4)[0]
        footer_size = struct.unpack_from("<i", data, len(data) - 10)[0]
        end = len(data) - 10 - footer_size - 8
        after = data[end:].replace(index, b"i" * 64).replace(seal, b"s" * 64)
        assert sha256(data[:start], after, *self.fixed()) == index

    def fixed(self) -> Iterator[bytes]:
        rows = self.batch.num_rows
        for field, column in zip(self.batch.schema, self.batch.columns, strict=True):
            buffers = [None if buffer is None else buffer.to_pybytes() for buffer in column.buffers()]
            if field.name.endswith("_ids") or field.name in ("signal", "attention", "tables", "sample_id"):
                yield buffers[1][: 4 * (rows + 1)]
                if field.name == "sample_id":
                    yield buffers[2][: sum(len(name.as_py().encode()) for name in column)]
            else:
                yield buffers[1][: rows * field.type.bit_width // 8]

    def cell(self, name: str, row: int) -> bytes:
        names = [
            name for name in ("prompt_ids", "response_ids", "signal", "attention") if name in self.batch.schema.names
        ]
        value = self.batch.column(name)[row].as_py()
        cell = value if isinstance(value, bytes) else np.array(value, "<i4").tobytes()
        check = hashlib.blake2b(name.encode() + b"\0" + struct.pack("<I", row) + cell, digest_size=8).digest()
        at = 8 * names.index(name)
        assert self.batch.column("checks")[row].as_py()[at : at + 8] == check
        return cell


def streams(cell: bytes, sizes: list[int]) -> list[np.ndarray]:
    """Section 5, first paragraph."""
    compressed = struct.unpack_from(f"<{len(sizes)}I", cell)
    start, found = 4 * len(sizes), []
    for size, frame_size in zip(sizes, compressed, strict=True):
        frame = cell[start : start + frame_size]
        assert zstandard.frame_content_size(frame) == size
        found.append(np.frombuffer(zstandard.ZstdDecompressor().decompress(frame), np.uint8).astype(np.int64))
        start += frame_size
    assert start == len(cell)
    return found


def planes(largest: int) -> int:
    return max(1, (largest.bit_length() + 7) // 8)


def number(parts: list[np.ndarray]) -> np.ndarray:
    total = np.zeros_like(parts[0])
    for index, part in enumerate(parts):
        total = total + part * 256**index
    return total


def decode_signal(cell: bytes, contract: dict[str, Any], positions: int) -> dict[str, np.ndarray]:
    """Section 5, entry by entry."""
    k = contract["k"] if contract["format_version"] == 1 else contract["selection"]["k"]
    width = planes(contract["vocab_size"] - 1)
    parts = streams(cell, [positions * k] * (width + 1) + [4 * positions])
    gaps, levels = number(parts[:width]).reshape(positions, k), parts[width].reshape(positions, k)
    tail_codes, entropy_codes = number(list(parts[-1].reshape(2, 2, positions).swapaxes(0, 1)))
    roots = np.array([1 - j / 240 if j <= 237 else (3 / 240) * 0.55 ** (j - 237) for j in range(256)])
    ids, logprobs, log_tails = [], [], []
    for position in range(positions):
        rising, previous = [], -1
        for gap in gaps[position].tolist():
            previous = previous + 1 + gap
            rising.append(previous)
        assert rising[-1] < contract["vocab_size"]
        order = sorted(range(k), key=lambda entry: (levels[position, entry], rising[entry]))
        code = int(tail_codes[position])
        x = (code - 32768) / 128
        log_tail, log_head = (-np.logaddexp(0, -x), -np.logaddexp(0, x)) if code else (-np.inf, 0.0)
        chosen = roots[[int(levels[position, entry]) for entry in order]]
        ids.append([rising[entry] for entry in order])
        logprobs.append(2 * np.log(chosen) + log_head - np.log((chosen**2).sum()))
        log_tails.append(log_tail)
    return {
        "ids_NK": np.array(ids, np.int32),
        "logprobs_NK": np.array(logprobs).astype(np.float32),
        "log_tail_N": np.array(log_tails).astype(np.float32),
        "entropy_N": (entropy_codes / 1024).astype(np.float32),
    }


def decode_attention(cell: bytes, contract: dict[str, Any], positions: int, prompt: int) -> dict[str, np.ndarray]:
    """Section 6, row by row."""
    layers, top_m = len(contract["attention"]["layers"]), contract["attention"]["top_m"]
    kept, width, rows = min(top_m, prompt - 1), planes(prompt - 1), layers * positions
    parts = streams(cell, [rows * kept] * (width + 1) + [6 * rows])
    gaps, codes = number(parts[:width]).reshape(rows, kept), parts[width].reshape(rows, kept)
    sink, mass, entropy = (number(list(pair)) for pair in parts[-1].reshape(3, 2, rows))
    keys, weights = np.full((rows, top_m), -1, np.int32), np.zeros((rows, top_m), np.float32)
    for row in range(rows):
        rising = (np.cumsum(gaps[row] + 1)).tolist()
        assert not rising or rising[-1] < prompt
        order = sorted(range(kept), key=lambda entry: (-codes[row, entry], rising[entry]))
        shares = (codes[row, order] / 63) ** 2
        divisor = (shares.sum() or 1.0) if kept == prompt - 1 else max(1.0, shares.sum())
        keys[row, :kept] = [rising[entry] for entry in order]
        weights[row, :kept] = shares / divisor * (mass[row] / 65535)
    shape = (layers, positions)
    return {
        "positions_LNM": keys.reshape(*shape, top_m),
        "weights_LNM": weights.reshape(*shape, top_m),
        "sink_LN": (sink / 65535).astype(np.float32).reshape(shape),
        "prompt_LN": (mass / 65535).astype(np.float32).reshape(shape),
        "entropy_LN": (entropy / 1024).astype(np.float32).reshape(shape),
    }


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
        sets = [f"{name}-{part}{n}" for name in ("ids", "drawn", "keys") for part in ("map", "gaps") for n in range(4)]
        stated = """sizes classes least levels0 levels1 levels2 levels3 levels4 levels5 tail entropy SETS counts
            log-probs values0 values1 slopes0 slopes1 key-counts key-orders key-shares shares0 shares1 shares2 masses
            row-entropies"""
        kinds = stated.replace("SETS", " ".join(sets)).split()
        self.newer = contract["codec"] == "planes/3"
        if self.newer:
            self.frequencies = {kind: frequencies_of(content.take(512)) for kind in kinds}
        else:
            self.words = {kind: words_of(content.take(256)) for kind in kinds}
        assert content.at == len(content.data)
        end, roots = min(192, steps), [3 * 0.55 ** (18 - j) for j in range(18)]
        roots += list(range(3, end + 1))
        while steps > 192 and roots[-1] < steps:
            roots.append(roots[-1] + 2)
        self.roots = np.array(roots) / steps

    def cell(self, data: bytes) -> Cursor | States:
        return States(data) if self.newer else Cursor(data)

    def stream(self, cell: Cursor | States, kind: str, count: int) -> list[int]:
        if isinstance(cell, States):
            return [cell.number(self.frequencies[kind]) for _ in range(count)]
        symbols: list[int] = []
        while len(symbols) < count:
            piece = min(65_536, count - len(symbols))
            size = cell.varint()
            if size == 0:
                symbols += cell.take(piece)
                continue
            counts, sizes = [piece], [size]
            if piece > 1_023:
                quarter = -(-piece // 4)
                counts, sizes = [quarter] * 3 + [piece - 3 * quarter], [size, *(cell.varint() for _ in range(3))]
            for n, size in zip(counts, sizes, strict=True):
                symbols += coded(cell.take(size), n, self.words[kind])
        short = iter(cell.take(sum(192 <= symbol < 255 for symbol in symbols)))
        wide = Cursor(cell.take(3 * symbols.count(255)))
        return [
            symbol
            if symbol < 192
            else int.from_bytes(wide.take(3), "little")
            if symbol == 255
            else 192 + 256 * (symbol - 192) + next(short)
            for symbol in symbols
        ]

    def sets(self, cell: Cursor | States, prefix: str, sizes: list[int]) -> list[list[int]]:
        maps = [self.stream(cell, f"{prefix}-map{m}", len(sizes)) for m in range(4)]
        found = [[7 * m + i for m in range(4) for i in range(7) if maps[m][n] >> i & 1] for n in range(len(sizes))]
        starts = [len(ranks) for ranks in found]
        for group, (first, end) in enumerate(((0, 16), (16, 32), (32, 48), (48, 1 << 30))):
            places = [range(max(first, start), min(end, size)) for start, size in zip(starts, sizes, strict=True)]
            gaps = iter(self.stream(cell, f"{prefix}-gaps{group}", sum(map(len, places))))
            for ranks, wanted in zip(found, places, strict=True):
                for _ in wanted:
                    ranks.append(max([27, *ranks]) + 1 + next(gaps))
        return found

    def signal(self, data: bytes, positions: int) -> dict[str, np.ndarray]:
        cell, kind, k = self.cell(data), self.selection["kind"], self.selection["k"]
        classes = self.stream(cell, "classes", positions)
        head: list[list[tuple[int, int]]] = [[] for _ in range(positions)]
        if kind != "sample":
            sizes = [k] * positions
            if kind == "adaptive":
                sizes = [size + 1 for size in self.stream(cell, "sizes", positions)]
            head = self.head(cell, classes, sizes)
        drawn: list[list[tuple[int, int, int | None]]] = [[] for _ in range(positions)]
        if self.selection["draws"]:
            drawn = self.draws(cell, classes, positions)
        log_head, log_tail = np.full(positions, -np.inf), np.zeros(positions)
        if kind != "sample":
            log_head, log_tail = self.masses(self.stream(cell, "tail", positions), head)
        known = self.selection["tail_known"]
        entropy = np.full(positions, np.nan)
        if known:
            numbers = self.stream(cell, "entropy", positions)
            guesses = [self.guess(*row) for row in zip(head, drawn, log_head, log_tail, strict=True)]
            entropy = np.array([unfold(e) / 256 + guess for e, guess in zip(numbers, guesses, strict=True)])
        arrays = self.entries(head, drawn, log_head)
        arrays["log_tail_N"] = (log_tail if known else entropy).astype(np.float32)
        arrays["entropy_N"] = entropy.astype(np.float32)
        if self.contract["curve"]:
            arrays["curve_NJ"] = self.curve(cell, log_tail).astype(np.float32)
        cell.end()
        return arrays

    def head(self, cell: Cursor | States, classes: list[int], sizes: list[int]) -> list[list[tuple[int, int]]]:
        """(id, level) of each position, by rank."""
        least = self.stream(cell, "least", len(sizes))
        sets = self.sets(cell, "ids", sizes)
        levels = [[low] * size for low, size in zip(least, sizes, strict=True)]
        for group, (low, high) in enumerate(((0, 18), (18, 23), (23, 256))):
            rows = [row for row, value in enumerate(least) if low <= value < high]
            for part, (first, end) in enumerate(((0, 16), (16, 1 << 30))):
                places = [(row, place) for row in rows for place in range(first, min(end, sizes[row]))]
                above = self.stream(cell, f"levels{2 * group + part}", len(places))
                for (row, place), value in zip(places, above, strict=True):
                    levels[row][place] += value
        return [
            [(self.orders[c][rank], level) for rank, level in zip(ranks, row, strict=True)]
            for c, ranks, row in zip(classes, sets, levels, strict=True)
        ]

    def draws(
        self, cell: Cursor | States, classes: list[int], positions: int
    ) -> list[list[tuple[int, int, int | None]]]:
        """(id, count, code of the log-probability) of each position, by rank."""
        sizes = self.stream(cell, "sizes", positions)
        sets = self.sets(cell, "drawn", sizes)
        others = iter(self.stream(cell, "counts", sum(max(0, size - 1) for size in sizes)))
        counts = []
        for size in sizes:
            rest = [next(others) + 1 for _ in range(size - 1)]
            counts.append([self.selection["draws"] - sum(rest), *rest] if size else [])
        logprobs = self.selection["logprobs"]
        codes = iter(self.stream(cell, "log-probs", sum(sizes)) if logprobs else [])
        return [
            [
                (self.orders[c][rank], count, next(codes) if logprobs else None)
                for rank, count in zip(ranks, row, strict=True)
            ]
            for c, ranks, row in zip(classes, sets, counts, strict=True)
        ]

    def masses(self, tail: list[int], head: list[list[tuple[int, int]]]) -> tuple[np.ndarray, np.ndarray]:
        logs = []
        for t, entries in zip(tail, head, strict=True):
            squares = self.roots[[level for _, level in entries]] ** 2
            guess = np.log(squares.min() * len(entries) / squares.sum()) + 1 / 3
            x = unfold(t - 1) / 64 + guess if t else -np.inf
            logs.append((-np.logaddexp(0, x), -np.logaddexp(0, -x)))
        return tuple(np.array(column) for column in zip(*logs, strict=True))  # type: ignore[return-value]

    def guess(self, entries: list, drawn: list, log_head: float, log_tail: float) -> float:
        if not entries:
            shares = np.array([count for _, count, _ in drawn]) / self.selection["draws"]
            return float(-1.4 * (shares * np.log(shares)).sum())
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

    def curve(self, cell: Cursor | States, log_tail: np.ndarray) -> np.ndarray:
        nodes, there = len(self.contract["curve"]), np.flatnonzero(~np.isneginf(log_tail))
        found = np.zeros((len(log_tail), 2 * nodes))
        found[:, :nodes] = -np.inf
        before = log_tail[there]
        for node in range(nodes):
            numbers = self.stream(cell, f"values{min(node, 1)}", len(there))
            before = before + np.array([n if node else unfold(n) for n in numbers]) / 1024
            found[there, node] = before
        before = np.zeros(len(there))
        for node in range(nodes):
            before = before - np.array(self.stream(cell, f"slopes{min(node, 1)}", len(there))) / 256
            found[there, nodes + node] = before
        return found

    def attention(self, data: bytes, positions: int, prompt: int) -> dict[str, np.ndarray]:
        cell, spec = self.cell(data), self.contract["attention"]
        layers, top_m = len(spec["layers"]), spec["top_m"]
        sight = [*(range(1, prompt - 1) if spec["rows"] == "all" else ()), *[prompt - 1] * positions]
        counts = self.stream(cell, "key-counts", layers)
        keys = iter(self.stream(cell, "key-orders", sum(counts)))
        listed = [[next(keys) + 1 for _ in range(count)] for count in counts]
        shares = iter(self.stream(cell, "key-shares", sum(counts)))
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
        differences: dict[tuple[int, int], int] = {}
        for group, (low, high) in enumerate(((0, 2), (2, 4), (4, 17))):
            places = [(n, i) for n, row in enumerate(rows) for i, (_, code) in enumerate(row) if low <= code < high]
            numbers = self.stream(cell, f"shares{group}", len(places))
            differences |= {place: unfold(x) for place, x in zip(places, numbers, strict=True)}
        masses = self.stream(cell, "masses", 2 * layers * len(sight))
        entropies = self.stream(cell, "row-entropies", layers * len(sight))
        cell.end()

        def summed(folded: list[int], scale: int) -> np.ndarray:
            steps = np.array([unfold(x) for x in folded]).reshape(-1, layers, len(sight))
            return np.cumsum(steps, axis=-1) / scale

        (sink, mass), (entropy,) = summed(masses, 128), summed(entropies, 8)
        shape = (layers, len(sight), top_m)
        positions_LNM, weights_LNM = np.full(shape, -1, np.int32), np.zeros(shape, np.float32)
        for n, row in enumerate(rows):
            at = divmod(n, len(sight))
            codes = sorted((-code - differences[n, i], key) for i, (key, code) in enumerate(row))
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

    def end(self) -> None:
        assert self.at == len(self.data)

    def varint(self) -> int:
        value, shift = 0, 0
        while True:
            byte = self.take(1)[0]
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value


class States:
    """Section 8, `planes/3`: a cell, symbol by symbol."""

    def __init__(self, data: bytes) -> None:
        self.states = list(struct.unpack_from("<4I", data))
        assert min(self.states) >= 1 << 16
        self.data, self.at, self.before = data, 16, len(data)

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
        assert self.states == [1 << 16] * 4
        assert self.at == self.before


def unfold(x: int) -> int:
    return -(x + 1) // 2 if x % 2 else x // 2


def frequencies_of(planes: bytes) -> list[int]:
    found = [low + 256 * high for low, high in zip(planes[:256], planes[256:], strict=True)]
    if not any(found):
        return [16] * 256
    assert sum(found) == 4096
    assert found[255]
    return found


def words_of(lengths: bytes) -> dict[tuple[int, int], int]:
    """(length, word) -> symbol."""
    words, word, length = {}, 0, 11
    for symbol in sorted((s for s in range(256) if lengths[s]), key=lambda s: (-lengths[s], s)):
        word >>= length - lengths[symbol]
        length = lengths[symbol]
        words[length, word] = symbol
        word += 1
    return words


def coded(data: bytes, count: int, words: dict[tuple[int, int], int]) -> list[int]:
    bits = "".join(f"{byte:08b}" for byte in reversed(data))
    at, symbols = bits.index("1") + 1, []
    assert at <= 8
    for _ in range(count):
        length = next(length for length in range(1, 12) if (length, int(bits[at : at + length], 2)) in words)
        symbols.append(words[length, int(bits[at : at + length], 2)])
        at += length
    assert at == len(bits)
    return symbols


def second_reading(folder: Path) -> dict[str, np.ndarray]:
    """Every array of a set, by "shard/row/field"."""
    manifest = read_json(folder / "manifest.json")
    assert read_json(folder / "contract.json")["contract"] == manifest["contract"]
    for name, digest in manifest["teacher_files"].items():
        assert hashlib.sha256((folder / "teacher" / name).read_bytes()).hexdigest() == digest
    found = {}
    for info in manifest["shards"]:
        data = (folder / info["name"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == info["sha256"]
        shard = Shard(data)
        assert shard.contract == manifest["contract"]
        reader = payload_readers(shard)
        for row, number_of_positions in enumerate(shard.batch.column("positions").to_pylist()):
            prompt = np.frombuffer(shard.cell("prompt_ids", row), np.int32)
            arrays = {
                "prompt_ids_P": prompt,
                "response_ids_R": np.frombuffer(shard.cell("response_ids", row), np.int32),
                **reader[0](shard.cell("signal", row), number_of_positions),
            }
            if shard.contract["attention"] is not None:
                arrays |= reader[1](shard.cell("attention", row), number_of_positions, len(prompt))
            found |= {f"{info['name']}/{row}/{name}": array for name, array in arrays.items()}
    return found


def payload_readers(shard: Shard) -> tuple[Any, Any]:
    """What decodes a signal and an attention cell, by the codec's name."""
    contract = shard.contract
    if contract["codec"] in ("planes/2", "planes/3"):
        tables, *others = shard.batch.column("tables").to_pylist()
        assert not any(others)
        codec = Planes(contract, tables)
        return codec.signal, codec.attention
    return (
        lambda cell, positions: decode_signal(cell, contract, positions),
        lambda cell, positions, prompt: decode_attention(cell, contract, positions, prompt),
    )


def first_reading(folder: Path) -> dict[str, np.ndarray]:
    """The same through the reader under test."""
    from shards.reader import ShardSet
    from shards.verify import verify_shards

    shards, found = ShardSet(folder), {}
    assert verify_shards(shards.storage).intact
    for info in shards.manifest.shards:
        shard = shards.open(info)
        for row in range(len(shard)):
            record = shard[row]
            for part in (record, record.attention):
                for name in getattr(part, "__slots__", ()):
                    if isinstance(value := getattr(part, name), np.ndarray):
                        found[f"{info.name}/{row}/{name}"] = value
    return found


def expected(name: str) -> dict[str, np.ndarray]:
    """Arrays by the names that fields have today; two were called otherwise on the day."""
    with np.load(GOLDEN / name / "expected.npz") as arrays:
        return {key.replace("/topk_", "/"): array for key, array in arrays.items()}


def require_bit_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert sorted(found) == sorted(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, strict=True, err_msg=name)


@pytest.mark.parametrize("name", SETS)
def test_R6_golden_sets_decode_bit_equal(name: str) -> None:
    require_bit_equal(first_reading(GOLDEN / name), expected(name))


@pytest.mark.parametrize("name", SETS)
def test_a_second_reader_made_from_the_specification_agrees(name: str) -> None:
    require_bit_equal(second_reading(GOLDEN / name), expected(name))


def test_every_codec_version_has_a_golden_set() -> None:
    from shards.codec import CODECS

    written = {read_json(GOLDEN / name / "contract.json")["contract"]["codec"] for name in SETS}
    assert written == set(CODECS)
