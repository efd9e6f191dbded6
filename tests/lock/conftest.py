import itertools
import signal
import tempfile
from pathlib import Path

import pytest
from holders import job_id, logged

from avocado_vt_joblock.lock import JobLock

#: How long a test may take before it counts as a hang, in seconds, without --stress.
HANG = 300


@pytest.fixture(autouse=True)
def no_hang(request):
    """Fail what hangs."""

    def fail(signum, frame):
        pytest.fail("it hangs")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(HANG * request.config.getoption("--stress"))
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def directory():
    """A lock directory that is as /tmp: everybody may write, and remove what is their own."""
    with tempfile.TemporaryDirectory(prefix="vt-joblock-test-") as parent:
        Path(parent).chmod(0o755)
        path = Path(parent) / "locks"
        path.mkdir()
        path.chmod(0o1777)
        yield path


@pytest.fixture
def warnings():
    """What locks have warned of."""
    with logged() as texts:
        yield texts


@pytest.fixture
def new_lock(directory):
    """Make a lock of a job of its own; what is held at the end is released."""
    count = itertools.count(1)
    made = []

    def make(job=None, where=directory):
        made.append(JobLock(str(where), job or job_id(next(count))))
        return made[-1]

    yield make
    for lock in made:
        lock.release()
