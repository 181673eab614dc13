"""Progress bars: drawn on a terminal, a few lines a minute anywhere else."""

import io
import time

import pytest

from app import progress
from app.progress import FewLines, ProgressBar


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """Seconds that the test sets, of lines and of tqdm's own times; both count from `now[0]`."""
    now = [1000.0]
    monkeypatch.setattr(FewLines.__init__, "__defaults__", (lambda: now[0],))
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    return now


def run(stream, clock, num_updates, seconds, **options):
    with ProgressBar(total=num_updates, desc="work", file=stream, **options) as bar:
        for _ in range(num_updates):
            clock[0] += seconds / num_updates
            bar.update()
    return stream.getvalue()


def test_a_few_lines_a_minute_without_a_terminal(clock):
    written = run(io.StringIO(), clock, num_updates=6000, seconds=300)
    assert "\r" not in written and written.endswith("\n")
    lines = written.splitlines()
    # The first, four a minute, and the last.
    assert 5 * 4 <= len(lines) <= 5 * 4 + 2
    assert "0/6000" in lines[0] and "6000/6000" in lines[-1]
    assert all(line.startswith("work: ") for line in lines)


def test_short_work_is_two_lines(clock):
    lines = run(io.StringIO(), clock, num_updates=500, seconds=5).splitlines()
    assert ["0/500" in lines[0], "500/500" in lines[1], len(lines)] == [True, True, 2]


def test_texts_beside_the_bar_do_not_add_lines(clock):
    stream = io.StringIO()
    with ProgressBar(total=3, file=stream) as bar:
        for index in range(1000):
            bar.set_postfix_str(f"{index} open")
            bar.set_description_str("stage")
            bar.refresh()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2 and "999 open" in lines[-1]


def test_a_loop_that_fails_leaves_where_it_was(clock):
    stream = io.StringIO()
    with pytest.raises(KeyError), ProgressBar(total=10, file=stream) as bar:
        bar.update(7)
        raise KeyError
    assert "7/10" in stream.getvalue().splitlines()[-1]


def test_a_terminal_is_drawn_on(clock):
    written = run(Terminal(), clock, num_updates=100, seconds=50)
    # Each update, over the one before.
    assert written.count("\r") >= 100 and written.count("\n") == 1


def test_the_standard_error_is_where_it_goes(clock, capsys):
    for _ in ProgressBar(range(3)):
        pass
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_lines_are_some_seconds_apart():
    assert FewLines(io.StringIO())._clock is time.monotonic
    assert 60 / progress.LINE_INTERVAL_S <= 6
