from __future__ import annotations

import io

import pytest
from rich.console import Console

from dspark_batch.job.progress import BarProgress, PlainProgress, Progress, RunState, open_progress

STATE = RunState(
    num_rows=100,
    num_done=60,
    num_done_before=20,
    num_errors=3,
    num_new_tokens=5000,
    num_rounds=100,
    num_accepted_tokens=150,
    seconds=10.0,
)


def test_the_state_tells_speed_accepted_length_errors_and_time_left():
    assert STATE.text() == ("60/100 rows, 10.0 s left, 3 errors, 500.0 tok/s, accepted length 2.50")


def test_the_state_before_the_first_row_claims_nothing():
    assert RunState(num_rows=9).text() == "0/9 rows, 0 errors"


def test_plain_lines_come_every_thirty_seconds_at_most_and_phases_always():
    stream, now = io.StringIO(), [0.0]
    progress = PlainProgress(stream, clock=lambda: now[0])
    progress.phase("loading engine")
    for second in range(95):
        now[0] = float(second)
        progress.update(STATE)
    assert stream.getvalue().splitlines() == [
        "loading engine",
        *[STATE.text()] * 3,
    ]


def test_the_bar_shows_phase_and_state():
    stream = io.StringIO()
    progress = BarProgress(Console(file=stream, force_terminal=True, width=120))
    progress.phase("decoding 80 rows")
    progress.update(STATE)
    progress.close()
    progress.close()
    shown = stream.getvalue()
    assert "decoding 80 rows" in shown
    assert "60/100" in shown
    assert "accepted length 2.50" in shown


def test_the_bar_of_a_narrow_terminal_still_shows_rows_and_time_left():
    stream = io.StringIO()
    with BarProgress(Console(file=stream, force_terminal=True, width=60)) as progress:
        progress.phase("decoding 80 rows")
        progress.update(STATE)
    assert "60/100 rows, 10.0 s left" in stream.getvalue()


@pytest.mark.parametrize(
    ("mode", "terminal", "kind"),
    [
        ("auto", True, BarProgress),
        ("auto", False, PlainProgress),
        ("bar", False, BarProgress),
        ("plain", True, PlainProgress),
        ("none", True, Progress),
    ],
)
def test_auto_is_a_bar_on_a_terminal_only(monkeypatch, mode, terminal, kind):
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal, raising=False)
    progress = open_progress(mode)
    progress.close()
    assert type(progress) is kind


def test_no_progress_says_nothing(capsys):
    progress = open_progress("none")
    progress.phase("loading engine")
    progress.update(STATE)
    progress.close()
    assert capsys.readouterr() == ("", "")
