"""What /proc tells of processes, as proc(5) describes it.

A PID is a number in the PID namespace that this /proc shows. A start time is a number
of clock ticks since the host was booted. Together they name one process of this boot.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

#: How long a scan may look at a host on which processes come and go, in seconds.
SETTLE_TIMEOUT = 3.0
#: How long the command line of one process may be waited for, in seconds.
COMMAND_TIMEOUT = 1.0
#: How long a scan waits before it looks for what is new, in seconds.
ROUND_PAUSE = 0.005

# In the middle of an exec(2), and at its end, a process has no environment for some
# microseconds. So one that shows none is looked at again, for example at 0, 3 and 7 ms.
# A process that shows an environment at none of these looks was started without one.
EXEC_LOOKS = 3
#: How far the first and the last of these looks are apart, in seconds.
EXEC_TIME = 0.005
#: Used instead of EXEC_TIME where the command line is empty, too: such a process may be
#: stuck in exec(2).
BLANK_TIME = 0.5

#: PF_KTHREAD of the kernel's include/linux/sched.h, a flag in /proc/PID/stat.
_KERNEL_THREAD = 0x00200000
#: The user namespace in which a host begins, by PROC_USER_INIT_INO of the kernel's
#: include/linux/proc_ns.h.
_FIRST_USER_NAMESPACE = "user:[4026531837]"
#: The number of CAP_SYS_PTRACE in capabilities(7).
_CAP_SYS_PTRACE = 19


@dataclass(frozen=True)
class Stat:
    """What /proc/PID/stat tells of a process."""

    pid: int
    name: str
    parent: int  # 0 if it has none in this namespace
    started: int  # in ticks since boot
    has_ended: bool
    is_kernel_thread: bool


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
        """Whether nobody can tell what it is: it is stuck in exec(2), or at its end."""
        return self.has_no_environ and not self.command


def age(started: int) -> float:
    """Return how long ago a start time was, in seconds."""
    now = time.clock_gettime(time.CLOCK_BOOTTIME)
    return now - started / os.sysconf("SC_CLK_TCK")


def ticks_ago(seconds: float) -> int:
    """Return the start time of a process that would have started so long ago."""
    now = time.clock_gettime(time.CLOCK_BOOTTIME)
    return int((now - seconds) * os.sysconf("SC_CLK_TCK"))


def read_stat(pid: int) -> Stat:
    """Read the status of a process.

    :raises OSError: when there is no such process, or it is hidden
    """
    with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
        text = os.fsdecode(file.read())
    # For example: 4242 (qemu-system-x86) S 1 4242 4242 0 -1 4194560 9012 0 0 0 12 5 ...
    # The name in parentheses may itself hold any, so the last ")" ends it.
    head, _, tail = text.rpartition(")")
    fields = tail.split()
    state, parent, flags = fields[0], int(fields[1]), int(fields[6])
    threads, started = int(fields[17]), int(fields[19])
    return Stat(
        pid=pid,
        name=head.partition("(")[2],
        parent=parent,
        started=started,
        # A process of which only the first thread has ended looks like a zombie, too.
        has_ended=state in ("Z", "X") and threads <= 1,
        is_kernel_thread=bool(flags & _KERNEL_THREAD),
    )


def is_running(pid: int, started: int) -> bool:
    """Tell whether a process, named by PID and start time, has not ended."""
    try:
        stat = read_stat(pid)
    except OSError:
        return False
    return stat.started == started and not stat.has_ended


def own_pid() -> int:
    """Return the PID of this process in the namespace that /proc shows.

    :raises OSError: when /proc does not show this process
    """
    return int(os.readlink("/proc/self"))


def shows_own_namespace() -> bool:
    """Tell whether the PIDs in /proc are those that system calls use here."""
    try:
        return own_pid() == os.getpid()
    except OSError:
        return False


def ancestors() -> set[int]:
    """Return the PIDs of the parent of this process, of its parent, and so on.

    The list ends at the first one that /proc hides, one of another user maybe.
    """
    found: set[int] = set()
    with contextlib.suppress(OSError):
        pid = read_stat(own_pid()).parent
        while pid and pid not in found:
            found.add(pid)
            pid = read_stat(pid).parent
    return found


def has_open(pid: int, file_name: str) -> bool:
    """Tell whether a process has a file of this name open, in whatever directory.

    The links of its descriptors are not followed: they may lead to storage that is
    dead.

    :raises PermissionError: when its descriptors may not be read
    :raises OSError: when there is no such process
    """
    with os.scandir(f"/proc/{pid}/fd") as links:
        for link in links:
            # A descriptor may be closed meanwhile.
            with contextlib.suppress(FileNotFoundError):
                if file_name in os.readlink(link):
                    return True
    return False


def read_command(pid: int) -> bytes:
    """Return the command line of a process, each word with a NUL at its end."""
    return _read_memory(pid, "cmdline") or b""


def read_command_in_time(pid: int) -> bytes:
    """Return the command line of a process, or nothing if it takes too long."""
    words: list[bytes] = []

    def read() -> None:
        with contextlib.suppress(OSError):
            words.append(read_command(pid))

    with contextlib.suppress(RuntimeError):  # No thread can be started.
        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        thread.join(COMMAND_TIMEOUT)
    return words[0] if words else b""


def hides_others() -> bool:
    """Tell whether /proc hides processes of other users from this process.

    :raises OSError: when the mounts or the capabilities cannot be read
    """
    options = ""
    with open("/proc/self/mounts", encoding="utf-8", errors="replace") as file:
        for line in file:
            # proc /proc proc rw,nosuid,nodev,noexec,relatime,hidepid=invisible 0 0
            fields = line.split(" ")
            # Of several mounts there the last one is on top.
            if fields[1] == "/proc":
                options = fields[3]
    return "hidepid=" in options and not _sees_all()


def _sees_all() -> bool:
    """Tell whether this process may see all that hidepid hides from others."""
    if is_in_user_namespace():
        return False
    with open("/proc/self/status", encoding="utf-8", errors="replace") as file:
        for line in file:
            # CapEff:	000001ffffffffff
            if line.startswith("CapEff:"):
                return bool(int(line.split()[1], 16) >> _CAP_SYS_PTRACE & 1)
    return False


def is_in_user_namespace() -> bool:
    """Tell whether this process is in a user namespace, as in a toolbox.

    There it cannot read some processes of its own user.

    :raises OSError: when that cannot be read
    """
    try:
        return os.readlink("/proc/self/ns/user") != _FIRST_USER_NAMESPACE
    except FileNotFoundError:
        return False  # The kernel has no user namespaces.


class Scan:
    """A bounded look at all processes but this one.

    It reads in a thread of its own. To read the environment of a process may take for
    ever, when that process waits for storage that is dead; then the thread is left
    behind.

    :param since: a start time in ticks; what has started before is not read
    :param timeout: how long it may take, in seconds
    :param visit: called once, in the thread, with each process that was read
    :raises RuntimeError: when no thread can be started
    """

    def __init__(
        self, since: int, timeout: float, visit: Callable[[Process], None]
    ) -> None:
        self.denied: list[Process] = []  # those whose environment may not be read
        self.hides_others = False  # whether /proc hides processes of other users
        self.is_in_user_namespace = False  # whether some cannot be read here
        # The result, when wait() has returned.
        self.is_complete = False  # whether no process can have been missed
        self.hanging: Stat | None = None  # the process that was not read in time
        self.problem: OSError | None = None  # why none can be seen
        self._since = since
        self._timeout = timeout
        # In the second half of the time no new read is begun. A thread that is still
        # there at the end is stuck in one.
        self._deadline = time.monotonic() + min(SETTLE_TIMEOUT, timeout / 2)
        self._visit = visit
        self._has_seen_all = False
        self._failure: BaseException | None = None
        self._at: Stat | None = None  # the process that is being read
        self._done: dict[int, int] = {}  # the start times of what was read, by PID
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
        try:
            self.hides_others = hides_others()
            self.is_in_user_namespace = is_in_user_namespace()
            own = read_stat(own_pid())
            self._done[own.pid] = own.started
            while not self._has_seen_all and time.monotonic() < self._deadline:
                self._has_seen_all = self._look_at_all()
        except OSError as error:
            self.problem = error
        except BaseException as error:
            self._failure = error

    def _look_at_all(self) -> bool:
        """Read what has not been read; return whether that is all there is."""
        some_ended = False
        listed = {int(name) for name in os.listdir("/proc") if name.isdigit()}
        self._forget_gone(listed)
        for pid in listed - self._done.keys():
            if time.monotonic() > self._deadline:
                return False
            try:
                self._look_at(pid)
            except (FileNotFoundError, ProcessLookupError):
                # It may have started a child after /proc was listed: only another
                # round shows that.
                some_ended = True
            except PermissionError:
                self._note_hidden(pid)
        is_all = not some_ended and listed <= self._done.keys()
        if not is_all and not some_ended:
            time.sleep(ROUND_PAUSE)
        return is_all

    def _forget_gone(self, listed: set[int]) -> None:
        """Forget what has ended: its PID may be that of another process now."""
        for pid, started in list(self._done.items()):
            if pid not in listed or not self._is_same(pid, started):
                del self._done[pid]

    def _is_same(self, pid: int, started: int) -> bool:
        with contextlib.suppress(
            PermissionError, FileNotFoundError, ProcessLookupError
        ):
            return read_stat(pid).started == started
        return True  # Hidden: no more is known. Gone: the next listing lacks it.

    def _look_at(self, pid: int) -> None:
        """Read a process, and be done with it unless it is in the middle of an exec."""
        stat = self._at = read_stat(pid)
        if stat.started < self._since:
            self._done[pid] = stat.started
            return
        if stat.has_ended:
            self._done[pid] = stat.started
            raise ProcessLookupError
        command = read_command(pid)
        environ = _read_memory(pid, "environ")
        if environ == b"":
            environ = _read_environ_of_threads(pid)
        uid = os.stat(f"/proc/{pid}").st_uid
        process = Process(stat, uid, command, environ)
        if self._is_in_exec(process):
            return
        self._done[pid] = stat.started
        if environ is None:
            self.denied.append(process)
        self._visit(process)

    def _note_hidden(self, pid: int) -> None:
        """Note a process that hidepid=1 lists, but does not let be read."""
        self._done[pid] = 0
        with contextlib.suppress(OSError):
            uid = os.stat(f"/proc/{pid}").st_uid
            unknown = Stat(
                pid, "", 0, self._since, has_ended=False, is_kernel_thread=False
            )
            self.denied.append(Process(unknown, uid, b"", None))

    def _is_in_exec(self, process: Process) -> bool:
        """Tell whether a process is looked at again: it shows no environment now."""
        if not process.has_no_environ:
            return False
        now = time.monotonic()
        key = (process.stat.pid, process.stat.started)
        looks = self._looks.setdefault(key, _Looks(now))
        looks.count += 1
        limit = BLANK_TIME if process.is_blank else EXEC_TIME
        return looks.count < EXEC_LOOKS or now - looks.first < limit


@dataclass
class _Looks:
    """How often, and since when, a process has shown no environment."""

    first: float
    count: int = 0


def _read_memory(pid: int | str, what: str) -> bytes | None:
    """Read a file of /proc/PID that shows its memory; None where that is denied."""
    try:
        with open(f"/proc/{pid}/{what}", "rb", buffering=0) as file:
            return file.readall()
    except PermissionError:
        return None
    except ProcessLookupError:
        return b""  # It has no memory any more, or is a thread of the kernel.


def _read_environ_of_threads(pid: int) -> bytes:
    """Return the environment that other threads show after the first one has ended."""
    for thread in os.listdir(f"/proc/{pid}/task"):
        environ = _read_memory(f"{pid}/task/{thread}", "environ")
        if environ:
            return environ
    return b""
