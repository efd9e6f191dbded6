"""Every word that users read, in the order of ``docs/messages.rst``. It knows no Avocado."""

from __future__ import annotations

import datetime
import errno
import math
import os
import pwd
import shlex
import time
import traceback

from avocado_vt_joblock import DIR, SECTION, TIMEOUT
from avocado_vt_joblock.lock import KERNEL_LOCK, LockInTheWayError
from avocado_vt_joblock.lockfile import LockFile, Reason, State
from avocado_vt_joblock.processes import VARIABLE

#: How many processes are listed, and how many characters of the command line of each.
PROCESS_LIMIT, COMMAND_LIMIT = 20, 160

FAILURE = "Failure trying to set Avocado-VT job lock: "
_NO_SOLUTION = "To remove the file is no solution: jobs at once destroy each other's images."
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
NOT_A_TIME = (
    f"{TIMEOUT} = {{!r}} is not a time to wait. That is a number of seconds, 0 to fail at once, or "
    "-1 to wait for as long as it takes."
)
NOT_ABSOLUTE = (
    f"the lock directory is not an absolute path: {DIR} = {{!r}}. ~ and ~USER are expanded, if "
    "there is such a user; variables and quotes are taken as they are."
)
NO_JOB_ID = "the job id {!r} is not 40 hexadecimal digits. Give the job another one."
GONE = (
    "The lock file {} was removed or replaced while the job ran. Other jobs may have run at the "
    "same time and changed the files that it used. Find out what did it: a cleaner of temporary "
    "files, for example."
)
NOT_RELEASED = (
    "The lock file {} could not be removed: {}. It stops no job after the last process of this job "
    "has ended: the next job that may remove it will."
)
FILE_STAYS = (
    "\nUntil they have ended no other job with VT tests runs in this lock directory, and the lock "
    "file stays: {}. The next job removes it."
)
NOT_REMOVED = (
    "The stale lock file {} could not be removed: {}. It does not stop this job. Its owner's next "
    "job removes it, unless guests still run that only the owner and root can see."
)
NO_STICKY_BIT = (
    "Others may write in the lock directory {0} and, since it has no sticky bit, remove the lock "
    "while the job runs. Prevent that: chmod +t {0}"
)
WAITING = "Waiting {0}: {2}"
STILL_WAITING = "Still waiting {0}, after {1}."
OBTAINED = "Obtained the lock after {}."
ENDING = (
    "The job has ended, but {} process(es) of it still run: waiting up to {:g} s for them. Ctrl-C "
    "ends the waiting."
)
REMOVED = "Removed {} stale lock(s) from {}."


def refusal(error: BaseException, directory: object, log: str) -> str:
    """Why a job is stopped, and what to do.

    :param error: what has stopped it
    :param directory: the lock directory, as it is set
    :param log: the job's log
    """
    if isinstance(error, LockInTheWayError):
        return FAILURE + _in_the_way(error)
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        return f"{FAILURE}it was interrupted before it had the lock."
    if isinstance(error, OSError):
        return FAILURE + _system_error(error, directory)
    if type(error) is ValueError:
        return f"{FAILURE}{error}"
    what = traceback.format_exception_only(type(error), error)[-1].strip()
    return f"{FAILURE}{what}. Details are in {log}."


def _in_the_way(error: LockInTheWayError) -> str:
    file = error.file
    wait = f"set a longer {TIMEOUT}" if error.waited else f"set {TIMEOUT} to have this one wait"
    text = f"{describe(file)}\n{_NO_SOLUTION}"
    if file.state is State.UNKNOWN:
        owner = _user(file.uid)
        return f"""\
cannot tell whether a job still holds {file.path}: {_reason(file)}.
Its owner is {owner}. If no job, test or guest of {owner} runs any more
(as root: pgrep -af 'avocado|qemu'),
then {_who(file)} can remove it:
    rm {shlex.quote(file.path)}"""
    if file.state is State.NOT_NOW:
        text += f"\nStart this job again, or {wait}."
    elif not file.processes:
        if file.state is State.LIVE:
            text += f"\nWait until that job is done, or {wait}."
        text += f"""
Only if your jobs share no guest images and other files with that one, give them a lock directory
of their own: {DIR}."""
    waited = f"out of time after {duration(error.waited)}: " if error.waited else ""
    return waited + text


def describe(file: LockFile) -> str:
    """Whose a lock is that is in the way, and what to do about what is left of its job."""
    pid = f"\n    PID:    {file.pid or 'unknown'}"
    if not file.pid_is_here:
        pid += f"""
            (of another PID namespace or host, or ended and has left a child that holds the lock:
            fuser -v {shlex.quote(file.path)})"""
    if file.processes:
        what, pid = "a job has ended, but processes of it still run.", ""
    elif file.state is State.NOT_NOW:
        what, pid = f"a job has ended, and what is left of it is not seen: {_reason(file)}.", ""
    elif file.state is State.OUTER:
        what = "this is the job that you are in. To wait for it would be to wait for ever."
    else:
        what = "another job holds the lock."
    return f"""{what}
    file:   {file.path}{pid}
    user:   {_user(file.uid)}
    job id: {file.job_id}
    since:  {_local_time(file.since)}{_left(file)}"""


def _left(file: LockFile) -> str:
    """What still runs of a job that has ended, and what to do about it."""
    if not file.processes:
        return ""
    more = len(file.processes) - PROCESS_LIMIT
    text = "".join(
        f"\n    {process.pid:>7}  {_tamed(process.command)}"
        for process in file.processes[:PROCESS_LIMIT]
    )
    text += f"\n    and {more} more" if more > 0 else ""
    text += f"\nThere may be more, tests too: {_reason(file)}." if file.reason else ""
    pids = [str(process.pid) for process in file.processes]
    around = [process.pid for process in file.processes if process.is_around]
    if around:
        return f"""{text}
This job was started by {around[0]}, which that job has left. If it is your shell, then end it, or
put a new one in its place: exec env -u {VARIABLE} bash"""
    has_test = any(process.test_of for process in file.processes)
    if has_test or file.reason or any(process.is_blank for process in file.processes):
        text += "\nA test is among them." if has_test else ""
        return f"""{text}
A test may be cleaning up and restoring images: wait some minutes. To look at them again:
    ps -o pid,user,stat,etime,args -p {",".join(pids)}"""
    return f"""{text}
No test is among them that could end a guest and restore images.
If these processes still run after one minute, {_who(file)} must end them, and check the images:
    kill {" ".join(pids)}
What shall not count, an agent for example, is started by: env -u {VARIABLE} COMMAND"""


def _system_error(error: OSError, directory: object) -> str:
    name = str(error.filename)
    why = error.strerror
    if name == KERNEL_LOCK and error.errno == errno.EINVAL:
        return """\
this system has no open file description locks (F_OFD_SETLK), without which no lock can be trusted.
They need Linux 3.15 or newer, and some sandboxes such as gVisor lack them."""
    if name == KERNEL_LOCK:
        what = f"is on a file system that does not lock files: {why}"
    elif name.endswith(".pid"):
        what = f"cannot be written: {why}"
    elif isinstance(error, FileNotFoundError):
        what = "does not exist"
    elif isinstance(error, NotADirectoryError):
        what = "is not a directory"
    else:
        what = f"cannot be opened: {why}"
    return f"the lock directory {what}: {DIR} = {directory!r}.{where_to_set(DIR)}"


def where_to_set(option: str) -> str:
    """Where to change an option; Avocado chooses the file in the same way."""
    home = os.environ.get("VIRTUAL_ENV", "~")
    return f"""
Set {option.rpartition(".")[2]} in section [{SECTION}] of {home}/.config/avocado/avocado.conf.
Only a file of --config and a program that uses the Job API win over that."""


def end(file: LockFile, problem: OSError | None) -> list[str]:
    """What to tell when a job has given up its lock.

    :param file: the lock, and what is left of the job
    :param problem: what went wrong
    """
    gone = isinstance(problem, FileNotFoundError)
    stays = "" if gone else FILE_STAYS.format(file.path)
    texts = []
    if file.processes:
        texts.append(f"{len(file.processes)} process(es) of the job still run.{_left(file)}{stays}")
    elif file.state is not State.STALE:
        what = "Nobody can tell whether tests or guests of the job still run"
        texts.append(f"{what}: {_reason(file)}.{stays}")
    if problem:
        texts.append((GONE if gone else NOT_RELEASED).format(file.path, problem.strerror))
    return texts


def until(deadline: float) -> str:
    """Until when a job waits.

    :param deadline: by the monotonic clock, in seconds
    """
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


def _user(uid: int | None) -> str:
    try:
        return "unknown" if uid is None else pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _who(file: LockFile) -> str:
    """Who can remove a lock file, and end what is left of its job."""
    needs_root = not file.uid or any(process.uid == 0 for process in file.processes)
    return "root" if needs_root else f"{_user(file.uid)} or root"


def _tamed(command: str) -> str:
    """A command line, which is anybody's words, in one line that does nothing to a terminal."""
    shown = command[:COMMAND_LIMIT]
    tame = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in shown)
    return f"{tame}..." if len(command) > COMMAND_LIMIT else tame
