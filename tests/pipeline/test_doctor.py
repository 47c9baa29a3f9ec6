"""What the machine lacks is told with what needs it."""

from __future__ import annotations

import pytest

from pipeline import doctor


def test_without_screen_both_verbs_that_need_it_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda _: None)
    (screen,) = (check for check in doctor.examine() if check.name == "screen")
    assert screen.ok
    assert "make distill-screen and teacher-cache-screen" in screen.fact
