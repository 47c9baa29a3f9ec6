"""What a container may still take, from a folder like that in which the kernel tells it."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from stages.distill.memory import free_host_bytes

MIB = 2**20


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """One with 900 MiB available."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 900 * MIB}))


@pytest.mark.parametrize(
    ("limit", "used", "idle", "free"),
    [
        (512, 100, 0, 412),
        (512, 500, 300, 312),
        (512, 520, 0, 0),
        (4096, 100, 0, 900),
        ("max", 100, 0, 900),
    ],
    ids=["within its limit", "full of file pages", "beyond its limit", "wider than the machine", "without a limit"],
)
def test_pages_of_files_that_nobody_reads_are_free(
    limit: int | str, used: int, idle: int, free: int, tmp_path: Path
) -> None:
    (tmp_path / "memory.max").write_text(f"{limit if limit == 'max' else int(limit) * MIB}\n")
    (tmp_path / "memory.current").write_text(f"{used * MIB}\n")
    (tmp_path / "memory.stat").write_text(f"anon {7 * MIB}\ninactive_file {idle * MIB}\nactive_file 4096\n")
    assert free_host_bytes(tmp_path) == free * MIB


def test_where_no_container_tells_it_is_the_machines(tmp_path: Path) -> None:
    assert free_host_bytes(tmp_path) == 900 * MIB
