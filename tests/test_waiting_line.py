"""What a job that waits shows on a terminal and tells, and where none is."""

import io
import os
import re
import sys

import pytest
from others import job_id

from avocado_vt_joblock import lock, waiting
from avocado_vt_joblock.lockfile import LockFile, State


class Terminal(io.StringIO):
    """What is written on a terminal."""

    def isatty(self):
        return True

    def lines(self):
        """Return what stood in its line, one after the other."""
        return self.getvalue().split("\r\x1b[K")


@pytest.fixture
def wait(tmp_path, monkeypatch):
    """Return what has a job wait for a moment beside one that holds the lock."""
    monkeypatch.setattr(waiting, "ATTEMPT_INTERVAL", 0.01)
    holder = lock.JobLock(str(tmp_path), job_id(1))
    holder.acquire()

    def wait_in_vain():
        with pytest.raises(lock.WaitedInVainError) as error:
            waiting.acquire(lock.JobLock(str(tmp_path), job_id(2)), 0.3)
        return error.value

    yield wait_in_vain
    holder.release()


def test_program_without_standard_error_waits_all_the_same(wait, monkeypatch, tmp_path):
    """Python has None for it in a service that has closed it."""
    monkeypatch.setattr(sys, "stderr", None)
    assert wait().waited >= 0.3
    assert len(os.listdir(tmp_path)) == 2  # the held lock and its card


@pytest.mark.parametrize("columns", [1, 2, 20, 40, 200])
def test_line_is_never_wider_than_the_terminal(wait, monkeypatch, columns):
    """Of a line that is wider only the last part would be cleared."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", str(columns))
    wait()
    shown = [
        line
        for line in terminal.lines()
        if "Waiting for the lock"[: columns - 1] in line
    ]
    assert shown
    assert max(map(len, terminal.lines())) < columns
    # At the end the line is clear again.
    assert terminal.getvalue().endswith("\r\x1b[K")
    if columns == 200:
        whole = r"Waiting for the lock: 0:00:00 of 0:00:00\. Ctrl-C ends the waiting\."
        assert re.fullmatch(whole, shown[-1])


def test_stale_lock_that_cannot_be_removed_is_told_once(monkeypatch, caplog):
    """A job that waits for others meets it at each attempt."""
    monkeypatch.setattr(waiting, "ATTEMPT_INTERVAL", 0.001)
    file = LockFile("/locks/stale", state=State.STALE, not_removed="not permitted")
    wait = waiting._Wait(60)
    for _ in range(3):
        wait.pause_or_raise(lock.LockInTheWayError(None, 1, stale=[file]))
    told = [
        record.name for record in caplog.records if "not permitted" in record.message
    ]
    assert sorted(told) == ["avocado.app", "avocado.job"]
