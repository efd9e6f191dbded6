"""What /proc tells of processes, as proc(5) describes it.

A PID is a number in the PID namespace that this /proc shows. A start time is a number
of clock ticks since the host was booted. Together they name one process of this boot.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from dataclasses import dataclass

#: How long to wait for the command line of one process, in seconds.
COMMAND_TIMEOUT = 1.0

#: PF_KTHREAD of the kernel's include/linux/sched.h, a flag in /proc/PID/stat.
_KERNEL_THREAD = 0x00200000
#: The first user namespace of a host, by PROC_USER_INIT_INO of the kernel's
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


def age(started: int) -> float:
    """Return how long ago a start time was, in seconds."""
    now = time.clock_gettime(time.CLOCK_BOOTTIME)
    return now - started / os.sysconf("SC_CLK_TCK")


def ticks_ago(seconds: float) -> int:
    """Return the start time, in ticks, of a process that started so long ago."""
    now = time.clock_gettime(time.CLOCK_BOOTTIME)
    return int((now - seconds) * os.sysconf("SC_CLK_TCK"))


def read_stat(pid: int) -> Stat:
    """Read the status of a process.

    :raises OSError: when there is no such process, or it is hidden
    """
    with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
        text = os.fsdecode(file.read())
    # For example: 4242 (qemu-system-x86) S 1 4242 4242 0 -1 4194560 9012 0 0 0 12 5 ...
    # The name may itself hold parentheses, so the last ")" ends it.
    head, _, tail = text.rpartition(")")
    fields = tail.split()
    state, parent, flags = fields[0], int(fields[1]), int(fields[6])
    threads, started = int(fields[17]), int(fields[19])
    return Stat(
        pid=pid,
        name=head.partition("(")[2],
        parent=parent,
        started=started,
        # The state is Z also if only the first thread of several has ended.
        has_ended=state in ("Z", "X") and threads <= 1,
        is_kernel_thread=bool(flags & _KERNEL_THREAD),
    )


def is_running(pid: int, started: int) -> bool:
    """Tell whether a process, named by PID and start time, is seen to run."""
    try:
        stat = read_stat(pid)
    except OSError:
        return False
    return stat.started == started and not stat.has_ended


def may_run(pid: int, started: int | None = None) -> bool:
    """Tell whether a process may still run. If /proc hides it, it may.

    :param pid: its PID in the namespace of this process
    :param started: its start time in ticks; None where that is unknown
    :return: False only if it is certain that it has ended
    """
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass  # It is another user's.
    if not shows_own_namespace():
        return True
    try:
        stat = read_stat(pid)
    except OSError:
        return True
    return not stat.has_ended and started in (None, stat.started)


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

    They end at the first one that /proc hides, maybe one of another user.
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
                # Such as "/tmp/NAME", or "/tmp/NAME (deleted)".
                if file_name in os.readlink(link):
                    return True
    return False


def read_command(pid: int) -> bytes:
    """Return the command line of a process, each word with a NUL at its end."""
    return read_memory(pid, "cmdline") or b""


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
            # If there are several mounts the last one is on top.
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


def read_memory(pid: int | str, what: str) -> bytes | None:
    """Read a file of /proc/PID that shows its memory; None where that is denied.

    :raises FileNotFoundError: when there is no such process
    """
    try:
        with open(f"/proc/{pid}/{what}", "rb", buffering=0) as file:
            return file.readall()
    except PermissionError:
        return None
    except ProcessLookupError:
        return b""  # It has no memory any more, or is a thread of the kernel.
