"""A scan: a bounded look at all processes of the host but this one.

It must miss no process of a job, though processes start and end while it looks. So it
makes rounds. In each round it lists /proc, and reads the processes that are new in the
list. The scan is complete after a round in which it has read every new process before
that process ended. If one ended before it was read, it may have started a child after
/proc was listed. Only another round shows that child.

To read a process may take for ever, if that process waits for storage that is dead. So
a scan reads in a thread of its own. A thread that cannot go on is left behind.
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

#: For how long a scan makes rounds, in seconds: on a busy host some process may end in
#: each of them.
SETTLE_TIMEOUT = 3.0
#: How long it waits between two rounds in which nothing has ended, in seconds.
ROUND_PAUSE = 0.005

# During an exec(2), and when a process ends, it shows no environment for some
# microseconds, or that is denied. So such a process is read again in the next rounds.
# If it never shows one it was started without, or may really not be read.
#: How often such a process is read, at least. EXEC_TIME alone is not enough: on a busy
#: host the process may not have run at all in that time.
EXEC_READS = 3
#: How much time is between the first and the last of these reads, at least, in seconds.
EXEC_TIME = 0.005
#: Used instead of EXEC_TIME for a process that shows no command line either, since it
#: may be stuck in its exec(2); in seconds.
BLANK_TIME = 0.5


@dataclass(frozen=True)
class Process:
    """A process, by all that can be read of it."""

    stat: Stat
    uid: int  # the effective user id; 0 where it is not dumpable, see proc(5)
    command: bytes  # the words of its command line, each with a NUL at its end
    environ: bytes | None  # its variables, in the same way; None where that is denied

    @property
    def has_no_environ(self) -> bool:
        """Whether it shows an empty environment, though it is no kernel thread."""
        return self.environ == b"" and not self.stat.is_kernel_thread

    @property
    def is_blank(self) -> bool:
        """Whether it shows no command line either, so that nobody can tell what it is.

        It is stuck in its exec(2), or about to end.
        """
        return self.has_no_environ and not self.command


@dataclass
class _Reads:
    """How often, and since when, a process has shown no environment."""

    first: float  # by the monotonic clock
    count: int = 0


class Scan:
    """A scan of the processes that have started at a certain time or later.

    :param since: that time, in ticks since boot
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
        self.problem: OSError | None = None  # why no process can be seen
        # How it works.
        self._since = since
        self._timeout = timeout
        self._visit = visit
        # After this moment no new read begins. The time from here to the timeout is for
        # the last read: if that has not ended by the timeout, its process hangs.
        self._deadline = time.monotonic() + min(SETTLE_TIMEOUT, timeout / 2)
        self._has_seen_all = False
        self._failure: BaseException | None = None
        self._at: Stat | None = None  # the process that is being read
        # What is not to be read again: PIDs with their start times, or None for one
        # whose start time is hidden.
        self._done: dict[int, int | None] = {}
        # The reads of processes that show no environment, by PID and start time.
        self._reads: dict[tuple[int, int], _Reads] = {}
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until the scan is over, or its time is up: then a process hangs.

        :raises Exception: an unforeseen error in the thread
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
        done_before = dict(self._done)
        some_ended = False
        # New ones are read first, since on a busy host many of them end soon.
        for pid in listed - done_before.keys():
            if time.monotonic() > self._deadline:
                return False
            if not self._look_at(pid):
                some_ended = True
        for pid, started in done_before.items():
            if pid not in listed or not _may_be_the_same(pid, started):
                # The process has ended. A new one with this PID is to be read.
                del self._done[pid]
        if some_ended:
            return False
        has_seen_all = listed <= self._done.keys()
        if not has_seen_all:
            time.sleep(ROUND_PAUSE)
        return has_seen_all

    def _look_at(self, pid: int) -> bool:
        """Read a process if that is of use; return False if it has ended."""
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

        With hidepid=1 that is all that /proc shows of other users' processes. Its start
        time is unknown: with the time of now it may be of any job.
        """
        self._done[pid] = None
        with contextlib.suppress(OSError):
            uid = os.stat(f"/proc/{pid}").st_uid
            unknown = Stat(
                pid, "", 0, procfs.ticks_ago(0), has_ended=False, is_kernel_thread=False
            )
            self.denied.append(Process(unknown, uid, b"", None))

    def _is_to_be_read_again(self, process: Process) -> bool:
        """Tell whether a process shows no environment, but soon may, or may end."""
        # It may have ended since its command line was read, see _read().
        is_denied = process.environ is None and process.uid == os.geteuid()
        if not process.has_no_environ and not is_denied:
            return False
        now = time.monotonic()
        key = (process.stat.pid, process.stat.started)
        reads = self._reads.setdefault(key, _Reads(now))
        reads.count += 1
        limit = BLANK_TIME if process.is_blank else EXEC_TIME
        return reads.count < EXEC_READS or now - reads.first < limit


def _may_be_the_same(pid: int, started: int | None) -> bool:
    """Tell whether a PID may still be that of the process that was read."""
    with contextlib.suppress(PermissionError, FileNotFoundError, ProcessLookupError):
        return procfs.read_stat(pid).started == started
    # It is hidden, and nobody can tell. Or it has ended: the next round removes it.
    return True


def _read(stat: Stat) -> Process:
    """Read what is not in the status of a process.

    :raises OSError: when it has ended
    """
    command = procfs.read_command(stat.pid)
    environ = procfs.read_memory(stat.pid, "environ")
    uid = os.stat(f"/proc/{stat.pid}").st_uid
    if environ is None and not command and uid == os.geteuid():
        # When a process or its first thread ends, its environment is gone. Root sees
        # an empty one then, but to the user of the process it is denied.
        environ = b""
    if environ == b"":
        environ = _read_environ_of_threads(stat.pid)
    return Process(stat, uid, command, environ)


def _read_environ_of_threads(pid: int) -> bytes:
    """Return the environment that other threads show after the first one has ended."""
    for thread in os.listdir(f"/proc/{pid}/task"):
        environ = procfs.read_memory(f"{pid}/task/{thread}", "environ")
        if environ:
            return environ
    return b""
