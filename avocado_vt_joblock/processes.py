"""Processes, as ``/proc`` shows them: which are of a job, and whether one may have written a file.

A job marks its own process with an environment variable, which all that it starts inherits: the
runners, their tests, the guests and the helpers of these. Others find it in ``/proc/PID/environ``,
which only the user of a process and root may read. The command line of a test, which everybody may
read, names the job as well.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import hashlib
import os
import re
import threading
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

#: How far the clocks that date a file and a process may be apart, in seconds.
CLOCK_SLACK = 10.0
#: How long to look again and again at processes that come and go, in seconds.
SETTLE_TIMEOUT = 3.0
#: How long to look at all processes: one that hangs may hold up whoever looks at it.
LOOK_TIMEOUT = 5.0
#: How often to look before it is believed that a process has no environment, and how long to wait
#: in between, in seconds.
BARE_LOOKS = 3
PAUSE = 0.005

_MARK = "AVOCADO_VT_JOBLOCK_"
_JOB_ID = re.compile(r"[0-9a-f]{40}")
# The flag PF_KTHREAD and the states of what has ended, of proc_pid_stat(5).
_KERNEL_THREAD = 0x00200000
_ENDED = ("Z", "X")
#: Tells this process from others; a PID is used again, in a container for example.
_this_process = ""


def _name_this_process() -> None:
    global _this_process
    _this_process = os.urandom(4).hex()


_name_this_process()
os.register_at_fork(after_in_child=_name_this_process)


class Process(NamedTuple):
    """A process that was found running."""

    pid: int
    #: The command line, or the name in brackets where there is none; it can be anybody's words.
    command: str
    #: When it started, in clock ticks since the system did.
    started: int
    #: Whether it runs a test, by its command line.
    is_test: bool
    #: Its real user id.
    uid: int

    def is_running(self) -> bool:
        """Tell whether it still runs; another process that has its PID now is another one."""
        try:
            stat = _stat(self.pid)
        except OSError:
            return False
        return stat.started == self.started and not stat.has_ended


class Traces(NamedTuple):
    """By what the processes of a job are known."""

    #: The last part of the path that the job's process was marked with.
    mark: str
    #: As :func:`job_key` makes it.
    job_id: str
    #: Whose processes count, and root's always do. Anybody can set a variable or a command line.
    uids: frozenset[int]


class Left(NamedTuple):
    """What was found of a job."""

    processes: list[Process]
    #: Why there may be others; empty where all could be seen.
    unseen: str


def job_key(job_id: str) -> str:
    """Make 40 hexadecimal digits of a job id: of one that is no such number its SHA-1."""
    key = job_id.lower()
    if _JOB_ID.fullmatch(key):
        return key
    return hashlib.sha1(key.encode(errors="surrogatepass"), usedforsecurity=False).hexdigest()


def mark(path: str) -> str:
    """Mark this process, and so all that it starts from now on.

    :param path: what the mark says; its last part tells jobs apart
    :return: the environment variable, for :func:`unmark`
    """
    # One for each mark, since a process may have several jobs, one after the other or in threads.
    variable = f"{_MARK}{_this_process}_{os.urandom(4).hex()}"
    os.environ[variable] = path
    return variable


def unmark(variable: str) -> None:
    """Take a mark back from this process; what has inherited it keeps it."""
    os.environ.pop(variable, None)


def left_of(jobs: Sequence[Traces]) -> list[Left]:
    """Find the processes of jobs in one pass over ``/proc``; this process does not count.

    :param jobs: what to look for
    """
    search = _Search(jobs)
    # In a thread, to leave it behind where the kernel does not answer: who reads the environment of
    # a process waits while its memory is changed, and that may wait for storage that is dead.
    thread = threading.Thread(target=search.run, daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        # At the end of the interpreter some Pythons start none.
        return [Left([], str(error)) for _ in jobs]
    thread.join(LOOK_TIMEOUT)
    return search.result()


def may_have_written(pid: int, when: float) -> bool:
    """Tell whether a process may be the one that wrote its PID into a file.

    The facts are from kill(2) and proc_pid_stat(5).

    :param pid: the process, in the PID namespace of this one
    :param when: when the file was written, in seconds since the Epoch
    :return: False only where there is no such process, or where it started after that
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    try:
        if os.readlink("/proc/self") != str(os.getpid()):
            return True  # This /proc shows another PID namespace.
        stat = _stat(pid)
    except OSError:
        return True
    started = boot_time() + stat.started / os.sysconf("SC_CLK_TCK")
    return not stat.has_ended and started <= when + CLOCK_SLACK


def boot_time() -> float:
    """Tell when this system started, in seconds since the Epoch by the clock as it is set now."""
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)


class _Look(NamedTuple):
    """What is to be seen of a process; None for what this user may not see."""

    environ: bytes | None
    words: list[bytes] | None
    #: The id of the job whose test it runs, if it does.
    test_of: str | None = None
    #: The process, where it may be of a job.
    process: Process | None = None

    @property
    def is_bare(self) -> bool:
        """Whether there is nothing to be seen where something could be."""
        return not self.environ and (self.environ is not None or self.words == [])


class _Search:
    """A pass over ``/proc`` for processes of jobs, as far as it has got."""

    def __init__(self, jobs: Sequence[Traces]) -> None:
        self._jobs = jobs
        self._found: list[list[Process]] = [[] for _ in jobs]
        self._sees_others = os.geteuid() == 0
        self._looked_at = "1"
        self._problem = ""
        self._is_done = False

    def run(self) -> None:
        """Search; what goes wrong is part of the result."""
        try:
            for look in self._looks():
                self._sees_others |= look.environ is None and look.words is not None
                for job, processes in zip(self._jobs, self._found):
                    if look.process and _is_of(job, look, look.process.uid):
                        processes.append(look.process)
        except OSError as error:
            self._problem = str(error.strerror)
        except Exception as error:
            self._problem = repr(error)
        self._is_done = True

    def result(self) -> list[Left]:
        """Tell what has been found up to now."""
        # In this order, since it may come to its end just now.
        if self._is_done:
            problem = self._problem
        else:
            problem = f"it took more than {LOOK_TIMEOUT:g} s, process {self._looked_at} may hang"
        left = []
        for job, found in zip(self._jobs, self._found):
            processes = sorted(found)
            unseen = problem
            if problem:
                # Some may have ended long ago.
                processes = [process for process in processes if process.is_running()]
            elif not self._sees_others and os.geteuid() not in job.uids:
                unseen = "it hides the processes of other users"
            left.append(Left(processes, unseen))
        return left

    def _looks(self) -> Iterator[_Look]:
        """Look at each process but this one, until two rounds in which none ended and none changed.

        What ended before it was looked at may have forked one that a later round shows. One round
        is not enough: a listing goes from the lowest PID to the highest, so it misses what ends and
        has forked one with a lower PID, since PIDs start again one day. In the middle of an exec a
        process has neither environment nor command line for a moment; one that has none for long,
        at its end for example, comes last.

        :raises OSError: when ``/proc`` does not even show this process, or is never at rest
        """
        # Not getpid(): this /proc may show another PID namespace.
        done = {os.readlink("/proc/self")}
        times_bare: collections.Counter[str] = collections.Counter()
        deadline = time.monotonic() + SETTLE_TIMEOUT
        quiet_rounds = 0
        while quiet_rounds < 2:
            ended = False
            bare = {}
            there = [name for name in os.listdir("/proc") if name.isdigit()]
            done.intersection_update(there)
            for pid in [pid for pid in there if pid not in done]:
                self._looked_at = pid
                try:
                    look = _look_at(pid)
                except (FileNotFoundError, ProcessLookupError):
                    ended = True
                    done.add(pid)
                    continue
                if look and look.is_bare:
                    times_bare[pid] += 1
                    # What has a command line has an empty environment indeed.
                    if not look.words or times_bare[pid] < BARE_LOOKS:
                        bare[pid] = look
                        continue
                done.add(pid)
                if look:
                    yield look
            if not ended and not bare:
                quiet_rounds += 1
                continue
            quiet_rounds = 0
            if time.monotonic() > deadline:
                break
            if not ended:
                time.sleep(PAUSE)
        if ended or any(times_bare[pid] < BARE_LOOKS for pid in bare):
            raise OSError(errno.EAGAIN, "processes come and go too fast")
        yield from bare.values()


def _look_at(pid: str) -> _Look | None:
    """Look at a process; return None for a thread of the kernel.

    :raises FileNotFoundError: when it has ended
    :raises ProcessLookupError: when it has ended
    """
    environ, command = _read(pid, "environ"), _read(pid, "cmdline")
    if not environ and command == b"":
        stat = _stat(int(pid))
        if stat.flags & _KERNEL_THREAD:
            return None
        if stat.state in _ENDED and not stat.has_ended:
            environ, command = _read_of_threads(pid)
    words = None if command is None else command.split(b"\0")[:-1]
    test_of = _test_of(words or [])
    bare = not environ and words == []
    if not bare and not test_of and _MARK.encode() not in (environ or b""):
        return _Look(environ, words)
    # What ends while this is read counts as ended, not as seen.
    stat = _stat(int(pid))
    if stat.has_ended:
        raise ProcessLookupError
    text = os.fsdecode(b" ".join(words or [])) or f"[{stat.name}]"
    process = Process(int(pid), text, stat.started, test_of is not None, _user(pid))
    return _Look(environ, words, test_of, process)


def _read_of_threads(pid: str) -> tuple[bytes | None, bytes | None]:
    """Read environment and command line of a process whose first thread has ended.

    Its other threads come and go as well; empty is what no thread shows.
    """
    environ: bytes | None = b""
    command: bytes | None = b""
    for thread in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(FileNotFoundError):
            place = f"{pid}/task/{thread}"
            environ, command = _read(place, "environ"), _read(place, "cmdline")
            if environ or command:
                break
    return environ, command


def _test_of(words: list[bytes]) -> str | None:
    """Find the id of the job whose test a command line of Avocado runs."""
    try:
        return job_key(os.fsdecode(words[words.index(b"-j", words.index(b"task-run")) + 1]))
    except (ValueError, IndexError):
        return None


def _is_of(job: Traces, look: _Look, uid: int) -> bool:
    if look.is_bare and not look.words:
        # It is held up in an exec or at its end, and nobody can tell what it is.
        return uid in job.uids
    marks = _marks(look.environ or b"")
    if job.mark not in marks:
        # Whose environment is not to be seen is known by its command line.
        is_of = look.test_of == job.job_id and not marks
    elif not look.test_of or look.test_of == job.job_id:
        is_of = True
    else:
        # Jobs at the same time in one process share its marks: this may be a test of another one.
        siblings = [name for name, holder in marks.items() if holder == marks[job.mark]]
        is_of = not any(look.test_of in name for name in siblings)
    return is_of and uid in {*job.uids, 0}


def _marks(environ: bytes) -> dict[str, str]:
    """The last parts of what a process is marked with, each with the process that marked it."""
    marks = {}
    for entry in os.fsdecode(environ).split("\0"):
        if entry.startswith(_MARK):
            variable, _, path = entry.partition("=")
            marks[path.rpartition("/")[2]] = variable.rpartition("_")[0]
    return marks


class _Stat(NamedTuple):
    name: str
    state: str
    started: int
    flags: int
    threads: int

    @property
    def has_ended(self) -> bool:
        """Whether it is a zombie; a process whose first thread alone has ended looks like one."""
        return self.state in _ENDED and self.threads <= 1


def _stat(pid: int) -> _Stat:
    """Read what proc_pid_stat(5) describes."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        # The name, in parentheses, may hold anything.
        head, _, tail = os.fsdecode(file.read()).rpartition(")")
    fields = tail.split()
    started, flags, threads = (int(fields[index]) for index in (19, 6, 17))
    return _Stat(head.partition("(")[2], fields[0], started, flags, threads)


def _user(pid: str) -> int:
    """Read the real user id; the files in /proc/PID are root's where a process hides its memory."""
    with open(f"/proc/{pid}/status", "rb") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(b"Uid:"))


def _read(place: str, what: str) -> bytes | None:
    """Read a file about a process's memory; return None where that is not permitted."""
    try:
        with open(f"/proc/{place}/{what}", "rb", buffering=0) as file:
            return file.readall()
    except PermissionError:
        return None
    except ProcessLookupError:
        return b""  # It has no memory.
