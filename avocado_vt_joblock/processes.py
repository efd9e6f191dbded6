"""What is left of jobs: their processes, as ``/proc`` shows them. It knows no lock files.

A job marks its own process with an environment variable, and all that it starts inherits that: the
runners, their tests, the guests, and the helpers of these. ``/proc/PID/environ`` shows it to the
user of a process and to root. The command line of a test, which everybody may read, names its job.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from dataclasses import dataclass

#: The names of the locks that a process holds or has inherited, with a colon between them.
VARIABLE = "AVOCADO_VT_JOBLOCK"
#: What avocado-vt itself starts beside its tests and what touches no image: it does not count.
HELPERS = re.compile("aexpect_helper|tcpdump|tshark|dnsmasq|ksmtuned|ovsdb-server|ovs-vswitchd")
#: How long ``aexpect_helper`` may be about to start a guest, and so counts, in seconds.
HELPER_START = 10.0
#: How far the clocks that date a file and a process may be apart, in seconds.
CLOCK_SLACK = 10.0
#: How long to look again at what comes and goes, and how long to look at all, in seconds.
SETTLE_TIMEOUT, LOOK_TIMEOUT = 3.0, 5.0
#: How long a process has no environment in the middle of an exec: as a rule, and at most.
PAUSE, BLANK_TIMEOUT = 0.005, 0.5

_MARKS = re.compile(rb"(?:^|\0)%b=([^\0]*)" % VARIABLE.encode())
_TEST = re.compile(rb"\0task-run(?:\0[^\0]*)*?\0-j\0([^\0]+)")
_INTERPRETER = re.compile(r"python[0-9.]*|(?:ba|da|k)?sh")
# A command by itself, to which aexpect adds the second part.
_COMMAND = re.compile(r"(?P<program>[^\s;&|`$()]+)[^;&|`$\n]*(?:&& echo \w+ > /dev/null)?")
# Threads that change the variable at once would lose each other's changes.
_environ_lock = threading.RLock()  # which a Ctrl-C in between does not lock for ever


@dataclass
class Process:
    """A process that may be of a job."""

    pid: int  # as this /proc shows it
    command: str  # anybody's words; the name in brackets where there is no command line
    uid: int  # the effective user id
    marks: set[str]  # the names of the locks that it is marked with
    test_of: str  # the id of the job whose test it runs; empty if it runs none
    is_around: bool  # whether it has started this process, at whatever remove
    is_blank: bool  # whether nobody can tell what it is: it hangs in an exec, or at its end


def marks() -> set[str]:
    """The names of the locks that this process holds or has inherited."""
    return set(os.environ.get(VARIABLE, "").split(":")) - {""}


#: Those of the jobs around this process.
INHERITED = marks()


def mark(name: str) -> None:
    """Mark this process, and so all that it starts from now on."""
    with _environ_lock:
        os.environ[VARIABLE] = ":".join([*marks(), name])


def unmark(name: str) -> None:
    """Take a mark back from this process; what has inherited it keeps it."""
    with _environ_lock:
        os.environ[VARIABLE] = ":".join(marks() - {name})
        if not marks():
            del os.environ[VARIABLE]


class Look:
    """A look at all processes but this one, as far as it has got."""

    def __init__(self) -> None:
        self.processes: list[Process] = []  # those that may be of a job
        self.is_settled = False  # whether these are all, since none has ended unseen
        self._pid = "1"  # the one that is looked at
        self.error = ""  # why none can be seen, in the words of the system
        self.sees_others = False  # whether processes of other users can be seen
        self.is_denied = False  # whether some environments cannot
        self._done: set[str] = set()
        self._around: set[str] = set()
        self._blank: dict[tuple[str, int], list[float]] = {}
        # In a thread, to leave it behind: who reads the environment of a process waits while its
        # memory changes, and that may wait for storage that is dead.
        thread = threading.Thread(target=self._run, daemon=True)
        thread.start()
        thread.join(LOOK_TIMEOUT)
        # The PID of one that does not answer; it stays, since what comes later may be overlooked.
        self.hanging = self._pid if thread.is_alive() else ""

    def _run(self) -> None:
        try:
            with open("/proc/self/mounts", encoding="utf-8", errors="replace") as file:
                self.sees_others = os.geteuid() == 0 and "hidepid=" not in file.read()
            # Not getpid(): this /proc may show another PID namespace.
            pid = os.readlink("/proc/self")
            self._done.add(pid)
            with contextlib.suppress(OSError):  # It may hide a process of another user.
                while pid != "0":
                    pid = _Stat(pid).parent
                    self._around.add(pid)
            deadline = time.monotonic() + SETTLE_TIMEOUT
            while not self.is_settled and time.monotonic() < deadline:
                self.is_settled = self._look_at_all()
        except OSError as error:
            self.error = error.strerror or repr(error)

    def _look_at_all(self) -> bool:
        """Look at what has not been looked at; return whether that is all there is."""
        has_ended = False
        there = {name for name in os.listdir("/proc") if name.isdigit()}
        # What is gone may have left its PID to another one.
        self._done &= there
        for pid in there - self._done:
            self._pid = pid
            try:
                self._look_at(pid)
            except (FileNotFoundError, ProcessLookupError):
                has_ended = True  # It may have started another one, which only the next look shows.
            except PermissionError:
                self._done.add(pid)  # It is another user's, and hidden by hidepid=1.
        if not has_ended and not there <= self._done:
            time.sleep(PAUSE)
        return not has_ended and there <= self._done

    def _look_at(self, pid: str) -> None:
        """Look at a process, and be done with it unless it is to be looked at again."""
        stat = _Stat(pid)
        if stat.has_ended:
            self._done.add(pid)
            raise ProcessLookupError
        command, environ = _read(pid, "cmdline"), _read(pid, "environ")
        is_blank = False
        if environ == b"" and not stat.is_kernel_thread:
            # Its first thread may have ended before the others.
            for thread in os.listdir(f"/proc/{pid}/task"):
                environ = environ or _read(f"{pid}/task/{thread}", "environ")
            is_blank = not environ and not command
            times = self._blank.setdefault((pid, stat.started), [])
            times.append(time.monotonic())
            lasts = times[-1] - times[0] >= (BLANK_TIMEOUT if is_blank else PAUSE)
            # Three looks: one may fall into its exec, and another one into its end.
            if not environ and not (lasts and len(times) > 2):
                return
        self._done.add(pid)
        self.is_denied |= environ is None
        uid = os.stat(f"/proc/{pid}").st_uid
        self.sees_others |= bool(command) and uid != os.geteuid()
        marked, test = _MARKS.search(environ or b""), _TEST.search(command or b"")
        words = os.fsdecode(command or b"").split("\0")[:-1]
        if (marked or test or is_blank) and not _is_helper(words, stat.age):
            names = set(os.fsdecode(marked[1]).split(":")) if marked else set()
            test_of = os.fsdecode(test[1]).lower() if test else ""
            text = " ".join(words) or f"[{stat.name}]"
            process = Process(int(pid), text, uid, names, test_of, pid in self._around, is_blank)
            self.processes.append(process)


def may_have_written(pid: int, when: float, opened: str) -> bool:
    """Whether a process may be the one that wrote its PID into a file, by kill(2) and proc(5).

    :param pid: the process, in the PID namespace of this one
    :param when: when that was, in seconds since the Epoch
    :param opened: the name of the file, if that process still has it open
    :return: False only where it is plain that it is another process, or none
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    try:
        if os.readlink("/proc/self") != str(os.getpid()):
            return True
        stat = _Stat(str(pid))
        if stat.has_ended or time.time() - stat.age > when + CLOCK_SLACK:
            return False
        with os.scandir(f"/proc/{pid}/fd") as links:
            # They are not followed: they may lead to storage that is dead.
            return any(opened in os.readlink(link) for link in links)
    except OSError:
        return True


class _Stat:
    """What proc_pid_stat(5) tells of a process."""

    def __init__(self, pid: str) -> None:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            # The name, in parentheses, may hold anything.
            head, _, tail = os.fsdecode(file.read()).rpartition(")")
        state, self.parent, *fields = tail.split()
        # Its flags, num_threads and starttime.
        flags, threads, self.started = (int(fields[index]) for index in (4, 15, 17))
        self.name = head.partition("(")[2]
        self.is_kernel_thread = bool(flags & 0x00200000)
        # One of which the first thread alone has ended looks like a zombie.
        self.has_ended = state in ("Z", "X") and threads <= 1
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        self.age = now - self.started / os.sysconf("SC_CLK_TCK")  # in seconds


def _read(place: str, what: str) -> bytes | None:
    """Read a file about a process's memory; None where that is not permitted."""
    try:
        with open(f"/proc/{place}/{what}", "rb", buffering=0) as file:
            return file.readall()
    except PermissionError:
        return None
    except ProcessLookupError:
        return b""  # It has no memory.


def _is_helper(words: list[str], age: float) -> bool:
    """Whether a command line is of one of the ``HELPERS``, by an interpreter or a shell or not."""
    program, *arguments = words or [""]
    if _INTERPRETER.fullmatch(os.path.basename(program)):
        command = next((word for word in arguments if not word.startswith("-")), "")
        match = _COMMAND.fullmatch(command)
        program = match["program"] if match else ""
    name = os.path.basename(program)
    return bool(HELPERS.fullmatch(name)) and (name != "aexpect_helper" or age > HELPER_START)
