import contextlib
import fcntl
import shutil
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
from environments import copy_sources, install, new_environment, run
from others import process
from sandbox import Sandbox, finish, start


def pytest_addoption(parser):
    parser.addoption(
        "--stress", type=int, default=1, help="do so many times the rounds"
    )


def pytest_collection_modifyitems(items):
    """Have tests that run alone come last: before, all others would wait for them."""
    items.sort(key=lambda item: item.get_closest_marker("alone") is not None)


@pytest.fixture(autouse=True)
def turn(request, tmp_path_factory):
    """Have tests that disturb every look at the processes of the host run alone.

    Other tests run beside each other. Who comes to the gate later waits behind it, so
    that those who run alone have their turn, too.
    """
    if not hasattr(request.config, "workerinput"):
        yield
        return
    common = tmp_path_factory.getbasetemp().parent
    is_alone = request.node.get_closest_marker("alone")
    with contextlib.ExitStack() as files:
        gate, room = (
            files.enter_context((common / name).open("w")) for name in ("gate", "room")
        )
        fcntl.flock(gate, fcntl.LOCK_EX)
        fcntl.flock(room, fcntl.LOCK_EX if is_alone else fcntl.LOCK_SH)
        fcntl.flock(gate, fcntl.LOCK_UN)
        yield


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    directory = tmp_path_factory.mktemp("build")
    source, dist = directory / "source", directory / "dist"
    copy_sources(source)
    build = [sys.executable, "-m", "build", "--no-isolation"]
    printed = run(*build, "--outdir", dist, source)
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    return SimpleNamespace(wheel=wheel, sdist=sdist, printed=printed)


@pytest.fixture(scope="session")
def avocado_packages(tmp_path_factory):
    """A directory with Avocado, and without avocado-vt, for many environments."""
    directory = tmp_path_factory.mktemp("packages")
    # Avocado needs setuptools for pkg_resources. To copy them is quicker than pip, and
    # the same.
    for file in metadata.files("avocado-framework") + metadata.files("setuptools"):
        if ".." not in file.parts:
            (directory / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file.locate(), directory / file)
    return directory


@pytest.fixture(scope="session")
def installed(built, avocado_packages, tmp_path_factory):
    """The interpreter of an environment that has Avocado and the wheel."""
    python = new_environment(tmp_path_factory.mktemp("environment"), avocado_packages)
    install(python, built.wheel)
    return python


@pytest.fixture
def rounds(request):
    """Count the rounds of a test: as many as it wants, times what ``--stress``
    says."""

    def count(usual):
        stress = request.config.getoption("--stress")
        for number in range(usual * stress):
            if stress > 1 and number % (usual * max(1, stress // 20)) == 0:
                print(f"  {number // usual}/{stress}", end="", flush=True)
            yield number

    return count


@pytest.fixture
def sandboxes():
    """Make as many sandboxes as needed, in a directory that other users can
    enter."""
    made = []
    with tempfile.TemporaryDirectory(prefix="vt-joblock-test-") as directory:
        Path(directory).chmod(0o755)

        def make():
            made.append(Sandbox(Path(directory) / f"user{len(made) + 1}"))
            return made[-1]

        yield make
        for sandbox in made:
            sandbox.close()


@pytest.fixture
def sandbox(sandboxes):
    return sandboxes()


@pytest.fixture
def holder(sandbox):
    """A job that holds the lock, and its test."""
    test = sandbox.vt_test("holder")
    job = start(sandbox, test)
    yield job, test
    test.end()
    code, text = finish(job)
    assert code == 0, text


@pytest.fixture
def held_lock(sandbox):
    """A lock that is held by a process which has not started the jobs here."""
    with process(str(sandbox.lock_dir)) as holder:
        assert holder.told.state == "WON"

        def release():
            holder.stdin.close()
            holder.wait()

        yield SimpleNamespace(pid=holder.pid, path=holder.told.path, release=release)
