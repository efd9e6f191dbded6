"""A scan: a bounded look at all processes of the host but this one.

Processes start and end while it looks, and it must miss none. So it goes in rounds: in
each it lists /proc and reads the processes that are new. It has seen all when a round
finds nothing new, and none has ended during that round.

To read a process may take for ever, when that process waits for storage that is dead.
So a scan reads in a thread of its own. Such a thread is left behind.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from avocado_vt_joblock import procfs
from avocado_vt_joblock.procfs import Stat

#: For how long a scan makes rounds, in seconds: on a busy host processes may start for
#: ever.
SETTLE_TIMEOUT = 3.0
#: How long it waits between two rounds in which nothing has ended, in seconds.
ROUND_PAUSE = 0.005

# During an exec(2), and when it ends, a process shows no environment for some
# microseconds. So one that shows none is read again in the next rounds. If it still
# shows none after that it was started without one.
#: How often it is read at least.
EXEC_LOOKS = 3
#: How far the first and the last of these looks are apart at least, in seconds.
EXEC_TIME = 0.005
#: The same where its command line is empty, too: it may be stuck in its exec(2).
BLANK_TIME = 0.5


@dataclass(frozen=True)
class Process:
    """A process, by all that can be read of it."""

    stat: Stat
    uid: int  # the effective user id; 0 where it is not dumpable, see proc(5)
    command: bytes  # the words of its command line, each with a NUL at its end
    environ: bytes | None  # the same of its environment; None where that is denied

    @property
    def has_no_environ(self) -> bool:
        """Whether it shows an empty environment, as a kernel thread always does."""
        return self.environ == b"" and not self.stat.is_kernel_thread

    @property
    def is_blank(self) -> bool:
        """Whether it shows no command line either, so that nobody can tell what it is.

        It is stuck in its exec(2), or about to end.
        """
        return self.has_no_environ and not self.command


@dataclass
class _Looks:
    """How often, and since when, a process has shown no environment."""

    first: float  # by the monotonic clock
    count: int = 0


class Scan:
    """A scan of the processes that have not started before a certain time.

    :param since: that time, in ticks
    :param timeout: how long the scan may take, in seconds
    :param visit: called in the thread, once with each process that was read
    :raises RuntimeError: when no thread can be started
    """

    def __init__(
        self, since: int, timeout: float, visit: Callable[[Process], None]
    ) -> None:
        # The result, when wait() has returned.
        self.is_complete = False  # whether no process can have been missed
        self.denied: list[Process] = []  # those whose environment may not be read
        self.hides_others = False  # whether /proc hides processes of other users
        self.is_in_user_namespace = False  # whether some cannot be read here
        self.hanging: Stat | None = None  # the process that was not read in time
        self.problem: OSError | None = None  # why none can be seen
        # How it works.
        self._since = since
        self._timeout = timeout
        self._visit = visit
        # Then no more reads begin. The rest of the time is for the read that is under
        # way: if that does not end by then, its process hangs.
        self._deadline = time.monotonic() + min(SETTLE_TIMEOUT, timeout / 2)
        self._has_seen_all = False
        self._failure: BaseException | None = None
        self._at: Stat | None = None  # the process that is being read
        # What is not to be read again: PIDs with their start times, or None for one
        # whose start time is hidden.
        self._done: dict[int, int | None] = {}
        # Of processes without an environment, named by PID and start time.
        self._looks: dict[tuple[int, int], _Looks] = {}
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until the scan is over, or a process hangs, or the time is over.

        :raises Exception: whatever nobody has foreseen in the thread
        """
        self._thread.join(self._timeout)
        if not self.is_running:
            self.is_complete = self._has_seen_all
        else:
            # Whatever the thread does from now on, the scan stays incomplete.
            self.hanging = self._at
        if self._failure:
            raise self._failure

    @property
    def is_running(self) -> bool:
        """Whether its thread has not ended."""
        return self._thread.is_alive()

    def _run(self) -> None:
        """Make rounds: what the thread does."""
        try:
            self.hides_others = procfs.hides_others()
            self.is_in_user_namespace = procfs.is_in_user_namespace()
            own = procfs.read_stat(procfs.own_pid())
            self._done[own.pid] = own.started
            while not self._has_seen_all and time.monotonic() < self._deadline:
                self._has_seen_all = self._make_round()
        except OSError as error:
            self.problem = error
        except BaseException as error:
            self._failure = error

    def _make_round(self) -> bool:
        """Read the processes that are new; return whether all have been seen."""
        listed = {int(name) for name in os.listdir("/proc") if name.isdigit()}
        self._forget_ended(listed)
        some_ended = False
        for pid in listed - self._done.keys():
            if time.monotonic() > self._deadline:
                return False
            if not self._look_at(pid):
                some_ended = True
        if some_ended:
            # One may have started a child after /proc was listed.
            return False
        has_seen_all = listed <= self._done.keys()
        if not has_seen_all:
            time.sleep(ROUND_PAUSE)
        return has_seen_all

    def _forget_ended(self, listed: set[int]) -> None:
        """Have a PID read again if another process may have it now."""
        for pid, started in list(self._done.items()):
            if pid not in listed or not _may_have_started(pid, started):
                del self._done[pid]

    def _look_at(self, pid: int) -> bool:
        """Read a process if that is of use; return whether it has not ended."""
        try:
            stat = self._at = procfs.read_stat(pid)
            if stat.started < self._since:
                self._done[pid] = stat.started
                return True
            if stat.has_ended:
                self._done[pid] = stat.started
                return False
            process = _read(stat)
        except (FileNotFoundError, ProcessLookupError):
            return False
        except PermissionError:
            self._note_hidden(pid)
            return True
        if self._is_to_be_read_again(process):
            return True
        self._done[pid] = stat.started
        if process.environ is None:
            self.denied.append(process)
        self._visit(process)
        return True

    def _note_hidden(self, pid: int) -> None:
        """Note a process of which only the PID and the user can be seen.

        With hidepid=1 that is all that /proc shows of other users' processes. As its
        start time is not known, it counts as one that has not started too early.
        """
        self._done[pid] = None
        with contextlib.suppress(OSError):
            uid = os.stat(f"/proc/{pid}").st_uid
            unknown = Stat(
                pid, "", 0, self._since, has_ended=False, is_kernel_thread=False
            )
            self.denied.append(Process(unknown, uid, b"", None))

    def _is_to_be_read_again(self, process: Process) -> bool:
        """Tell whether a process may only show no environment for the moment."""
        if not process.has_no_environ:
            return False
        now = time.monotonic()
        key = (process.stat.pid, process.stat.started)
        looks = self._looks.setdefault(key, _Looks(now))
        looks.count += 1
        limit = BLANK_TIME if process.is_blank else EXEC_TIME
        return looks.count < EXEC_LOOKS or now - looks.first < limit


def _may_have_started(pid: int, started: int | None) -> bool:
    """Tell whether a PID may still be that of a process with this start time."""
    with contextlib.suppress(PermissionError, FileNotFoundError, ProcessLookupError):
        return procfs.read_stat(pid).started == started
    # It is hidden, so nobody can tell, or it is gone, so the next listing lacks it.
    return True


def _read(stat: Stat) -> Process:
    """Read what is not in the status of a process.

    :raises OSError: when it has ended
    """
    command = procfs.read_command(stat.pid)
    environ = procfs.read_memory(stat.pid, "environ")
    if environ == b"":
        environ = _read_environ_of_threads(stat.pid)
    uid = os.stat(f"/proc/{stat.pid}").st_uid
    return Process(stat, uid, command, environ)


def _read_environ_of_threads(pid: int) -> bytes:
    """Return the environment that other threads show after the first one has ended."""
    for thread in os.listdir(f"/proc/{pid}/task"):
        environ = procfs.read_memory(f"{pid}/task/{thread}", "environ")
        if environ:
            return environ
    return b""
