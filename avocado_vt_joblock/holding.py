"""``avocado vt-joblock run``: hold the lock while a command runs.

The command gets signals as if the user had started it directly. While it runs, this
process blocks them and reads them one by one. It passes each one on to the command,
except those of a terminal, which the command gets from the terminal itself.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
from collections.abc import Iterator

from avocado.core.job_id import create_unique_job_id

from avocado_vt_joblock import ending, messages, options, telling, waiting
from avocado_vt_joblock.lock import JobLock, LockInTheWayError
from avocado_vt_joblock.lockdir import DirectoryError

#: Exit codes, as those of env(1) and flock(1).
NO_LOCK = 125
CANNOT_RUN = 126
NOT_FOUND = 127
BY_SIGNAL = 128

#: Options that Avocado reads itself, wherever they stand before a "--". With --version
#: and -v, which are such options too, it never calls this plugin.
AVOCADO_OPTIONS = ("--config", "--show", "--verbose", "-V", "--enable-paginator")

#: How often to look whether the command has ended, whatever signals come, in seconds.
POLL_INTERVAL = 1.0

#: What is blocked while the command runs, and passed on to it.
_PASSED_ON = {
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
}
#: What Avocado (SIGTSTP) or Python ignores: in the command these signals act again.
_RESTORED = {signal.SIGTSTP, signal.SIGPIPE, signal.SIGXFSZ}


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
        telling.tell_of_stale(waiting.acquire(lock, seconds, "command"))
        with _signals_blocked() as mask:
            code = _run(command, mask)
            _give_back(lock)
    except (LockInTheWayError, DirectoryError, options.OptionError) as error:
        return _refuse(messages.refusal(error, directory, log=""))
    except (KeyboardInterrupt, SystemExit):
        # Most likely they have ended the wait for the lock.
        return NO_LOCK
    finally:
        if lock:
            lock.abandon()
    return code


def _refuse(text: str) -> int:
    telling.tell(text, loggers=(telling.USER_LOG,))
    return NO_LOCK


def _problem_of(command: list[str]) -> str:
    """Say what is wrong with a command line, if something is."""
    if not command or command == ["--"]:
        return messages.NO_COMMAND
    if command[0] == "--":
        return ""
    for word in command:
        if word == "--":
            break
        if word.partition("=")[0] in AVOCADO_OPTIONS:
            return messages.option_of_avocado(word)
    return ""


@contextlib.contextmanager
def _signals_blocked() -> Iterator[set[int]]:
    """Block the signals that are passed on, until the lock is given back.

    Yields the signals that were blocked before.
    """
    # The terminal stops and continues this process together with the command.
    signal.signal(signal.SIGTSTP, signal.SIG_DFL)
    # If a parent has it ignored, nothing would tell that the command has ended.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    blocked = _PASSED_ON | {signal.SIGCHLD}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    try:
        yield {int(number) for number in mask}
    finally:
        # A signal that comes after the end of the command is dropped.
        while signal.sigtimedwait(blocked, 0):
            pass
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _give_back(lock: JobLock) -> None:
    """Give the lock back.

    Ctrl-C ends the wait for leftovers. Other signals do not.
    """
    # A Ctrl-C that came before was for the command.
    signal.sigtimedwait({signal.SIGINT}, 0)
    with contextlib.suppress(KeyboardInterrupt):
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            ending.give_back(lock, looks=True)
        finally:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


def _run(command: list[str], mask: set[int]) -> int:
    """Run a command to its end, whatever signals come.

    :param command: the command and its arguments
    :param mask: the signals that are to be blocked in it
    :return: its exit code, or one of this module
    """
    try:
        pid = _spawn(command, mask)
    except OSError as error:
        text = messages.cannot_run(command[0], error)
        telling.tell(text, loggers=(telling.USER_LOG,))
        return NOT_FOUND if isinstance(error, FileNotFoundError) else CANNOT_RUN
    return _wait_for(pid)


def _spawn(command: list[str], mask: set[int]) -> int:
    def spawn(program: str, words: list[str]) -> int:
        return os.posix_spawnp(
            program, words, os.environ, setsigmask=mask, setsigdef=_RESTORED
        )

    try:
        return spawn(command[0], command)
    except OSError as error:
        if error.errno != errno.ENOEXEC:
            raise
    # It is a script without a line "#!": sh runs it, as with env(1).
    script = shutil.which(command[0]) or command[0]
    return spawn("/bin/sh", ["sh", script, *command[1:]])


def _wait_for(pid: int) -> int:
    """Wait for a child, and pass signals on to it; return its exit code."""
    while True:
        # A plugin may have a thread that does not block these signals. If that thread
        # gets SIGCHLD, this waits until the interval ends. If it gets SIGINT, Python
        # raises KeyboardInterrupt here.
        info = None
        with contextlib.suppress(KeyboardInterrupt):
            info = signal.sigtimedwait(_PASSED_ON | {signal.SIGCHLD}, POLL_INTERVAL)
        if info and info.si_signo in _PASSED_ON and info.si_code <= 0:
            # By sigaction(2), such a code means that a process has sent the signal, and
            # not the terminal. A command that runs as root, by sudo, cannot be sent it.
            with contextlib.suppress(PermissionError):
                os.kill(pid, info.si_signo)
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else BY_SIGNAL - code
