"""``avocado vt-joblock run``: hold the lock while a command runs.

For signals it is as if there was nothing between the user and the command. So this
process blocks them while the command runs, and takes them one by one. A terminal sends
its signals to the command as well. All others are passed on to it.
"""

from __future__ import annotations

import contextlib
import os
import signal

from avocado.core.job_id import create_unique_job_id

from avocado_vt_joblock import ending, messages, options, waiting
from avocado_vt_joblock.lock import JobLock, LockInTheWayError
from avocado_vt_joblock.lockdir import DirectoryError

#: Exit codes, as those of env(1) and flock(1).
NO_LOCK = 125
CANNOT_RUN = 126
NOT_FOUND = 127
BY_SIGNAL = 128

#: What Avocado takes from its command line, wherever that stands before a "--". With
#: --version and -v, which it takes as well, no plugin is ever called.
AVOCADO_OPTIONS = ("--config", "--show", "--verbose", "-V", "--enable-paginator")

#: What is blocked while the command runs, and passed on to it.
_PASSED_ON = {
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
}
#: What Avocado (SIGTSTP) or Python ignores, and the command is to heed again.
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
    lock: JobLock | None = None
    try:
        seconds = options.timeout(timeout)
        lock = JobLock(options.directory(directory), create_unique_job_id())
        messages.tell_of_stale(waiting.acquire(lock, seconds))
        code = _run(command)
        ending.give_back(lock, looks=True)
        return code
    except (LockInTheWayError, DirectoryError, options.OptionError) as error:
        return _refuse(messages.refusal(error, directory, log=""))
    except (KeyboardInterrupt, SystemExit):
        return NO_LOCK  # While the command runs signals raise nothing.
    finally:
        if lock:
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
            return messages.option_of_avocado(word)
    return ""


def _run(command: list[str]) -> int:
    """Run a command to its end, whatever signals come; return its exit code."""
    # The terminal stops and continues this process together with the command.
    signal.signal(signal.SIGTSTP, signal.SIG_DFL)
    # A parent may have ignored it, and then nothing would tell that the command has
    # ended.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON | {signal.SIGCHLD})
    try:
        try:
            pid = os.posix_spawnp(
                command[0], command, os.environ, setsigmask=mask, setsigdef=_HEEDED
            )
        except OSError as error:
            text = f"{command[0]}: {error.strerror}"
            messages.tell(text, loggers=(messages.USER_LOG,))
            return NOT_FOUND if isinstance(error, FileNotFoundError) else CANNOT_RUN
        return _wait_for(pid)
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
            # By sigaction(2) a process has sent it, and so to this process alone. A
            # child that is root's, by sudo for example, gets no signals from here.
            with contextlib.suppress(PermissionError):
                os.kill(pid, info.si_signo)
