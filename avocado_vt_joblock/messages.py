"""Every word that users read, in the order of ``docs/messages.rst``.

A text says what happened, then what that means for the reader, then what to do. Its
lines fit a terminal of 80 columns where names are of usual length.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import shlex
import time

from avocado_vt_joblock import DIR, SECTION, TIMEOUT, data_file, options
from avocado_vt_joblock.formats import count, duration, local_time, since, tamed, user
from avocado_vt_joblock.leftovers import VARIABLE, JobProcess, Leftovers, Obstacle
from avocado_vt_joblock.lock import JobIdError, LockInTheWayError, WaitedInVainError
from avocado_vt_joblock.lockdir import DirectoryError, Ticket, Use
from avocado_vt_joblock.lockfile import Flaw, LockFile, State

#: Avocado's loggers: of the file job.log, and of what users see at once.
JOB_LOG = "avocado.job"
USER_LOG = "avocado.app"
#: How many processes are listed.
PROCESS_LIMIT = 20

#: How the text of each stopped job begins. Scripts look for it.
FAILURE = "Failure trying to set Avocado-VT job lock: "
#: How the summary of a stopped job names the only test that its results have.
TEST_ID = "vt-joblock (the job lock, none of your tests)"

_NO_SOLUTION = "Do not remove the file: two jobs at once destroy each other's images."
_SHARES_NOTHING = f"""If this job shares no guest images with that one, give it a lock
directory of its own: {DIR}."""
_REASONS = {
    Flaw.SYSTEM: "{}",
    Flaw.NO_PID: "there is no PID in it",
    Flaw.NO_REGULAR_FILE: "it is no regular file",
    Flaw.LEASED: "another program has a lease on the file",
    Obstacle.NO_PROC: "/proc does not show what runs: {}",
    Obstacle.NO_THREAD: "no thread can be started to look at the processes",
    Obstacle.HANGING: "process {} does not answer, and so hides others",
    Obstacle.HIDDEN: "/proc does not show the processes of other users",
    Obstacle.DENIED: "the environment of process {} may not be read here",
    Obstacle.RESTLESS: "processes come and go too fast to see them all",
    Obstacle.GUESTS_OF_OTHERS: "only root can see the guests of other users",
    Obstacle.INTERRUPTED: "Ctrl-C ended the look",
}

# While a job waits.
STILL_WAITING = "Still waiting {until}, after {waited}."
OBTAINED = "Obtained the lock after {waited}."
STOPPED = "Stopped waiting for the lock after {waited}. No test has run."

# Of a job that runs.
REMOVED = "Removed the stale lock file {path}."
NOT_REMOVED = """The stale lock file could not be removed: {error}.
    {path}
It does not stop this job. Correct the permissions of its directory."""
GUESTS_OF_OTHERS = """A guest of {user} may still run: a job of {user} has ended,
and only {user} and root can see its guests.
If you use the same images, stop this job now (Ctrl-C).
{user} or root looks for guests:
    pgrep -u {user} -af qemu
When there is none, the next job of {user} or of root removes the lock file:
    {path}"""
NO_STICKY_BIT = """Others may write in the lock directory {path}
and, since it has no sticky bit, remove the lock while a job runs. Prevent that:
    chmod +t {quoted}"""
UNKNOWN_KEY = """[{section}] has no option {key!r}: it is ignored.
The options are dir and timeout."""

# At the end of a job.
ENDING = """The job has ended, but {processes} of it still {run}.
Waiting up to {limit:g} s. Ctrl-C ends the waiting."""
LEFT = """{processes} of the job still {run}:{listed}
Until {they} ended, no job of this user or of root runs."""
FILE_STAYS = """
The lock file stays, and the next job removes it:
    {path}"""
NOT_SEEN = """Nobody can tell whether something of the job still runs:
{reason}.
The lock file stays. The next job looks again."""
GONE = """The lock file was removed or replaced while the job ran:
    {path}
Other jobs may have run at the same time and changed its images. Find out what
did it: a cleaner of temporary files, maybe."""
NOT_RELEASED = """The lock file could not be removed: {error}.
    {path}
It stops no job once the last process of this job has ended. A later job removes
it."""

# Of the command avocado vt-joblock.
FREE = "The lock is free: a job with VT tests can start."
NOT_FREE = "The lock is not free: a job with VT tests cannot start."
NO_COMMAND = """There is no command to run:
    avocado vt-joblock run -- COMMAND ARGUMENT..."""
OPTION_OF_AVOCADO = """Avocado reads {option} itself. Write -- before the command:
    avocado vt-joblock run -- COMMAND ARGUMENT..."""


def tell(
    text: str,
    level: int = logging.WARNING,
    *,
    loggers: tuple[str, ...] = (JOB_LOG, USER_LOG),
    error: BaseException | None = None,
) -> None:
    """Tell job.log and the user; whatever log handlers raise, nothing changes.

    :param text: what to tell
    :param level: how much it matters, by the module logging
    :param loggers: whom to tell
    :param error: whose traceback is told, too
    """
    for logger in loggers:
        try:
            logging.getLogger(logger).log(level, text, exc_info=error)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:
            pass


# A stopped job.


def refusal(error: BaseException, directory: object, log: object) -> str:
    """Say why a job is stopped, and what to do.

    :param error: what has stopped it
    :param directory: the lock directory, as it is set
    :param log: where the job's log is
    """
    more = _read_more() if _is_foreseen(error) else ""
    return f"{FAILURE}{_refusal(error, directory, log)}{more}"


def is_unforeseen(error: BaseException) -> bool:
    """Tell whether an error is one that nobody has thought of."""
    return not _is_foreseen(error) and not isinstance(
        error, (KeyboardInterrupt, SystemExit)
    )


def headline(error: BaseException, text: str) -> str:
    """Say in one line why a job is stopped, and whose lock is in its way.

    :param error: what has stopped it
    :param text: what was said of it
    """
    line = text.partition("\n")[0]
    file = error.file if isinstance(error, LockInTheWayError) else None
    if not file:
        return line
    pid = f", PID {file.pid}" if file.pid else ""
    return f"{line} User {_owner(file)}{pid}, since {local_time(file.since)}."


def in_the_way(file: LockFile, *, has_waited: bool = False) -> str:
    """Say whose lock is in the way of a job, and what to do.

    :param file: the lock
    :param has_waited: whether the job has waited for it
    """
    if file.state is State.OUTER:
        return _outer(file)
    if file.state is State.UNKNOWN:
        return _unknown(file)
    text = describe(file)
    if _other_host(file):
        return text
    if file.state is State.NOT_NOW:
        text += _how_to_wait(has_waited=has_waited)
    elif not file.processes:
        text += f"\nWait until that job is done.{_how_to_wait(has_waited=has_waited)}"
        text += f"\n{_SHARES_NOTHING}"
    return f"{text}\n{_NO_SOLUTION}"


def describe(file: LockFile) -> str:
    """Say whose lock is in the way, and what to do about what is left of its job."""
    if file.processes:
        whose = _who_may_act(file.uid, file.processes)
        return (
            f"a job has ended, but processes of it still run.{_facts(file)}"
            f"{_list(file)}\nUntil all of that has ended, no job of {whose} runs."
            f"\n{_advice(file, file.uid)}"
        )
    if file.state is State.NOT_NOW:
        return f"""for now nobody can tell whether a job still runs:
{reason(file)}.{_facts(file)}"""
    if _other_host(file):
        return (
            f"a job on another host holds the lock.{_facts(file)}\n{_elsewhere(file)}"
        )
    return f"another job holds the lock.{_facts(file)}"


def _is_foreseen(error: BaseException) -> bool:
    of_lock = (LockInTheWayError, DirectoryError, JobIdError)
    of_options = (options.OptionError, options.OrderError)
    return isinstance(error, of_lock + of_options)


def _refusal(error: BaseException, directory: object, log: object) -> str:
    if isinstance(error, WaitedInVainError):
        in_vain = _in_the_way_or_line(error, has_waited=True)
        return f"out of time after {duration(error.waited)}: {in_vain}"
    if isinstance(error, LockInTheWayError):
        return _in_the_way_or_line(error, has_waited=False)
    if isinstance(error, DirectoryError):
        return _of_directory(error, directory)
    if isinstance(error, options.OptionError):
        return _of_option(error)
    if isinstance(error, options.OrderError):
        return _of_order(error)
    if isinstance(error, JobIdError):
        return f"the job id {error.job_id!r} is not 40 hexadecimal digits."
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        return "it was interrupted before its tests."
    return f"{type(error).__name__}: {error}.\nDetails are in {log}."


def _in_the_way_or_line(error: LockInTheWayError, *, has_waited: bool) -> str:
    if error.file:
        return in_the_way(error.file, has_waited=has_waited)
    return f"{_in_line(error.jobs_before)}{_how_to_wait(has_waited=has_waited)}"


def _how_to_wait(*, has_waited: bool) -> str:
    longer = " longer" if has_waited else ""
    return f"""
To have this one wait{longer}: avocado run --vt-joblock-timeout 2h ...
To see what runs and who waits: avocado vt-joblock show"""


def _facts(file: LockFile) -> str:
    """Return what is known of a lock, a line each."""
    lines = [f"file:   {file.path}"]
    if _other_host(file):
        lines.append(f"host:   {_other_host(file)}")
    if not file.processes and file.state is not State.NOT_NOW:
        lines.append(
            f"PID:    {file.pid or 'unknown'}  {tamed(file.command())}".rstrip()
        )
        is_alive = file.state in (State.LIVE, State.OUTER)
        if is_alive and not file.pid_is_here and not _other_host(file):
            lines += [
                "        (of another PID namespace, or ended and has left a child that",
                f"        holds the lock: fuser -v {shlex.quote(file.path)})",
            ]
    lines.append(f"user:   {_owner(file)}")
    lines.append(f"job id: {file.job_id}")
    lines.append(f"since:  {since(file.since)}")
    return "".join(f"\n    {line}" for line in lines)


def _list(left: LockFile | Leftovers) -> str:
    """Return the processes that are left, a line each, and what may be missing."""
    text = ""
    for process in left.processes[:PROCESS_LIMIT]:
        text += f"\n    {process.pid:>7}  {tamed(process.command)}"
    more = len(left.processes) - PROCESS_LIMIT
    if more > 0:
        text += f"\n    and {more} more"
    if reason(left):
        text += f"\nThere may be more, tests too: {reason(left)}."
    return text


def _advice(left: LockFile | Leftovers, uid: int | None) -> str:
    """Say what to do about the processes that are left of a job of a user."""
    processes = left.processes
    pids = [str(process.pid) for process in processes]
    for process in processes:
        if process.is_ancestor:
            return _advice_for_shell(process)
    has_test = any(process.test_of for process in processes)
    is_unclear = reason(left) or any(process.is_blank for process in processes)
    if has_test or is_unclear:
        test = "A test is among them. It" if has_test else "A test"
        return f"""{test} may be cleaning up and restoring images.
Wait some minutes. To look again:
    ps -o pid,user,stat,etime,args -p {",".join(pids)}"""
    fds = " ".join(f"/proc/{pid}/fd" for pid in pids)
    return f"""No test is among them that could end a guest and restore images.
If that still runs after one minute, {_who_may_act(uid, processes)} must act:
 1. See which images they use:
    ls -l {fds}
 2. End them:
    kill {" ".join(pids)}
 3. Check each of these images:
    qemu-img check IMAGE
What shall not count, an agent for example, is started by:
    env -u {VARIABLE} COMMAND"""


def _advice_for_shell(process: JobProcess) -> str:
    return f"""This job was started by {process.pid}, which that job has left.
If it is your shell, end it, or put a new one in its place:
    exec env -u {VARIABLE} bash"""


def _elsewhere(file: LockFile) -> str:
    host = shlex.quote(_other_host(file))
    return f"""Only there it can be seen whether that job still runs:
    ssh {host} "pgrep -af 'avocado|qemu'"
If it was killed, the next job on that host removes the file.
If that host is gone for good, {_who_may_act(file.uid, [])} removes it:
    rm {shlex.quote(file.path)}"""


def _outer(file: LockFile) -> str:
    what = "this is the job that you are in. To wait for it would be to wait for ever."
    if file.processes:
        return f"{what}{_facts(file)}{_list(file)}\n{_advice(file, file.uid)}"
    return f"{what}{_facts(file)}\n{_SHARES_NOTHING}"


def _unknown(file: LockFile) -> str:
    whose = "" if file.uid is None else f"-u {shlex.quote(_owner(file))} "
    remove = "rm -r" if file.reason is Flaw.NO_REGULAR_FILE else "rm"
    return f"""nobody can tell whether a job still holds the lock:
{reason(file)}.{_facts(file)}
So no job runs until {_who_may_act(file.uid, file.processes)} does this:
 1. Look for a job, a test or a guest of that user:
    pgrep {whose}-af 'avocado|qemu'
 2. If there is none:
    {remove} {shlex.quote(file.path)}"""


def _of_option(error: options.OptionError) -> str:
    if error.option == TIMEOUT:
        return f"""this is not a time to wait:
    {error}
That is a number of seconds, or a number with s, m, h or d. 0 is to fail at
once, and -1 to wait for as long as it takes.
{_where_to_set("timeout")}"""
    return f"""the lock directory is not an absolute path:
    {error}
~ and ~USER are expanded, if there is such a user. Variables and quotes are
taken as they are.
{_where_to_set("dir")}"""


def _of_order(error: options.OrderError) -> str:
    return f"""some plugins would run without the lock:
    [plugins.job.prepost] order = {error.order!r}
The first name must be 'vt-joblock', and 'vt-joblock-release' must not be there:
    order = {error.right_order!r}"""


def _of_directory(error: DirectoryError, directory: object) -> str:
    if error.use is Use.LOCK and error.error.errno == errno.EINVAL:
        return """this system has no open file description locks
(F_OFD_SETLK), and without them no lock can be trusted. They need Linux 3.15,
and some sandboxes such as gVisor lack them."""
    path = os.path.expanduser(str(directory))
    meant = "" if path == directory else f" ({path})"
    return f"""the lock directory {_trouble(error)}:
    {DIR} = {directory!r}{meant}
Correct that, or set another one.
{_where_to_set("dir")}"""


def _trouble(error: DirectoryError) -> str:
    """Say what is wrong with the lock directory."""
    why = error.error.strerror
    if error.use is Use.LOCK:
        return f"has a file system that locks no files: {why}"
    if error.use is Use.WRITE:
        return f"cannot be written: {why}"
    if isinstance(error.error, FileNotFoundError):
        return "does not exist"
    if isinstance(error.error, NotADirectoryError):
        return "is not a directory"
    return f"cannot be opened: {why}"


def _where_to_set(key: str) -> str:
    # Avocado chooses the file in the same way.
    home = os.environ.get("VIRTUAL_ENV", "~")
    return f"""Use --vt-joblock-{key}, or set {key} in section [{SECTION}] of
    {home}/.config/avocado/avocado.conf"""


def _read_more() -> str:
    manual = data_file("share/doc/avocado-framework-plugin-vt-joblock/messages.rst")
    return f"\nMore: less {shlex.quote(manual)}" if manual else ""


# While a job waits.


def waiting(error: LockInTheWayError | DirectoryError, until: str) -> str:
    """Say what a job waits for.

    :param error: what has stopped its last attempt
    :param until: until when it waits
    """
    if isinstance(error, DirectoryError):
        what = f"the lock directory {_trouble(error)}."
    elif not error.file:
        what = _in_line(error.jobs_before)
    elif error.file.state is State.UNKNOWN:
        what = f"""at this moment nobody can tell whether a job holds the lock:
{reason(error.file)}.
    file:   {error.file.path}"""
    else:
        what = describe(error.file)
    return f"Waiting {until}:\n{what}"


def on_terminal(waited: str, limit: str, jobs_before: int) -> str:
    """Say in one line that a job waits, and how many jobs come before it."""
    text = f"Waiting for the lock: {waited}"
    if limit:
        text += f" of {limit}"
    if jobs_before:
        text += f", after {count(jobs_before, 'job', 'jobs')}"
    return f"{text}. Ctrl-C ends the waiting."


def until(seconds: float) -> str:
    """Say until when a job waits, which is for so many seconds from now."""
    if seconds == math.inf:
        return "for as long as it takes"
    return f"until {local_time(time.time() + seconds)}"


def _in_line(jobs_before: int) -> str:
    if jobs_before == 1:
        return "1 job that came before this one waits for the lock."
    return f"{jobs_before} jobs that came before this one wait for the lock."


# Of a job that runs.


def tell_of_stale(files: list[LockFile]) -> None:
    """Tell what has become of stale locks, and warn of guests that nobody can see."""
    for file in files:
        if file.not_removed:
            tell(NOT_REMOVED.format(path=file.path, error=file.not_removed))
        elif file.reason:
            tell(GUESTS_OF_OTHERS.format(user=_owner(file), path=file.path))
        else:
            text = REMOVED.format(path=file.path)
            tell(text, logging.INFO, loggers=(JOB_LOG,))


def no_sticky_bit(path: str) -> str:
    """Warn of a directory in which others can remove the lock."""
    return NO_STICKY_BIT.format(path=path, quoted=shlex.quote(path))


def unknown_key(key: str) -> str:
    """Warn of what is set and is no option."""
    return UNKNOWN_KEY.format(section=SECTION, key=key)


# At the end of a job.


def ending(left: Leftovers, limit: float) -> str:
    """Say that a job waits at its end, for so many seconds at most."""
    processes = count(len(left.processes), "process", "processes")
    run = "runs" if len(left.processes) == 1 else "run"
    return ENDING.format(processes=processes, run=run, limit=limit)


def left_behind(left: Leftovers, path: str, *, is_in_place: bool) -> str:
    """Say what a job has left, and that its lock file stays if it is in place."""
    if not left.processes:
        return NOT_SEEN.format(reason=reason(left))
    is_one = len(left.processes) == 1
    text = LEFT.format(
        processes=count(len(left.processes), "process", "processes"),
        run="runs" if is_one else "run",
        listed=_list(left),
        they="it has" if is_one else "these have",
    )
    if is_in_place:
        text += FILE_STAYS.format(path=path)
    return f"{text}\n{_advice(left, os.geteuid())}"


def not_released(error: OSError, path: str) -> str:
    """Say what went wrong when a job gave its lock up."""
    if isinstance(error, FileNotFoundError):
        return GONE.format(path=path)
    return NOT_RELEASED.format(path=path, error=error.strerror)


# Of the command avocado vt-joblock.


def overview(directory: str, tickets: list[Ticket], *, is_free: bool) -> str:
    """Say of a lock directory whether the lock is free, and who waits for it."""
    lines = [f"Lock directory: {directory}", FREE if is_free else NOT_FREE]
    for ticket in tickets:
        where = ticket.card.identity
        host = f" on {tamed(where.host)}" if ticket.card.is_of_another_host else ""
        came = since(ticket.card.came)
        lines.append(
            f"PID {where.pid}{host} of {user(ticket.card.uid)} waits since {came}."
        )
    return "\n".join(lines)


def shown(file: LockFile, processes: list[JobProcess]) -> str:
    """Say what a lock file is, and what of its job is seen to run."""
    if file.state is not State.STALE:
        text = in_the_way(file)
    elif file.reason:
        text = GUESTS_OF_OTHERS.format(user=_owner(file), path=file.path)
    else:
        text = f"a stale lock: the next job removes it.{_facts(file)}"
    if processes:
        text += f"\nWhat runs of that job:{_list(Leftovers(processes))}"
    return text


# Parts of several texts.


def reason(left: LockFile | Leftovers) -> str:
    """Say why nobody can tell what runs of a job, or why something may be missed."""
    why = left.reason if isinstance(left, LockFile) else left.obstacle
    return _REASONS[why].format(tamed(left.detail)) if why else ""


def _owner(file: LockFile) -> str:
    return "unknown" if file.uid is None else user(file.uid)


def _other_host(file: LockFile) -> str:
    """Return the name of the host of a job, if that is another one."""
    if file.card and file.card.is_of_another_host:
        return tamed(file.card.identity.host)
    return ""


def _who_may_act(uid: int | None, processes: list[JobProcess]) -> str:
    if not uid or any(process.uid == 0 for process in processes):
        return "root"
    return f"{user(uid)} or root"
