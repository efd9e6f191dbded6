"""Which processes keep the lock of an ended job live: what it has started, and nothing else."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import WAIT
from faults import intercepted
from needs import SOME_USER, needs_other_users, needs_root
from others import attempt, attempt_as, job_id, kill, leave_stale_lock, lock_path, pids, process
from sandbox import run_as, wait_for

from avocado_vt_joblock import processes
from avocado_vt_joblock.lockfile import State
from avocado_vt_joblock.processes import VARIABLE

JOB_ID = job_id(0xDEAD)
NAME = lock_path(Path(), 0xDEAD).name
OTHER = lock_path(Path(), 1).name
MARK = {VARIABLE: NAME}
PYTHON = [sys.executable, "-c", WAIT]
#: As Avocado starts a runner, in whose child avocado-vt runs the test.
RUNNER = ["task-run", "-i", "1-test", "-j", JOB_ID, "-k", "avocado-vt"]
ECHO = "&& echo x > /dev/null"


@pytest.fixture
def path(directory):
    """A lock file of a job that was killed."""
    return leave_stale_lock(directory)


@pytest.fixture
def tools(tmp_path):
    """Programs that sleep, by the names of others, and aexpect_helper, which is a script."""
    for name in ("tcpdump", "dnsmasq", "qemu", "tcpdump-wrapper"):
        (tmp_path / name).symlink_to(shutil.which("sleep"))
    (tmp_path / "aexpect_helper").write_text(f"#!{sys.executable}\n{WAIT}\n")
    (tmp_path / "aexpect_helper").chmod(0o755)
    return tmp_path


@pytest.mark.parametrize(
    ("command", "variables", "counts"),
    [
        (PYTHON, MARK, True),
        (PYTHON, {VARIABLE: f"a:{NAME}:b"}, True),
        (PYTHON, {VARIABLE: OTHER}, False),
        (PYTHON, {f"X{VARIABLE}": NAME, "Y": f"{VARIABLE}={NAME}"}, False),
        # The way out for what shall not count.
        (["env", "-u", VARIABLE, *PYTHON], MARK, False),
        ([*PYTHON, *RUNNER], {}, True),
        (["env", "-i", *PYTHON, *RUNNER], {}, True),
        ([*PYTHON, *RUNNER[:4], JOB_ID.upper(), *RUNNER[5:]], {}, True),
        ([*PYTHON, *RUNNER[1:]], {}, False),
        ([*PYTHON, *RUNNER[:4]], {}, False),
        ([*PYTHON, "-j", JOB_ID, "task-run"], {}, False),
        ([*PYTHON, *RUNNER[:4], job_id(1)], {}, False),
        ([*PYTHON, " ".join(RUNNER)], {}, False),
        # Avocado takes a job id from its user; the mark knows better.
        ([*PYTHON, *RUNNER], {VARIABLE: OTHER}, False),
        # What avocado-vt starts beside its tests touches no image.
        (["tcpdump", "1000"], MARK, False),
        (["{tools}/dnsmasq", "1000"], MARK, False),
        (["{tools}/aexpect_helper"], MARK, False),
        (["bash", "-c", f"tcpdump 1000 {ECHO}"], MARK, False),
        (["sh", "-c", "{tools}/dnsmasq 1000"], MARK, False),
        # All else may.
        (["qemu", "1000"], MARK, True),
        (["tcpdump-wrapper", "1000"], MARK, True),
        ([*PYTHON, "tcpdump"], MARK, True),
        (["bash", "-c", "tcpdump 1000; qemu 1000"], MARK, True),
        (["bash", "-c", f"tcpdump 1000 && qemu 1000 {ECHO}"], MARK, True),
        (["bash", "-c", "tcpdump $(qemu 1000)"], MARK, True),
        (["bash", "-c", "tcpdump 1000\nqemu 1000"], MARK, True),
        (["bash", "-c", "qemu 1000", "tcpdump"], MARK, True),
    ],
)
def test_what_counts(directory, path, start, monkeypatch, tools, command, variables, counts):
    monkeypatch.setattr(processes, "HELPER_START", 0)
    environment = {"PATH": f"{tools}:{os.environ['PATH']}", **variables}
    others = leave_stale_lock(directory, 2)
    started = start(command=[word.format(tools=tools) for word in command], env=environment)
    if "env" in command:
        wait_for(lambda: "python" in Path(f"/proc/{started.pid}/comm").read_text())
    told = attempt(directory)
    assert not others.exists()
    if counts:
        assert (told.state, told.path) == ("LIVE", str(path))
        assert started.pid in pids(told)
        assert not any(this.is_around for this in told.processes)
        os.killpg(started.pid, signal.SIGKILL)
        started.wait()
        told = attempt(directory)
    assert told.state == "WON"
    assert not path.exists()


def test_aexpect_helper_that_is_about_to_start_a_guest(directory, path, start, tools):
    started = start(command=[tools / "aexpect_helper"], env=MARK)
    assert pids(attempt(directory)) == {started.pid}


def test_guest_of_a_killed_job(directory):
    with process(directory, starts=["sleep", "1000"]) as job:
        kill(job)
    told = attempt(directory)
    assert (told.state, told.path) == ("LIVE", job.told.path)
    assert [(this.pid, this.command) for this in told.processes] == [(job.guest, "sleep 1000")]
    os.kill(job.guest, signal.SIGKILL)
    # Nobody may have waited for it yet.
    wait_for(lambda: attempt(directory).state == "WON")


def test_zombie_does_not_count(directory, path, start):
    started = start(env=MARK)
    started.kill()
    os.waitid(os.P_PID, started.pid, os.WEXITED | os.WNOWAIT)
    assert attempt(directory).state == "WON"


@needs_other_users
def test_other_users_see_a_test_but_no_guest(directory, path, start):
    guest = start(env=MARK)
    test = start(*RUNNER, env=MARK)
    told = attempt_as(SOME_USER, directory)
    assert (told.state, told.reason, pids(told)) == ("LIVE", "GUESTS_OF_OTHERS", {test.pid})
    assert (pids(attempt(directory))) == {guest.pid, test.pid}
    test.kill()
    test.wait()
    # A limit that the manual tells.
    assert attempt_as(SOME_USER, directory).state == "WON"


@needs_other_users
def test_guest_of_another_user_is_seen_by_root(directory, path, start):
    os.chown(path, SOME_USER, SOME_USER)
    guest = start(env=MARK, prefix=run_as(SOME_USER))
    told = attempt(directory)
    assert (told.state, pids(told), told.processes[0].uid) == ("LIVE", {guest.pid}, SOME_USER)


def test_shell_that_a_killed_job_has_left(directory, path):
    """It counts where somebody works in it, but not what the contender is itself."""
    marked = MARK
    script = "import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))"
    with process(directory, sys.executable, "-c", script, env=marked) as other:
        assert (other.told.state, other.told.path) == ("OUTER", str(path))
        assert [(this.pid, this.is_around) for this in other.told.processes] == [(other.pid, True)]
    with process(directory, env=marked) as other:
        assert other.told.state == "WON"


def test_what_is_left_at_the_end(new_lock, tmp_path, start):
    """It is told of each lock of the process; of its own test each job alone, if it is marked."""
    first, second = new_lock(), new_lock(where=tmp_path)
    early = start()
    first.acquire()
    assert (first.left(tests_only=False).state, first.left(True).reason) == (State.STALE, None)
    guest, test = start(), start("task-run", "-i", "1", "-j", job_id(1))
    second.acquire()
    both = start()
    assert (pids(first.left(tests_only=False))) == {guest.pid, test.pid, both.pid}
    assert pids(first.left(tests_only=True)) == {test.pid}
    assert first.left(tests_only=True).state is State.LIVE
    assert pids(second.left(tests_only=False)) == {both.pid}
    # The end of one is not the end of the other's mark.
    first.release()
    later = start()
    assert (pids(second.left(tests_only=False))) == {both.pid, later.pid}
    assert early.poll() is None


FIRST_THREAD_ENDS = """
import ctypes, os, sys, threading, time
def wait():
    while not open("/proc/self/stat").read().rpartition(")")[2].split()[0] == "Z":
        time.sleep(0.01)
    print(flush=True)
    sys.stdin.read()
    os._exit(0)
threading.Thread(target=wait).start()
ctypes.CDLL(None).pthread_exit(None)
"""


def test_process_whose_first_thread_has_ended(directory, path, start):
    """It looks like a zombie, and is none."""
    others = leave_stale_lock(directory, 1)
    started = start(env=MARK, script=FIRST_THREAD_ENDS)
    assert pids(attempt(directory)) == {started.pid}
    assert not others.exists()


BLANK = """
import ctypes, sys, time
libc = ctypes.CDLL(None)
with open("/proc/self/stat") as file:
    fields = file.read().rpartition(")")[2].split()
first, last = int(fields[45]) & -4096, (int(fields[48]) | 4095) + 1
place = ctypes.c_void_p(first), ctypes.c_size_t(last - first)
assert libc.munmap(*place) == 0
print(flush=True)
time.sleep(float(sys.argv[1]))
libc.mmap(*place, 3, 0x32, -1, ctypes.c_long(0))
sys.stdin.read()
"""


@pytest.mark.parametrize(
    ("seconds", "limit", "uid", "counts"),
    [
        (1000, processes.BLANK_TIMEOUT, None, True),
        (0.5, 2, None, False),
        pytest.param(1000, 0.1, SOME_USER, False, marks=needs_other_users),
    ],
    ids=["for long", "for a moment", "of another user"],
)
def test_process_without_a_command_line_and_environment(
    directory, path, start, monkeypatch, seconds, limit, uid, counts
):
    """As in an exec. If it hangs there nobody can tell of which of its user's jobs it is."""
    monkeypatch.setattr(processes, "BLANK_TIMEOUT", limit)
    started = start(str(seconds), script=BLANK, prefix=run_as(uid) if uid else ())
    told = attempt(directory)
    assert told.state == ("LIVE" if counts else "WON")
    if counts:
        assert [(this.pid, this.marks) for this in told.processes] == [(started.pid, [])]


FORK_AND_FORK = """
import os, sys
print(flush=True)
while os.path.exists(os.environ["UNTIL_GONE"]):
    if os.fork():
        os._exit(0)
"""
EXEC_AND_EXEC = """
import os, sys
if len(sys.argv) < 2:
    print(flush=True)
if os.path.exists(os.environ["UNTIL_GONE"]):
    os.execv("/proc/self/exe", ["python", "-S", "-E", "-c", os.environ["SCRIPT"], "again"])
"""


@pytest.mark.parametrize("script", [FORK_AND_FORK, EXEC_AND_EXEC], ids=["forks", "execs"])
def test_process_that_is_another_one_at_each_look(
    directory, path, rounds, tmp_path, monkeypatch, script
):
    """It is found, or it is plain that nobody can tell for now."""
    monkeypatch.setattr(processes, "SETTLE_TIMEOUT", 0.5)
    flag = tmp_path / "flag"
    flag.touch()
    environment = {**os.environ, **MARK, "SCRIPT": script, "UNTIL_GONE": str(flag)}
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as chain:
        try:
            chain.stdout.readline()
            for _ in rounds(15):
                told = attempt(directory)
                assert (told.state, told.path) in [("LIVE", str(path)), ("NOT_NOW", str(path))]
        finally:
            flag.unlink()
            # Until the last one has closed it.
            chain.stdout.read()
    wait_for(lambda: attempt(directory).state == "WON")


def test_process_that_the_first_listing_misses(directory, path, start):
    """PIDs start again from the lowest one day, just when one forks and ends."""
    forked = start(env=MARK)
    gone = start()
    gone.kill()
    gone.wait()
    listings = []

    def hook(name, call):
        if name != "listdir" or call.args[0] != "/proc":
            return call()
        listings.append(call())
        return [*listings[0], str(gone.pid)] if len(listings) > 1 else [str(gone.pid)]

    with intercepted(hook):
        assert pids(attempt(directory)) == {forked.pid}


def test_busy_host(directory, start):
    """Thousands of processes that come and go are no reason to blame one, nor to be stopped."""
    for _ in range(24):
        start(command=["sh", "-c", "while :; do /bin/true; done"])
    deadline = time.monotonic() + 60
    state = "NOT_NOW"
    while state == "NOT_NOW":
        assert time.monotonic() < deadline
        leave_stale_lock(directory)
        state = attempt(directory).state
    assert state == "WON"


HANGS = """
import ctypes, mmap, os, sys, threading
from pathlib import Path

libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
size = ctypes.c_size_t(mmap.PAGESIZE)
os.ftruncate(file, mmap.PAGESIZE)
access = mmap.PROT_READ | mmap.PROT_WRITE
page = ctypes.c_void_p(libc.mmap(None, size, access, mmap.MAP_SHARED, file, ctypes.c_long(0)))
ctypes.string_at(page, 1)
print(flush=True)
sys.stdin.readline()
write = threading.Thread(target=libc.memset, args=(page, 1, ctypes.c_size_t(1)), daemon=True)
write.start()
while " D " not in Path(f"/proc/self/task/{write.native_id}/stat").read_text():
    pass
libc.munmap(page, size)
print(flush=True)
sys.stdin.read()
"""


@needs_root
def test_process_that_hangs(directory, path, start, tmp_path, monkeypatch):
    """It writes to storage that does not answer, so its environment cannot be read."""
    monkeypatch.setattr(processes, "LOOK_TIMEOUT", 1)
    image, mounted = tmp_path / "image", tmp_path / "mounted"
    mounted.mkdir()
    with image.open("wb") as file:
        file.truncate(32 * 2**20)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    if subprocess.run(["mount", "-o", "loop", image, mounted], check=False).returncode:
        pytest.skip("mounting is not permitted here")
    guest = start(env=MARK)
    with contextlib.ExitStack() as stack:
        stack.callback(subprocess.run, ["umount", mounted], check=True)
        hanging = start(mounted / "file", script=HANGS)
        stack.callback(lambda: [hanging.kill(), hanging.wait()])
        subprocess.run(["fsfreeze", "--freeze", mounted], check=True)
        try:
            hanging.stdin.write(b"\n")
            hanging.stdin.flush()
            wait_for(lambda: " D " in Path(f"/proc/{hanging.pid}/stat").read_text())
            # What was found before is enough to tell.
            told = attempt(directory)
            assert (told.state, told.reason, told.detail) == ("LIVE", "HANGING", str(hanging.pid))
            assert pids(told) == {guest.pid}
            guest.kill()
            guest.wait()
            told = attempt(directory)
            assert (told.state, told.reason) == ("NOT_NOW", "HANGING")
            assert told.detail == str(hanging.pid)
            assert path.exists()
        finally:
            subprocess.run(["fsfreeze", "--unfreeze", mounted], check=True)
        hanging.stdout.readline()
        assert attempt(directory).state == "WON"
