"""``avocado vt-joblock run``: hold the lock while a command runs.

For signals it is as if there was nothing between the user and the command. So they are
kept from this process while the command runs, and are taken one by one. Those of a
terminal go to the command as well; only the others are passed on.
"""

from __future__ import annotations

import os
import signal

from avocado.core.job_id import create_unique_job_id

from avocado_vt_joblock import ending, messages, options, waiting
from avocado_vt_joblock.lock import JobLock, LockInTheWayError
from avocado_vt_joblock.lockdir import DirectoryError

#: Exit codes, as of env(1) and flock(1).
NO_LOCK = 125
CANNOT_RUN = 126
NOT_FOUND = 127
BY_SIGNAL = 128

#: What Avocado takes from its command line, wherever that stands before a "--".
AVOCADO_OPTIONS = ("--config", "--show", "--verbose", "-V", "--enable-paginator")

_PASSED_ON = {
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
}
#: What Avocado, or Python, ignores, and a command is to heed again.
_HEEDED = {signal.SIGTSTP, signal.SIGPIPE, signal.SIGXFSZ}


def run(directory: object, timeout: object, command: list[str]) -> int:
    """Run a command that holds the lock.

    :param directory: the lock directory, as it is set
    :param timeout: how long to wait for the lock, as it is set
    :param command: the command and its arguments, maybe with a "--" before
    :return: the exit code: that of the command, or one of this module
    """
    problem = _problem_of(command)
    if problem:
        return _refuse(problem)
    if command[0] == "--":
        command = command[1:]
    try:
        lock = JobLock(options.directory(directory), create_unique_job_id())
        stale = waiting.acquire(lock, options.timeout(timeout))
    except (LockInTheWayError, DirectoryError, options.OptionError) as error:
        return _refuse(messages.refusal(error, directory, log=""))
    except (KeyboardInterrupt, SystemExit):
        return NO_LOCK
    try:
        messages.tell_of_stale(stale)
        code = _run(command)
        ending.give_back(lock, looks=True)
        return code
    finally:
        lock.abandon()


def _refuse(text: str) -> int:
    messages.tell(text, loggers=(messages.USER_LOG,))
    return NO_LOCK


def _problem_of(command: list[str]) -> str:
    """Say what is wrong with a command line, if something is."""
    if not command or command == ["--"]:
        return messages.NO_COMMAND
    if command[0] == "--":
        return ""
    for word in command:
        if word.partition("=")[0] in AVOCADO_OPTIONS:
            return messages.OPTION_OF_AVOCADO.format(option=word)
    return ""


def _run(command: list[str]) -> int:
    """Run a command to its end, whatever signals come; return its exit code."""
    # The terminal stops and continues this process together with the command.
    signal.signal(signal.SIGTSTP, signal.SIG_DFL)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON | {signal.SIGCHLD})
    try:
        pid = os.posix_spawnp(
            command[0], command, os.environ, setsigmask=mask, setsigdef=_HEEDED
        )
        return _wait_for(pid)
    except FileNotFoundError as error:
        messages.tell(f"{command[0]}: {error.strerror}", loggers=(messages.USER_LOG,))
        return NOT_FOUND
    except OSError as error:
        messages.tell(f"{command[0]}: {error.strerror}", loggers=(messages.USER_LOG,))
        return CANNOT_RUN
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _wait_for(pid: int) -> int:
    """Wait for a child, and pass signals on to it; return its exit code."""
    while True:
        info = signal.sigwaitinfo(_PASSED_ON | {signal.SIGCHLD})
        if info.si_signo == signal.SIGCHLD:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                code = os.waitstatus_to_exitcode(status)
                return code if code >= 0 else BY_SIGNAL - code
        elif info.si_code <= 0:
            # By sigaction(2) it was sent by a process, and so to this one alone.
            os.kill(pid, info.si_signo)
