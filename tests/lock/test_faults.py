"""Each system call once: the process dies, it fails, it is interrupted."""

import contextlib
import errno
import os
import threading
from pathlib import Path

import pytest
from faults import intercepted, only
from others import CONTENT, attempt, contend, leave_card, leave_lock, names

from avocado_vt_joblock import card, marks

DIED = 77
ERRORS = ["EIO", "ENOSPC", "EACCES", "EPERM", "EINTR", "ENOLCK"]
#: A lock is taken, also over stale ones, beside a live one, or by a job that waits for
#: that one; it is given back, or its file is left.
SITUATIONS = ["acquire", "stale", "refused", "waiting", "release", "hand_over"]
situations = pytest.mark.parametrize("situation", SITUATIONS)
afters = pytest.mark.parametrize("after", [False, True], ids=["before", "after"])


def descriptors():
    """Return what is open, by the number of its descriptor."""
    found = {}
    for fd in os.listdir("/proc/self/fd"):
        # That of the listing itself is closed already.
        with contextlib.suppress(FileNotFoundError):
            found[int(fd)] = os.readlink(f"/proc/self/fd/{fd}")
    return found


def give_up(how):
    try:
        how()
    except OSError as error:
        return error
    return None


def remove_litter(directory):
    """Remove what has no lock file, as a later job does."""
    for name in names(directory):
        if name.startswith("."):
            (directory / name).unlink()


class Part:
    """What a job does, once for each of its system calls, which is done otherwise."""

    def __init__(self, directory, new_lock, situation):
        self.directory = directory
        self.new_lock = new_lock
        self.situation = situation
        self.live = new_lock()
        self.calls = []
        if situation in ("refused", "waiting"):
            self.live.acquire()

    def begin(self):
        """Make a lock, and return it with what is to be done with it."""
        # It is read once in each process, and the calls are counted.
        card.own_identity()
        if self.situation == "stale":
            for number, maker in enumerate(CONTENT):
                leave_card(leave_lock(self.directory, number, maker))
        made = self.new_lock()
        if self.situation == "waiting":
            contend(made, waits=True)
            return made, lambda: contend(made, waits=True)
        if self.situation in ("release", "hand_over"):
            made.acquire()
            return made, lambda: give_up(getattr(made, self.situation))
        return made, lambda: contend(made)

    def each_call(self, instead, may_lose=()):
        """Yield the name of each call, and what has it be done otherwise.

        After that see that nothing stays.
        """
        number = None

        def hook(name, call):
            self.calls.append(name)
            if len(self.calls) - 1 == number:
                return instead(name, call)
            return only([os.getpid()], call)

        made, what = self.begin()
        with intercepted(hook):
            what()
        made.release()
        made.abandon()
        remove_litter(self.directory)
        for number, name in enumerate(tuple(self.calls)):
            self.calls.clear()
            opened = descriptors()
            yield name, intercepted(hook)
            self.check_descriptors(opened, name, may_lose)
            self.check_directory(number)

    def check_descriptors(self, opened, name, may_lose):
        for fd, path in descriptors().items() - opened.items():
            assert name in may_lose, (path, self.calls)
            os.close(fd)

    def check_directory(self, number):
        place = (number, self.calls)
        remove_litter(self.directory)
        if self.live.is_held:
            assert attempt(self.directory).path == self.live.path, place
            self.live.release()
        assert attempt(self.directory).state == "WON", place
        assert os.listdir(self.directory) == [], place
        if self.situation in ("refused", "waiting"):
            self.live.acquire()


@pytest.fixture
def part(directory, new_lock, situation):
    return Part(directory, new_lock, situation)


@situations
@afters
def test_death(part, after):
    def die(name, call):
        try:
            if after:
                call()
        finally:
            os._exit(DIED)

    for _, death in part.each_call(die):
        child = os.fork()
        if child == 0:
            _, what = part.begin()
            with death:
                what()
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == DIED


# Without these there is no guard, no card, or a file that others may not read; what is
# stale stays; of this process some things are not known.
MAY_FAIL = {"flock", "symlink", "fchmod", "unlink", "kill", "stat", "close"}
MAY_FAIL |= {"readlink", "lstat"}


def check_attempt(situation, name, told, code):
    """It has won, maybe without the guard or the card, or the error is told."""
    if told.state == "WON":
        assert name in MAY_FAIL
        assert attempt(Path(told.path).parent).path == told.path
    elif told.state == "ERROR":
        assert told.errno == code
        assert (told.use == "LOCK") == (name == "fcntl")
    elif told.state == "UNKNOWN":
        assert told.detail.endswith(os.strerror(code))
    else:
        is_stale = (situation, name) == ("stale", "kill")
        assert is_stale or situation in ("refused", "waiting")


def check_end(situation, name, told, code, path):
    """The file is gone, or left, or the error is told."""
    assert not told or told.errno == code
    if situation == "release":
        assert told or not os.path.lexists(path)
    else:
        assert os.path.lexists(path)
    if situation == "hand_over" and name in ("stat", "symlink", "rename"):
        # The card cannot say so: it is live as long as this process is there.
        assert attempt(Path(path).parent).path == path
        card.remove(str(path))


@situations
@pytest.mark.parametrize("code", ERRORS)
def test_error(part, situation, code):
    """Only what is stale may stay."""
    code = getattr(errno, code)

    def fail(name, call):
        if name == "close":
            call()
        raise OSError(code, os.strerror(code))

    for name, failure in part.each_call(fail):
        made, what = part.begin()
        with failure:
            told = what()
        if situation in ("release", "hand_over"):
            check_end(situation, name, told, code, made.path)
        else:
            check_attempt(situation, name, told, code)
            made.release()
            assert name == "unlink" or not os.path.lexists(made.path), name
        made.abandon()
        assert not made.is_held


# An iterator that is interrupted before it has a name is closed when it is collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@situations
@afters
def test_interruption(part, after):
    def interrupt(name, call):
        is_main = threading.current_thread() is threading.main_thread()
        result = call() if after or not is_main else None
        if is_main:
            raise KeyboardInterrupt
        return result

    # What was interrupted while it was opened or closed is lost to the process: the
    # guard, the file of another lock, or its own before it has the kernel lock. That
    # one is closed by its object later on.
    for name, interruption in part.each_call(interrupt, may_lose=("open", "close")):
        made, what = part.begin()
        with interruption, contextlib.suppress(KeyboardInterrupt):
            what()
        was_held = made.is_held
        made.abandon()
        assert made.path not in descriptors().values(), name
        assert not made.is_held, name
        assert was_held or not os.path.lexists(made.path), name
        assert os.path.basename(made.path) not in marks.own(), name


def test_short_write(directory):
    with intercepted(lambda name, call: 1 if name == "write" else call()):
        told = attempt(directory)
    assert (told.use, told.errno) == ("WRITE", errno.ENOSPC)
    assert os.listdir(directory) == []


def test_file_that_something_removes_at_once(directory):
    """A job that others cannot see must not run."""

    def hook(name, call):
        result = call()
        if name == "rename":
            os.unlink(call.args[1])
        return result

    with intercepted(hook):
        told = attempt(directory)
    assert (told.state, told.use, told.errno) == ("ERROR", "WRITE", errno.ENOENT)
    assert os.listdir(directory) == []


def test_attempt_after_one_that_could_not_remove_its_file(directory, new_lock):
    """The disk is full at first, and then gives errors; a minute later it is good."""

    def hook(name, call):
        if name in ("write", "unlink"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return call()

    made = new_lock()
    with intercepted(hook):
        assert contend(made, waits=True).errno == errno.EIO
    assert f".{os.path.basename(made.path)}" in os.listdir(directory)
    assert contend(made, waits=True).state == "WON"


def test_handing_over_beside_a_new_card(directory, held):
    """An earlier call was interrupted; or a stranger has made it."""
    os.symlink("odd", f"{card.path_of(held.path)}.new")
    held.hand_over()
    assert card.read(held.path).is_handed_over
    assert attempt(directory).state == "WON"
    assert os.listdir(directory) == []


@pytest.mark.parametrize("refused", ["fchmod", "flock", "symlink", "utime"])
def test_file_system_that_lacks_something(directory, refused):
    """CIFS and FUSE may refuse a mode, or links; not all file systems have flock(2)."""

    def hook(name, call):
        if name == refused:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        return call()

    with intercepted(hook):
        assert attempt(directory).state == "WON"
    assert os.listdir(directory) == []
