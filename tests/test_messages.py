"""The texts and the settings, as functions: what real jobs print of them other tests show."""

import errno
import math
import os
import re

import pytest

from avocado_vt_joblock import messages
from avocado_vt_joblock.lock import KERNEL_LOCK, LockInTheWayError
from avocado_vt_joblock.lockfile import LockFile, Reason, State
from avocado_vt_joblock.processes import Process

PATH = f"/two words/avocado-vt-joblock-{7:040x}-0-00000007.pid"
NOBODY = 54321


def test_timeout():
    values = ["0", " 2.5 ", 7200, "-1", -1.0]
    assert [messages.timeout(value) for value in values] == [0, 2.5, 7200, math.inf, math.inf]


@pytest.mark.parametrize(
    "value", ["soon", "", "-2", "nan", "inf", "1 h", "1e999", True, None, [1], {}, 10**400]
)
def test_bad_timeout(value):
    told = re.escape(f"plugins.vtjoblock.timeout = {value!r} is not a time to wait")
    with pytest.raises(ValueError, match=told) as caught:
        messages.timeout(value)
    assert "-1 to wait for as long as it takes" in str(caught.value)


def test_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert messages.directory("~/locks") == f"{tmp_path}/locks"
    assert messages.directory(tmp_path) == str(tmp_path)


@pytest.mark.parametrize(
    "value", ["", "locks", "~nobody-of-this-name/x", "$HOME/x", None, 7, "/\0", ["/tmp"], b"/tmp"]
)
def test_bad_directory(value):
    told = re.escape(f"is not an absolute path: plugins.vtjoblock.dir = {value!r}")
    with pytest.raises(ValueError, match=told):
        messages.directory(value)


def refusal(error):
    return messages.refusal(error, "/locks", "/results/job.log")


def in_the_way(state, waited=0.0, **facts):
    error = LockInTheWayError(LockFile(PATH, uid=NOBODY, state=state, **facts))
    error.waited = waited
    return refusal(error)


def process(pid, test_of="", uid=NOBODY, command="qemu", is_around=False, is_blank=False):
    return Process(pid, command, uid, {"x"}, test_of, is_around, is_blank)


@pytest.mark.parametrize(
    ("processes", "reason", "kills"),
    [
        ([process(4), process(5)], None, "4 5"),
        ([process(4), process(5, test_of="7")], None, None),
        ([process(4)], Reason.RESTLESS, None),
        ([process(4)], Reason.GUESTS_OF_OTHERS, None),
        ([process(4), process(5, is_blank=True)], None, None),
        ([process(4), process(5, is_around=True)], None, None),
    ],
)
def test_advice_to_kill(processes, reason, kills):
    """Only where no test is left, all could be seen, and it is not the reader's own shell."""
    state = State.OUTER if any(this.is_around for this in processes) else State.LIVE
    text = in_the_way(state, processes=processes, reason=reason)
    assert re.findall(r"^    kill (.*)$", text, re.MULTILINE) == ([kills] if kills else [])
    told = f"If these processes still run after one minute, {NOBODY} or root must end them"
    assert (told in text) == bool(kills)
    assert "no solution" in text
    assert ("env -u AVOCADO_VT_JOBLOCK" in text) == bool(kills or state is State.OUTER)
    assert ("\nThis job was started by 5, which" in text) == (state is State.OUTER)


def test_command_lines_are_tamed():
    """They are anybody's words."""
    odd = "\x1b[31m\n    kill 1\r\u202e" + "x" * 500
    text = in_the_way(State.LIVE, processes=[process(pid, command=odd) for pid in range(25)])
    assert r"\x1b[31m\n    kill 1\r\u202exxx" in text
    assert not set("\x1b\r\u202e") & set(text)
    listed = [line for line in text.splitlines() if "xxx" in line]
    assert len(listed) == 20
    assert max(map(len, listed)) < 200
    assert "\n    and 5 more\n" in text


def test_pid_of_another_namespace():
    assert "fuser" not in in_the_way(State.LIVE, pid=1)
    text = in_the_way(State.LIVE, pid=1, pid_is_here=False)
    assert "PID:    1\n" in text
    assert "another PID namespace or host" in text
    assert f"fuser -v '{PATH}'" in text


def test_what_to_do():
    """Remedies that help: another lock directory only where jobs may run at once."""
    held = in_the_way(State.LIVE)
    assert "set plugins.vtjoblock.timeout to have this one wait" in held
    assert "a lock directory\nof their own: plugins.vtjoblock.dir" in held
    waited = in_the_way(State.LIVE, waited=300.0)
    assert "out of time after 0:05:00: another job holds the lock" in waited
    outer = in_the_way(State.OUTER)
    assert "this is the job that you are in" in outer
    assert "timeout" not in outer
    assert "minute, root must end them" in in_the_way(State.LIVE, processes=[process(4, uid=0)])
    later = in_the_way(State.NOT_NOW, reason=Reason.HANGING, detail="77")
    assert "process 77 does not answer" in later
    assert "Start this job again" in later
    for text in (later, in_the_way(State.UNKNOWN, reason=Reason.NO_PID)):
        assert "plugins.vtjoblock.dir" not in text
    assert "rm " not in later


@pytest.mark.parametrize("reason", Reason)
def test_every_reason_has_words(reason):
    text = in_the_way(State.UNKNOWN, reason=reason, detail="DETAIL")
    assert re.search(rf"cannot tell whether a job still holds {PATH}: \S+", text)
    remove = "rm -r" if reason is Reason.NO_REGULAR_FILE else "rm"
    assert f"\n    {remove} '{PATH}'" in text
    assert "pgrep -af" in text


@pytest.mark.parametrize(
    ("number", "name", "told"),
    [
        (errno.ENOENT, "/locks", "does not exist"),
        (errno.ENOTDIR, "/locks", "is not a directory"),
        (errno.EACCES, "/locks", "cannot be opened: Permission denied"),
        (errno.EMFILE, "/locks", "cannot be opened: Too many open files"),
        (errno.ENOSPC, None, "cannot be written: No space left"),
        (errno.EROFS, "/locks/.a.pid", "cannot be written: Read-only"),
        (errno.ENOLCK, KERNEL_LOCK, "does not lock files: No locks available"),
    ],
)
def test_what_the_system_refuses(number, name, told):
    text = refusal(OSError(number, os.strerror(number), name))
    assert told in text
    assert "plugins.vtjoblock.dir = '/locks'" in text


def test_what_else_stops_a_job():
    # Another directory would not help.
    text = refusal(OSError(errno.EINVAL, os.strerror(errno.EINVAL), KERNEL_LOCK))
    assert "Linux 3.15" in text
    assert "plugins.vtjoblock.dir" not in text
    assert "RuntimeError: odd. Details are in /results/job.log." in refusal(RuntimeError("odd"))
    assert "it was interrupted before its tests" in refusal(KeyboardInterrupt())


def test_times_of_any_size_and_users_without_a_name():
    for when in (-(2**62), 0, 2**62):
        assert f"user:   {NOBODY}\n" in in_the_way(State.LIVE, since=float(when))
    assert "user:   root\n" in messages.describe(LockFile(PATH, uid=0, state=State.LIVE))
    assert messages.until(math.inf) == "for as long as it takes"
    assert re.fullmatch(r"until [\d-]{10} [\d:]{8}", messages.until(60.5))
