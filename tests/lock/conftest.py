import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from others import job_id, names

from avocado_vt_joblock import lock

WAIT = "import sys; print(flush=True); sys.stdin.read()"


@pytest.fixture(autouse=True)
def no_hang(request):
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it hangs"))
    signal.alarm(300 * request.config.getoption("--stress"))
    yield
    signal.alarm(0)


@pytest.fixture
def directory():
    """A lock directory that is as /tmp: everybody may write, and remove what is their
    own.

    At the end no card is there without its lock.
    """
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(prefix="vt-joblock-test-", dir=memory) as parent:
        Path(parent).chmod(0o755)
        path = Path(parent, "locks")
        path.mkdir()
        path.chmod(0o1777)
        yield path
        assert [name for name in names(path) if name.endswith(".host")] == []


@pytest.fixture
def new_lock(directory):
    made = []

    def make(job=None, where=directory):
        made.append(lock.JobLock(str(where), job or job_id(len(made) + 1)))
        return made[-1]

    yield make
    for each in made:
        # A test may have removed the file.
        with contextlib.suppress(FileNotFoundError):
            each.release()


@pytest.fixture
def held(new_lock):
    made = new_lock()
    made.acquire()
    return made


@pytest.fixture
def start():
    started = []

    def start(*words, prefix=(), script=WAIT, command=(), env=(), **options):
        """Start a process, and wait until it has begun.

        That does not show with a command of its own.
        """
        line = command or [*prefix, sys.executable, "-c", script, *words]
        # Not in the checkout, whose package would be found first.
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        options = {"cwd": "/", **pipes, **options}
        options.update(env={**os.environ, **dict(env)}, start_new_session=True)
        started.append(subprocess.Popen(line, **options))
        if not command:
            started[-1].stdout.readline()
        return started[-1]

    yield start
    for popen in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(popen.pid, signal.SIGKILL)
        popen.communicate()
