"""What a job tells its user and its log. What is said of a lock is in ``advice``.

``docs/messages.rst`` has all of it, with what to do.
"""

from __future__ import annotations

import errno
import math
import os
import shlex
import time

from avocado_vt_joblock import DIR, SECTION, TIMEOUT, advice, installed_file, options
from avocado_vt_joblock.formats import count, duration, local_time, since, tamed, user
from avocado_vt_joblock.leftovers import Leftovers
from avocado_vt_joblock.lock import JobIdError, LockInTheWayError, WaitedInVainError
from avocado_vt_joblock.lockdir import DirectoryError, Ticket, Use
from avocado_vt_joblock.lockfile import LockFile, State

#: How the text of each stopped job begins. Scripts look for it.
FAILURE = "Failure trying to set Avocado-VT job lock: "
#: How the summary of a stopped job names the only test that its results have.
TEST_ID = "vt-joblock (the job lock, none of your tests)"

#: The errors that ``why_stopped`` has a text for.
_STOPPED_BY = (
    LockInTheWayError,
    DirectoryError,
    JobIdError,
    options.OptionError,
    options.OrderError,
)

# Constants of the command ``avocado vt-joblock``.
VERDICTS = {
    "free": "The lock is free: a job with VT tests can start.",
    "refused": "The lock is not free: a job with VT tests cannot start.",
    "stopped": "Something is wrong: a job with VT tests cannot start.",
}
SWITCHED_OFF = """The lock is switched off by [plugins] disable: no job takes it,
whatever is shown here."""
NO_COMMAND = """There is no command to run:
    avocado vt-joblock run -- COMMAND ARGUMENT..."""


# A stopped job.


def refusal(error: BaseException, directory: object, log: object) -> str:
    """Say why a job is stopped, and what to do.

    :param error: what has stopped it
    :param directory: the lock directory, as it is set
    :param log: where the job's log is
    """
    known = why_stopped(error, directory)
    if known:
        return f"{FAILURE}{known}{_read_more()}"
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        return f"{FAILURE}it was interrupted before its tests."
    return f"{FAILURE}{type(error).__name__}: {error}.\nDetails are in {log}."


def why_stopped(error: BaseException, directory: object) -> str:
    """Say why the lock cannot be had; return "" for an unforeseen error.

    :param error: what stops a job
    :param directory: the lock directory, as it is set
    """
    if isinstance(error, LockInTheWayError):
        return _of_other_job(error, directory)
    if isinstance(error, DirectoryError):
        return _of_directory(error, directory)
    if isinstance(error, options.OptionError):
        return _of_option(error)
    if isinstance(error, options.OrderError):
        return _of_order(error)
    if isinstance(error, JobIdError):
        return f"the job id {error.job_id!r} is not 40 hexadecimal digits."
    return ""


def is_foreseen(error: BaseException) -> bool:
    """Tell whether an error is one of those that have a text of their own."""
    return isinstance(error, (*_STOPPED_BY, KeyboardInterrupt, SystemExit))


def headline(error: BaseException, text: str) -> str:
    """Say in one line why a job is stopped, and whose lock is in its way.

    :param error: what has stopped it
    :param text: what was said of it
    """
    line, _, rest = text.partition("\n")
    if line.endswith(":"):
        second_line = rest.partition("\n")[0]
        line += f" {second_line.strip()}"
    file = error.file if isinstance(error, LockInTheWayError) else None
    if not file:
        return line
    pid = f", PID {file.pid}" if file.pid else ""
    return f"{line} User {advice.owner(file)}{pid}, since {local_time(file.since)}."


def _of_other_job(error: LockInTheWayError, directory: object) -> str:
    has_waited = isinstance(error, WaitedInVainError)
    if error.file:
        text = advice.on_refusal(error.file, has_waited=has_waited)
    else:
        path = os.path.expanduser(str(directory))
        text = _in_line(error.jobs_before)
        text += advice.how_to_wait(path, has_waited=has_waited)
    if isinstance(error, WaitedInVainError):
        return f"out of time after {duration(error.waited)}: {text}"
    return text


def _of_option(error: options.OptionError) -> str:
    if error.option == TIMEOUT:
        return f"""this is not a time to wait:
    {error}
Give a number of seconds, or a number with s, m, h or d, without a space. With 0
a job fails at once, with -1 it waits for as long as it takes.
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
    text = f"""the lock directory {_trouble(error)}:
    {DIR} = {directory!r}{meant}"""
    return f"{text}\n{_remedy(error, path)}\n{_where_to_set('dir')}"


def _remedy(error: DirectoryError, path: str) -> str:
    """Say what to do about a lock directory."""
    number = error.error.errno
    if error.use is Use.OPEN and number == errno.ENOENT:
        return f"Make it: mkdir -p {shlex.quote(path)}\nOr correct the setting."
    if error.use is Use.WRITE and number == errno.ENOENT:
        return """Something has removed the new lock file at once: look for what cleans
the directory. Or correct the setting."""
    if error.use is Use.WRITE and number in (errno.ENOSPC, errno.EDQUOT):
        return "Make room there. Or correct the setting."
    return "Correct the setting."


def _trouble(error: DirectoryError) -> str:
    """Say what is wrong with the lock directory."""
    why = error.error.strerror or repr(error.error)
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
    manual = installed_file(
        "share/doc/avocado-framework-plugin-vt-joblock/messages.rst"
    )
    return f"\nMore: less {shlex.quote(manual)}" if manual else ""


# A job that waits.


def waiting(error: LockInTheWayError | DirectoryError, seconds: float) -> str:
    """Say what a job waits for, and until when.

    :param error: what has stopped its last attempt
    :param seconds: how long it will wait from now on
    """
    if isinstance(error, DirectoryError):
        what = f"the lock directory {_trouble(error)}."
    elif not error.file:
        what = _in_line(error.jobs_before)
    elif error.file.state is State.UNKNOWN:
        what = f"""at this moment nobody can tell whether a job holds the lock:
{advice.why_unknown(error.file)}.
    file:   {error.file.path}"""
    else:
        what = advice.on_waiting(error.file)
    return f"Waiting {_until(seconds)}:\n{what}"


def still_waiting(waited: float, seconds: float) -> str:
    """Say that a job still waits, for how long already, and until when."""
    return f"Still waiting {_until(seconds)}, after {duration(waited)}."


def obtained(waited: float) -> str:
    """Say that a job has the lock for which it has waited."""
    return f"Obtained the lock after {duration(waited)}."


def stopped_waiting(waited: float, what: str) -> str:
    """Say that a wait was stopped, and what has not run: "test" or "command"."""
    return f"Stopped waiting for the lock after {duration(waited)}. No {what} has run."


def on_terminal(waited: float, limit: float, jobs_before: int) -> str:
    """Say in one line that a job waits, and how many jobs come before it."""
    text = f"Waiting for the lock: {duration(waited)}"
    if limit < math.inf:
        text += f" of {duration(limit)}"
    if jobs_before:
        text += f", after {count(jobs_before, 'job', 'jobs')}"
    return f"{text}. Ctrl-C ends the waiting."


def _until(seconds: float) -> str:
    if seconds == math.inf:
        return "for as long as it takes"
    return f"until {local_time(time.time() + seconds)}"


def _in_line(jobs_before: int) -> str:
    if jobs_before == 1:
        return "1 job that came before this one waits for the lock."
    return f"{jobs_before} jobs that came before this one wait for the lock."


# A job that has the lock.


def removed(file: LockFile) -> str:
    """Say that a stale lock was removed."""
    return f"Removed the stale lock file {file.path}."


def not_removed(file: LockFile) -> str:
    """Say why a stale lock is still there."""
    return f"""The stale lock file could not be removed: {file.not_removed}.
    {file.path}
It does not stop this job. The next job of its owner or of root removes it."""


def no_sticky_bit(path: str) -> str:
    """Warn of a directory in which others can remove the lock."""
    return f"""Others may write in the lock directory {path}
and, since it has no sticky bit, remove the lock while a job runs. Prevent that:
    chmod +t {shlex.quote(path)}"""


def unknown_key(key: str) -> str:
    """Warn of a setting that is no option."""
    return f"""[{SECTION}] has no option {key!r}: it is ignored.
The options are dir and timeout."""


# The end of a job.


def ending(left: Leftovers, limit: float) -> str:
    """Say that a job waits at its end, for so many seconds at most."""
    return f"""The job has ended, but {_still_run(left, "of it")}.
Waiting up to {limit:g} s. Ctrl-C ends the waiting."""


def left_behind(left: Leftovers, path: str, *, is_in_place: bool) -> str:
    """Say what a job has left, and that its lock file stays if it is in place."""
    stays = f"""
The lock file stays:
    {path}"""
    if not left.processes:
        text = f"""Nobody can tell whether something of the job still runs:
{advice.obstacle(left)}."""
        if is_in_place:
            text += f"{stays}\nThe next job looks again."
        return text
    text = f"{_still_run(left, 'of the job')}:{advice.listed(left)}"
    if is_in_place:
        text += f"{stays}\n{advice.who_is_stopped(left.processes, os.geteuid())}"
    return f"{text}\n{advice.to_do(left, os.geteuid())}"


def not_released(error: OSError, path: str) -> str:
    """Say what went wrong when a job gave its lock back."""
    if isinstance(error, FileNotFoundError):
        return f"""The lock file was removed or replaced while the job ran:
    {path}
Other jobs may have run at the same time and changed its images. Find out what
did it: a cleaner of temporary files, maybe."""
    return f"""The lock could not be given back: {error.strerror or repr(error)}.
    {path}
The file stops no job once the last process of this job has ended. A later job
removes it."""


def _still_run(left: Leftovers, of_job: str) -> str:
    processes = count(len(left.processes), "process", "processes")
    run = "runs" if len(left.processes) == 1 else "run"
    return f"{processes} {of_job} still {run}"


# The command avocado vt-joblock.


def overview(directory: str, verdict: str, tickets: list[Ticket]) -> str:
    """Say of a lock directory whether the lock is free, and who waits for it.

    :param directory: its path
    :param verdict: what becomes of a job, a key of ``VERDICTS``
    :param tickets: of the jobs that wait
    """
    lines = [f"Lock directory: {directory}", VERDICTS[verdict]]
    for ticket in tickets:
        process = ticket.card.identity
        host = f" on {tamed(process.host)}" if ticket.card.is_of_another_host else ""
        came = since(ticket.card.came)
        name = user(ticket.card.uid)
        lines.append(f"PID {process.pid}{host} of {name} waits since {came}.")
    return "\n".join(lines)


def cannot_run(command: str, error: OSError) -> str:
    """Say why a command cannot be run."""
    if isinstance(error, FileNotFoundError):
        return f"There is no command {command!r}."
    return f"The command {command!r} cannot be run: {error.strerror}."


def option_of_avocado(option: str) -> str:
    """Say that Avocado takes a command's option for one of its own."""
    return f"""Avocado reads {option} itself. Write -- before the command:
    avocado vt-joblock run -- COMMAND ARGUMENT..."""
