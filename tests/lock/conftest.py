import itertools

import pytest

from avocado_vt_joblock.lock import JobLock


@pytest.fixture
def directory(tmp_path):
    """A lock directory."""
    path = tmp_path / "locks"
    path.mkdir()
    return path


@pytest.fixture
def warnings():
    """What the locks of ``new_lock`` have warned of."""
    return []


@pytest.fixture
def new_lock(directory, warnings):
    """Make a lock of a job of its own; what is held at the end is released."""
    count = itertools.count(1)
    made = []

    def make(job_id=None):
        made.append(JobLock(str(directory), job_id or f"{next(count):040x}", warnings.append))
        return made[-1]

    yield make
    for lock in made:
        lock.release()
