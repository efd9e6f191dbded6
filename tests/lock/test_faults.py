"""Each system call once: the process dies, it fails, it is interrupted."""

import contextlib
import errno
import os
import threading

import pytest
from faults import intercepted, only
from others import CONTENT, attempt, contend, leave_lock, names

from avocado_vt_joblock import lock, processes

DIED = 77
ERRORS = [errno.EIO, errno.ENOSPC, errno.EACCES, errno.EPERM, errno.EINTR, errno.ENOLCK]
# A lock is taken, also over stale ones or beside a live one, or given back.
situations = pytest.mark.parametrize("situation", ["acquire", "stale", "refused", "release"])
afters = pytest.mark.parametrize("after", [False, True], ids=["before", "after"])


def descriptors():
    links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    # That of the listing itself is closed already.
    return {link: os.readlink(link) for link in links if os.path.lexists(link)}


@pytest.fixture
def each_call(directory, new_lock, situation):
    """Take part once for each system call, which is done otherwise; then see that nothing stays."""
    live = new_lock()
    if situation == "refused":
        live.acquire()

    def begin():
        for number, maker in enumerate(CONTENT if situation == "stale" else []):
            leave_lock(directory, number, maker)
        made = new_lock()
        if situation == "release":
            made.acquire()
            return made, made.release
        return made, lambda: contend(made)

    def each_call(instead, may_lose=()):
        made, what = begin()
        calls, number = [], None

        def hook(name, call):
            calls.append(name)
            return instead(name, call) if len(calls) - 1 == number else only([os.getpid()], call)

        with intercepted(hook):
            what()
        made.release()
        for number, name in enumerate(tuple(calls)):
            calls.clear()
            opened = descriptors()
            yield name, begin, intercepted(hook)
            assert name in may_lose or descriptors() == opened, (number, calls)
            told = attempt(directory)
            assert told.state == "WON" or (live.held and told.path == live.path), (number, calls)
            # What is left now is unpublished, and a later job's.
            for path in directory.glob(".*"):
                path.unlink()
            assert len(names(directory)) == live.held, (number, calls)

    return each_call


@situations
@afters
def test_death(each_call, after):
    def die(name, call):
        try:
            if after:
                call()
        finally:
            os._exit(DIED)

    for _, begin, death in each_call(die):
        child = os.fork()
        if child == 0:
            _, what = begin()
            with death:
                what()
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == DIED


@situations
@pytest.mark.parametrize("code", ERRORS, ids=errno.errorcode.get)
def test_error(directory, situation, each_call, code):
    """It is done, maybe without the guard, or the error is told; only what is stale may stay."""

    def fail(name, call):
        if name == "close":
            call()
        raise OSError(code, os.strerror(code))

    for name, begin, failure in each_call(fail):
        made, what = begin()
        with failure:
            told = what()
        if situation == "release":
            assert told.errno == code if told else names(directory) == [], name
        elif told.state == "WON":
            assert name in {"flock", "unlink", "readlink", "kill"}
            assert attempt(directory).path == made.path
        elif told.state == "ERROR":
            assert (told.errno, told.filename == lock.KERNEL_LOCK) == (code, name == "fcntl")
        elif told.state == "UNKNOWN":
            assert told.detail == os.strerror(code)
        else:
            assert (situation, name) == ("stale", "kill") or situation == "refused"
        assert made.release() is None
        assert situation in ("refused", "release") or not os.path.lexists(made.path)


# An iterator that is interrupted before it has a name is closed when it is collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@situations
@afters
def test_interruption(each_call, after):
    def interrupt(name, call):
        is_main = threading.current_thread() is threading.main_thread()
        result = call() if after or not is_main else None
        if is_main:
            raise KeyboardInterrupt
        return result

    # What was interrupted while it was opened or closed is lost to the process.
    for name, begin, interruption in each_call(interrupt, may_lose=("open", "close")):
        made, what = begin()
        with interruption, contextlib.suppress(KeyboardInterrupt):
            what()
        made.release()
        assert (os.path.lexists(made.path), made.held) == (False, False), name
        assert os.path.basename(made.path) not in processes.marks(), name


def test_short_write(directory):
    with intercepted(lambda name, call: 1 if name == "write" else call()):
        assert attempt(directory).errno == errno.ENOSPC
    assert names(directory) == []
