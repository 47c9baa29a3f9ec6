"""events.jsonl: what is written is read back, once, whatever befalls the file in between."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from pipeline.event_log import EventLog, EventReader
from stages.events import Answered, Event, Metric, Note, Progress

EVENTS: list[Event] = [
    Note(stage="s", text="hallo, 世界"),
    Metric(stage="s", step=3, values={"kl": 0.5}),
    Progress(stage="s", done=1, total=2, unit="rows", bytes=7),
    Answered(stage="s", step=3, prompt="6 x 7?", answer="41\n界", label="42"),
]


def write(path: Path, *events: Event) -> None:
    log = EventLog(path)
    for event in events:
        log(event)
    log.close()


def read(reader: EventReader) -> list[Event]:
    return [logged.event for logged in reader.read()]


@given(cuts=st.lists(st.integers(0, 400), max_size=6))
def test_read_in_any_pieces_every_event_comes_once(tmp_path_factory, cuts: list[int]) -> None:  # type: ignore[no-untyped-def]
    folder = tmp_path_factory.mktemp("log")
    write(folder / "whole", *EVENTS)
    content = (folder / "whole").read_bytes()
    growing, reader = folder / "growing", EventReader(folder / "growing")
    found = read(reader)
    for cut in [*sorted(cuts), len(content)]:
        with growing.open("ab") as file:
            file.write(content[file.tell() : cut])
        found += read(reader)
    assert found == EVENTS


def test_a_writer_killed_within_a_line_costs_that_line_alone(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    write(path, EVENTS[0])
    with path.open("ab") as file:
        file.write(b'{"time": 1.0, "kind": "no')
    reader = EventReader(path)
    assert read(reader) == [EVENTS[0]]
    write(path, EVENTS[1])
    assert read(reader) == [EVENTS[1]]
    assert read(EventReader(path)) == EVENTS[:2]


def test_a_file_that_was_cut_or_replaced_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    reader = EventReader(path)
    assert read(reader) == []
    write(path, *EVENTS)
    assert read(reader) == EVENTS
    path.write_bytes(b"")
    write(path, EVENTS[2])
    assert (read(reader), reader.restarts) == ([EVENTS[2]], 1)
    write(tmp_path / "other", *EVENTS)
    (tmp_path / "other").replace(path)
    assert (read(reader), reader.restarts) == (EVENTS, 2)


def test_what_is_unknown_or_no_event_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    lines = [
        '{"time": 1, "kind": "aurora", "stage": "s"}',
        '{"time": 1, "kind": "note", "stage": "s", "text": "kept", "colour": "red"}',
        '{"time": 1, "kind": "note", "stage": "s"}',
        '{"time": 1, "kind": "progress", "stage": "s", "done": "3", "total": 4, "unit": "rows"}',
        '{"time": 1, "kind": "metric", "stage": "s", "step": 1, "values": {"kl": "low"}}',
        '{"time": 1, "kind": "answered", "stage": "s", "step": 1, "prompt": "?", "answer": 41, "label": "42"}',
        '{"time": "noon", "kind": "note", "stage": "s", "text": ""}',
        "[]",
        "\x00\x01",
        "",
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert read(EventReader(path)) == [Note(stage="s", text="kept")]


def test_the_newest_bytes_are_whole_lines_from_the_end(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    write(path, *(Progress(stage="s", done=n, total=100, unit="rows") for n in range(100)))
    found = read(EventReader(path, newest_bytes=1000))
    assert 5 < len(found) < 20
    assert [event.done for event in found if isinstance(event, Progress)] == list(range(100 - len(found), 100))
