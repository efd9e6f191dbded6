"""Which processes keep the lock of an ended job live: what it has started, and nothing else."""

import functools
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import WAIT
from faults import intercepted
from needs import SOME_USER, needs_other_users, needs_root
from others import attempt, attempt_as, job_id, leave_lock, lock_path, process
from sandbox import run_as, wait_for

from avocado_vt_joblock import lockfile, processes
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
    return leave_lock(directory)


@pytest.fixture
def tools(tmp_path):
    for name in ("tcpdump", "dnsmasq", "qemu", "tcpdump-wrapper"):
        (tmp_path / name).symlink_to(shutil.which("sleep"))
    (tmp_path / "aexpect_helper").write_text(f"#!{sys.executable}\n{WAIT}\n")
    (tmp_path / "aexpect_helper").chmod(0o755)
    return tmp_path


def end(popen):
    """Kill a process with its children; it stays as a zombie until it is reaped."""
    os.killpg(popen.pid, signal.SIGKILL)
    os.waitid(os.P_PID, popen.pid, os.WEXITED | os.WNOWAIT)


QEMUS = ["qemu 1000", "tcpdump-wrapper 1000", "{tools}/aexpect_helper young"]
SHELLS = ["tcpdump 1000; qemu 1000", f"tcpdump 1000 && qemu 1000 {ECHO}"]
SHELLS += ["tcpdump $(qemu 1000)", "tcpdump 1000\nqemu 1000", "qemu 1000"]
COUNTS = [
    *[(PYTHON, {VARIABLE: names}) for names in (NAME, f"a:{NAME}:b")],
    *[([*PYTHON, *RUNNER[:4], id_, *RUNNER[5:]], {}) for id_ in (JOB_ID, JOB_ID.upper())],
    (["env", "-i", *PYTHON, *RUNNER], {}),
    ([*PYTHON, "tcpdump"], MARK),
    *[(command.split(), MARK) for command in QEMUS],
    *[(["bash", "-c", line, "tcpdump"], MARK) for line in SHELLS],
]
NO_RUNNERS = [RUNNER[1:], RUNNER[:4], ["-j", JOB_ID, "task-run"], [*RUNNER[:4], job_id(1)]]
# What avocado-vt starts beside its tests touches no image.
HELPERS = [["tcpdump", "1000"], ["{tools}/dnsmasq", "1000"], ["{tools}/aexpect_helper"]]
HELPERS += [["bash", "-c", f"tcpdump 1000 {ECHO}"], ["sh", "-c", "{tools}/dnsmasq 1000"]]
DOES_NOT_COUNT = [
    (PYTHON, {VARIABLE: OTHER}),
    (PYTHON, {f"X{VARIABLE}": NAME, "Y": f"{VARIABLE}={NAME}"}),
    # The way out for what shall not count.
    (["env", "-u", VARIABLE, *PYTHON], MARK),
    *[([*PYTHON, *words], {}) for words in (*NO_RUNNERS, [" ".join(RUNNER)])],
    # Avocado takes a job id from its user; the mark knows better.
    ([*PYTHON, *RUNNER], {VARIABLE: OTHER}),
    *[(helper, MARK) for helper in HELPERS],
]


@pytest.mark.parametrize(
    ("command", "variables", "counts"),
    [*[(*row, True) for row in COUNTS], *[(*row, False) for row in DOES_NOT_COUNT]],
)
def test_what_counts(directory, path, start, monkeypatch, tools, command, variables, counts):
    monkeypatch.setattr(processes, "HELPER_START", 60 if "young" in command else 0)
    environment = {"PATH": f"{tools}:{os.environ['PATH']}", **variables}
    others = leave_lock(directory, 2)
    started = start(command=[word.format(tools=tools) for word in command], env=environment)
    if "env" in command:
        wait_for(lambda: "python" in Path(f"/proc/{started.pid}/comm").read_text())
    told = attempt(directory)
    assert not others.exists()
    assert told.state == ("LIVE" if counts else "WON")
    if counts:
        assert told.path == str(path)
        assert started.pid in told.pids
        assert not any(this.is_around for this in told.processes)
        # A zombie does not count.
        end(started)
        wait_for(lambda: attempt(directory).state == "WON")


@needs_other_users
def test_other_users_see_a_test_but_no_guest(directory, path, start):
    guest, test = start(env=MARK), start(*RUNNER, env=MARK)
    told = attempt_as(SOME_USER, directory)
    assert (told.state, told.reason, told.pids) == ("LIVE", "GUESTS_OF_OTHERS", {test.pid})
    assert attempt(directory).pids == {guest.pid, test.pid}
    end(test)
    assert attempt_as(SOME_USER, directory).state == "WON"


@needs_other_users
def test_root_that_may_not_read_environments(directory, path, start):
    guest = start(env=MARK, prefix=run_as(SOME_USER))
    os.chown(path, SOME_USER, SOME_USER)
    told = attempt(directory)
    assert (told.state, told.pids, told.processes[0].uid) == ("LIVE", {guest.pid}, SOME_USER)
    # Newer kernels let also those with the other two read.
    prefix = ["setpriv", "--bounding-set=-sys_ptrace,-sys_admin,-perfmon"]
    read = [*prefix, "cat", f"/proc/{guest.pid}/environ"]
    if subprocess.run(read, check=False, capture_output=True).returncode == 0:
        pytest.skip("here root may read environments in any case")
    for uid, told in ((SOME_USER, ("UNKNOWN", "DENIED")), (0, ("WON", None))):
        os.chown(path, uid, uid)
        with process(directory, *prefix) as contender:
            assert (contender.told.state, getattr(contender.told, "reason", None)) == told


def test_shell_that_a_killed_job_has_left(directory, path):
    environment = {**os.environ, **MARK}
    with process(directory, "sh", "-c", '"$@"; :', "-", env=environment) as other:
        told = other.told
        assert (told.state, told.path, told.pids) == ("OUTER", str(path), {other.pid})
    with process(directory, env=environment) as other:
        assert other.told.state == "WON"


def test_what_is_left_at_the_end(new_lock, tmp_path, start):
    """It is told of each lock of the process; of its own test each job alone, if it is marked."""

    def left(lock, tests_only=False):
        file = lock.left(tests_only)
        return file.state.name, {process.pid for process in file.processes}

    first, second = new_lock(), new_lock(where=tmp_path)
    start()
    first.acquire()
    assert left(first) == left(first, tests_only=True) == ("STALE", set())
    guest, test = start(), start("task-run", "-i", "1", "-j", job_id(1))
    second.acquire()
    both = start()
    assert left(first) == ("LIVE", {guest.pid, test.pid, both.pid})
    assert left(first, tests_only=True) == ("LIVE", {test.pid})
    assert left(second) == ("LIVE", {both.pid})
    first.release()
    later = start()
    assert left(second) == ("LIVE", {both.pid, later.pid})


def test_process_whose_first_thread_has_ended(directory, path, start):
    others = leave_lock(directory, 1)
    script = "import ctypes, sys, threading; threading.Thread(target=sys.stdin.read).start(); "
    script += "print(flush=True); ctypes.CDLL(None).pthread_exit(0)"
    started = start(env=MARK, script=script)
    wait_for(lambda: ") Z " in Path(f"/proc/{started.pid}/stat").read_text())
    assert attempt(directory).pids == {started.pid}
    assert not others.exists()


BLANK = """
import ctypes, sys, time
libc, stat = ctypes.CDLL(None), open("/proc/self/stat").read().rpartition(")")[2].split()
first, last = int(stat[45]) & -4096, (int(stat[48]) | 4095) + 1
place = ctypes.c_void_p(first), ctypes.c_size_t(last - first)
assert libc.munmap(*place) == 0
print(flush=True)
time.sleep(float(sys.argv[1]))
libc.mmap(*place, 3, 0x32, -1, ctypes.c_long(0))
sys.stdin.read()
"""


@needs_other_users
@pytest.mark.parametrize(
    ("seconds", "limit", "uid", "counts"),
    [(1000, 0.5, None, True), (0.5, 2, None, False), (1000, 0.1, SOME_USER, False)],
)
def test_blank_process(directory, path, start, monkeypatch, seconds, limit, uid, counts):
    """As in an exec. If it hangs there nobody can tell of which of its user's jobs it is."""
    monkeypatch.setattr(processes, "BLANK_TIMEOUT", limit)
    # By so many words the frames of the program are on another page of its stack than their first.
    words = [str(seconds), *[""] * 600]
    started = start(*words, script=BLANK, prefix=run_as(uid) if uid else ())
    told = attempt(directory)
    assert told.state == ("LIVE" if counts else "WON")
    assert not counts or told.pids == {started.pid}


GO_ON = "import os, sys; print(end='\\n' * (len(sys.argv) == 2), flush=True)\n"
FORKS = f"{GO_ON}while os.path.exists(sys.argv[1]):\n    if os.fork(): os._exit(0)"
EXECS = f"""{GO_ON}if os.path.exists(sys.argv[1]):
    os.execv(sys.executable, [*open("/proc/self/cmdline").read().split("\\0")[:4], "again"])"""


@pytest.mark.parametrize("script", [FORKS, EXECS], ids=["forks", "execs"])
def test_other_process_at_each_look(directory, path, rounds, start, tmp_path, monkeypatch, script):
    monkeypatch.setattr(processes, "SETTLE_TIMEOUT", 0.5)
    flag = tmp_path / "flag"
    flag.touch()
    start(flag, script=script, env=MARK)
    for _ in rounds(15):
        told = attempt(directory)
        assert (told.state, told.path) in [("LIVE", str(path)), ("NOT_NOW", str(path))]
    flag.unlink()
    wait_for(lambda: attempt(directory).state == "WON")


def test_process_that_the_first_listing_misses(directory, path, start):
    forked, gone = start(env=MARK), start()
    end(gone)
    gone.wait()
    listings = iter([[str(gone.pid)], [str(gone.pid), str(forked.pid)]])

    def hook(name, call):
        is_listing = name == "listdir" and call.args[0] == "/proc"
        return next(listings, [str(forked.pid)]) if is_listing else call()

    with intercepted(hook):
        assert attempt(directory).pids == {forked.pid}


def test_busy_host(directory, start):
    for _ in range(24):
        start(command=["sh", "-c", "while :; do /bin/true; done"])
    leave_lock(directory)
    states = []
    wait_for(lambda: states.append(attempt(directory).state) or states[-1] != "NOT_NOW")
    assert states[-1] == "WON"


HANGS = """
import ctypes, mmap, sys, threading
file = open(sys.argv[1], "w+b")
file.truncate(mmap.PAGESIZE)
page = mmap.mmap(file.fileno(), mmap.PAGESIZE)
place = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(page)))
print(page[0], flush=True)
sys.stdin.readline()
write = threading.Thread(target=ctypes.CDLL(None).memset, args=(place, 1, 1), daemon=True)
write.start()
while " D " not in open(f"/proc/self/task/{write.native_id}/stat").read():
    pass
print(ctypes.CDLL(None).munmap(place, mmap.PAGESIZE), flush=True)
sys.stdin.read()
"""


@needs_root
def test_process_that_hangs(directory, path, tmp_path, start, monkeypatch):
    """It writes to storage that does not answer, so its environment cannot be read."""
    monkeypatch.setattr(processes, "LOOK_TIMEOUT", 1)
    shell = functools.partial(subprocess.run, shell=True, check=False, cwd=tmp_path)
    made = shell("mkdir frozen && truncate -s 32M image && mkfs.ext4 -q image")
    if made.returncode or shell("mount -o loop image frozen").returncode:
        pytest.skip("mounting is not permitted here")
    try:
        guest, hanging = start(env=MARK), start(tmp_path / "frozen/file", script=HANGS)
        # If this test is killed: whoever looks at that process hangs, ps(1) as well.
        shell("setsid sh -c 'sleep 60; fsfreeze --unfreeze frozen' > /dev/null 2>&1 &")
        shell("fsfreeze --freeze frozen")
        os.write(hanging.stdin.fileno(), b"\n")
        wait_for(lambda: ") D " in Path(f"/proc/{hanging.pid}/stat").read_text())
        # What was found before is enough to tell.
        told = attempt(directory)
        assert (told.state, told.pids) in [("LIVE", {guest.pid}), ("NOT_NOW", set())]
        assert (told.reason, told.detail) == ("HANGING", str(hanging.pid))
        end(guest)
        told = attempt(directory)
        assert (told.state, told.reason) == ("NOT_NOW", "HANGING")
        shell("fsfreeze --unfreeze frozen")
        hanging.stdout.readline()
        assert attempt(directory).state == "WON"
    finally:
        shell("fsfreeze --unfreeze frozen 2> /dev/null; umount --lazy frozen")


def test_look_that_ends_when_its_time_is_over(monkeypatch):
    gate = threading.Event()
    monkeypatch.setattr(processes, "LOOK_TIMEOUT", 0)
    monkeypatch.setattr(processes, "_read", lambda place, what: gate.wait() and b"-")
    look = processes.Look()
    gate.set()
    wait_for(lambda: look.is_settled)
    file = lockfile.LockFile(str(lock_path(Path("/nowhere"), 1)), uid=os.geteuid())
    lockfile._decide(file, look)
    assert (file.state, file.reason) == (lockfile.State.NOT_NOW, lockfile.Reason.HANGING)
