import itertools
import tempfile
from pathlib import Path

import pytest
from sandbox import Sandbox


@pytest.fixture
def sandboxes():
    """Make as many sandboxes as needed, in a directory that other users can enter."""
    made = []
    count = itertools.count(1)
    with tempfile.TemporaryDirectory(prefix="vt-joblock-test-") as directory:
        root = Path(directory)
        root.chmod(0o755)

        def make():
            made.append(Sandbox(root / f"user{next(count)}"))
            return made[-1]

        yield make
        for sandbox in made:
            sandbox.close()


@pytest.fixture
def sandbox(sandboxes):
    return sandboxes()
