"""Every word that users read, in the order of ``docs/messages.rst``. It knows no Avocado."""

from __future__ import annotations

import contextlib
import datetime
import errno
import math
import os
import pwd
import shlex
import time

from avocado_vt_joblock import DIR, SECTION, TIMEOUT
from avocado_vt_joblock.lock import KERNEL_LOCK, LockInTheWayError
from avocado_vt_joblock.lockfile import LockFile, Reason, State
from avocado_vt_joblock.processes import VARIABLE

#: How many processes are listed, and how many characters of the command line of each.
PROCESS_LIMIT, COMMAND_LIMIT = 20, 160

FAILURE = "Failure trying to set Avocado-VT job lock: "
_REASONS = {
    Reason.SYSTEM: "{}",
    Reason.NO_PID: "there is no PID in it",
    Reason.NO_REGULAR_FILE: "it is no regular file",
    Reason.NO_PROC: "its process has ended, but /proc does not show what else of its job runs: {}",
    Reason.HIDDEN: "its process has ended, but /proc does not show the processes of other users",
    Reason.DENIED: "its process has ended, but root may not see here what other users run",
    Reason.GUESTS_OF_OTHERS: "only root can see the guests of other users",
    Reason.HANGING: "process {} does not answer, and so hides others",
    Reason.RESTLESS: "processes come and go too fast to see them all",
    Reason.INTERRUPTED: "Ctrl-C ended the look",
}
# Avocado chooses the file in the same way.
_FILE = f"{os.environ.get('VIRTUAL_ENV', '~')}/.config/avocado/avocado.conf"
_SECTION = f"[{SECTION}] of {_FILE},\nor of the file of --config"
_NO_KERNEL_LOCK = """this system has no open file description locks (F_OFD_SETLK), and without
them no lock can be trusted. They need Linux 3.15, and some sandboxes such as gVisor lack them."""
GONE = """The lock file {} was removed or replaced while the job ran. Other jobs may have run at
the same time and changed its images. Find out what did it: a cleaner of temporary files, maybe."""
NOT_RELEASED = """The lock file {} could not be removed: {}.
It stops no job after the last process of this job has ended. A later job removes it."""
FILE_STAYS = """
The lock file stays: {}.
Until these have ended no other job of this user or of root runs. Then the next one removes it."""
NOT_REMOVED = """The stale lock file {} could not be removed: {}. It does not stop this job.
Its owner's next job removes it, unless guests still run that only the owner and root can see."""
NO_STICKY_BIT = """Others may write in the lock directory {0} and, since it has no sticky bit,
remove the lock while the job runs. Prevent that: chmod +t {0}"""
WAITING = "Waiting {until}: {lock_file}"
STILL_WAITING = "Still waiting {until}, after {waited}."
OBTAINED = "Obtained the lock after {}."
ENDING = """The job has ended, but {} process(es) of it still run: waiting up to {:g} s for them.
Ctrl-C ends the waiting."""
REMOVED = "Removed the stale lock file {}."


def refusal(error: BaseException, directory: object, log: object) -> str:
    """Why a job is stopped, and what to do.

    :param error: what has stopped it
    :param directory: the lock directory, as it is set
    :param log: the job's log
    """
    if isinstance(error, LockInTheWayError):
        return FAILURE + _in_the_way(error)
    if isinstance(error, OSError):
        return FAILURE + _system_error(error, directory)
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        return f"{FAILURE}it was interrupted before its tests."
    if type(error) is ValueError:
        return f"{FAILURE}{error}"
    return f"{FAILURE}{type(error).__name__}: {error}. Details are in {log}."


def _in_the_way(error: LockInTheWayError) -> str:
    file = error.file
    if file.state is State.UNKNOWN:
        remove = "rm -r" if file.reason is Reason.NO_REGULAR_FILE else "rm"
        return f"""cannot tell whether a job still holds {file.path}: {_reason(file)}.
Look as root: pgrep -af 'avocado|qemu'. Only if there is no job, test or guest of {_user(file)}, who
is its owner, {_who(file)} can remove it:
    {remove} {shlex.quote(file.path)}"""
    wait = f"set a longer {TIMEOUT}" if error.waited else f"set {TIMEOUT} to have this one wait"
    text = f"out of time after {duration(error.waited)}: " if error.waited else ""
    text += describe(file)
    if file.state is State.NOT_NOW:
        text += f"\nStart this job again, or {wait}."
    elif file.state is State.LIVE and not file.processes:
        text += f"\nWait until that job is done, or {wait}."
    if file.processes or file.state is not State.OUTER:
        text += "\nTo remove the file is no solution: jobs at once destroy each other's images."
    if not file.processes and file.state is not State.NOT_NOW:
        text += f"""
Only if your jobs share no guest images and other files with that one, give them a lock directory
of their own: {DIR}."""
    return text


def describe(file: LockFile) -> str:
    """Whose a lock is that is in the way, and what to do about what is left of its job."""
    pid = f"\n    PID:    {file.pid or 'unknown'}"
    if not file.pid_is_here:
        pid += f"""
            (of another PID namespace or host, or ended and has left a child that holds the lock:
            fuser -v {shlex.quote(file.path)})"""
    what = "another job holds the lock."
    if file.processes:
        what, pid = "a job has ended, but processes of it still run.", ""
    elif file.state is State.NOT_NOW:
        what, pid = f"a job has ended, and what is left of it is not seen: {_reason(file)}.", ""
    elif file.state is State.OUTER:
        what = "this is the job that you are in. To wait for it would be to wait for ever."
    return f"""{what}
    file:   {file.path}{pid}
    user:   {_user(file)}
    job id: {file.job_id}
    since:  {_local_time(file.since)}{_left(file)}"""


def _left(file: LockFile) -> str:
    if not file.processes:
        return ""
    text = ""
    for process in file.processes[:PROCESS_LIMIT]:
        # Anybody's words: in one line, and in a form that does nothing to a terminal.
        text += f"\n    {process.pid:>7}  {repr(process.command[:COMMAND_LIMIT])[1:-1]}"
        text += "..." if len(process.command) > COMMAND_LIMIT else ""
    if len(file.processes) > PROCESS_LIMIT:
        text += f"\n    and {len(file.processes) - PROCESS_LIMIT} more"
    if file.reason:
        text += f"\nThere may be more, tests too: {_reason(file)}."
    pids = [str(process.pid) for process in file.processes]
    has_test = any(process.test_of for process in file.processes)
    if around := [process.pid for process in file.processes if process.is_around]:
        return f"""{text}
This job was started by {around[0]}, which that job has left. If it is your shell, then end it, or
put a new one in its place: exec env -u {VARIABLE} bash"""
    if has_test or file.reason or any(process.is_blank for process in file.processes):
        test = "A test is among them. It" if has_test else "A test"
        return f"""{text}
{test} may be cleaning up and restoring images: wait some minutes. To look again:
    ps -o pid,user,stat,etime,args -p {",".join(pids)}"""
    return f"""{text}
No test is among them that could end a guest and restore images.
If these processes still run after one minute, {_who(file)} must end them, and check the images:
    kill {" ".join(pids)}
To start something that shall not count, an agent for example: env -u {VARIABLE} COMMAND"""


def _system_error(error: OSError, directory: object) -> str:
    name = str(error.filename)
    plain = {FileNotFoundError: "does not exist", NotADirectoryError: "is not a directory"}
    what = plain.get(type(error), f"cannot be opened: {error.strerror}")
    if name == KERNEL_LOCK and error.errno == errno.EINVAL:
        return _NO_KERNEL_LOCK
    if name == KERNEL_LOCK:
        what = f"is on a file system that does not lock files: {error.strerror}"
    elif not error.filename or name.endswith(".pid"):
        what = f"cannot be written: {error.strerror}"
    return f"""the lock directory {what}: {DIR} = {directory!r}.
Correct that, or set dir in section {_SECTION}."""


def timeout(value: object) -> float:
    """What is set as the time to wait, in seconds.

    :raises ValueError: when that makes no sense
    """
    seconds = math.nan
    with contextlib.suppress(ValueError):
        seconds = float(str(value))
    if seconds != -1 and not 0 <= seconds < math.inf:
        raise ValueError(f"""{TIMEOUT} = {value!r} is not a time to wait.
That is a number of seconds, 0 to fail at once, or -1 to wait for as long as it takes.
Set timeout in section {_SECTION}.""")
    return math.inf if seconds == -1 else seconds


def directory(value: object) -> str:
    """What is set as the lock directory, short of looking whether it is there.

    :raises ValueError: when that makes no sense
    """
    path = str(value)
    if "\0" in path or not os.path.isabs(os.path.expanduser(path)):
        raise ValueError(f"""the lock directory is not an absolute path: {DIR} = {value!r}.
~ and ~USER are expanded, if there is such a user; variables and quotes are taken as they are.
Set dir in section {_SECTION}.""")
    return os.path.expanduser(path)


def end(file: LockFile, problem: OSError | None) -> list[str]:
    """What to tell when a job has given up its lock: what is left of it, and what went wrong."""
    is_gone = isinstance(problem, FileNotFoundError)
    left = f"{len(file.processes)} process(es) of the job still run.{_left(file)}"
    if not file.processes:
        left = f"Nobody can tell whether something of the job still runs: {_reason(file)}."
    left += "" if is_gone else FILE_STAYS.format(file.path)
    texts = [] if file.state is State.STALE else [left]
    if problem:
        texts.append((GONE if is_gone else NOT_RELEASED).format(file.path, problem.strerror))
    return texts


def until(deadline: float) -> str:
    """Until when a job waits, which is given by the monotonic clock in seconds."""
    if deadline == math.inf:
        return "for as long as it takes"
    return f"until {_local_time(time.time() + deadline - time.monotonic())}"


def duration(seconds: float) -> str:
    """How long something has taken, for people."""
    return str(datetime.timedelta(seconds=round(seconds)))


def _local_time(seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
    except (ValueError, OverflowError, OSError):
        return "unknown"


def _reason(file: LockFile) -> str:
    return _REASONS[file.reason].format(file.detail) if file.reason else "unknown"


def _user(file: LockFile) -> str:
    try:
        return "unknown" if file.uid is None else pwd.getpwuid(file.uid).pw_name
    except KeyError:
        return str(file.uid)


def _who(file: LockFile) -> str:
    needs_root = not file.uid or any(process.uid == 0 for process in file.processes)
    return "root" if needs_root else f"{_user(file)} or root"
