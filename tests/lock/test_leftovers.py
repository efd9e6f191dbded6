"""Which processes keep the lock of an ended job live: what it has started, and nothing
else."""

import itertools
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from conftest import WAIT
from faults import intercepted
from needs import (
    LONELY_USER,
    PID_NAMESPACE,
    SOME_USER,
    needs_other_users,
    needs_pid_namespaces,
    needs_root,
)
from others import (
    attempt,
    attempt_as,
    job_id,
    leave_card,
    leave_lock,
    lock_path,
    names,
    process,
)
from sandbox import processes, run_as, wait_for

from avocado_vt_joblock import (
    ending,
    helpers,
    leftovers,
    lock,
    lockdir,
    marks,
    procfs,
    scan,
)
from avocado_vt_joblock.leftovers import Leftovers, Obstacle
from avocado_vt_joblock.marks import VARIABLE

JOB_ID = job_id(0xDEAD)
NAME = lock_path(Path(), 0xDEAD).name
OTHER = lock_path(Path(), 1).name
MARK = {VARIABLE: NAME}
PYTHON = [sys.executable, "-c", WAIT]
#: As Avocado starts a runner, in whose child avocado-vt runs the test.
RUNNER = ["task-run", "-i", "1-test", "-j", JOB_ID, "-k", "avocado-vt"]
#: How long something may take before it hangs, in seconds.
HANG = 30
ECHO = "&& echo x > /dev/null"
# It prints a line when the commands before it are done.
SHELL = ["sh", "-c", "echo; read line"]


#: What avocado-vt starts beside its guests, and what these start: it touches no image.
BINARIES = [
    *("tcpdump", "dumpcap", "dnsmasq", "ovs-vswitchd", "ovsdb-server"),
    *("passt", "qemu-pr-helper", "journalctl", "vmstat"),
]


@pytest.fixture
def path(directory):
    """The lock file of a job that was killed."""
    return leave_lock(directory)


@pytest.fixture
def tools(tmp_path):
    """A directory with programs of these names that do nothing."""
    for name in (*BINARIES, "qemu", "tcpdump-wrapper"):
        (tmp_path / name).symlink_to(shutil.which("sleep"))
    (tmp_path / "tshark").symlink_to(shutil.which("bash"))
    scripts = {
        "aexpect_helper": f"#!{sys.executable}\n{WAIT}\n",
        "ksmtuned": "#!/bin/bash\nwhile :; do sleep 1000; done\n",
    }
    for name, script in scripts.items():
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    return tmp_path


def end(popen):
    """Kill a process with its children; it stays as a zombie until it is reaped."""
    os.killpg(popen.pid, signal.SIGKILL)
    os.waitid(os.P_PID, popen.pid, os.WEXITED | os.WNOWAIT)


def test_name_of_the_variable(held, start):
    """It is frozen: an update comes while guests of jobs run that were marked before
    it."""
    variable = f"AVOCADO_VT_JOBLOCK={Path(held.path).name}"
    environ = Path(f"/proc/{start().pid}/environ").read_text()
    assert variable in environ.split("\0")


COUNTS = [
    (PYTHON, {VARIABLE: NAME}),
    (PYTHON, {VARIABLE: f"a:{NAME}:b"}),
    ([*PYTHON, *RUNNER], {}),
    ([*PYTHON, *RUNNER[:4], JOB_ID.upper(), *RUNNER[5:]], {}),
    (["env", "-i", *PYTHON, *RUNNER], {}),
    ([*PYTHON, "tcpdump"], MARK),
    (["qemu", "1000"], MARK),
    (["tcpdump-wrapper", "1000"], MARK),
    # It may be about to start a guest.
    (["{tools}/aexpect_helper", "young"], MARK),
    (["bash", "-c", "tcpdump 1000; qemu 1000", "tcpdump"], MARK),
    (["bash", "-c", f"tcpdump 1000 && qemu 1000 {ECHO}", "tcpdump"], MARK),
    (["bash", "-c", "tcpdump $(qemu 1000)", "tcpdump"], MARK),
    (["bash", "-c", "tcpdump 1000\nqemu 1000", "tcpdump"], MARK),
    (["bash", "-c", "qemu 1000", "tcpdump"], MARK),
]
DOES_NOT_COUNT = [
    (PYTHON, {VARIABLE: OTHER}),
    (PYTHON, {f"X{VARIABLE}": NAME, "Y": f"{VARIABLE}={NAME}"}),
    # The way out for what shall not count.
    (["env", "-u", VARIABLE, *PYTHON], MARK),
    # These are no runners of that job.
    ([*PYTHON, *RUNNER[1:]], {}),
    ([*PYTHON, *RUNNER[:4]], {}),
    ([*PYTHON, "-j", JOB_ID, "task-run"], {}),
    ([*PYTHON, *RUNNER[:4], job_id(1)], {}),
    ([*PYTHON, " ".join(RUNNER)], {}),
    # Avocado takes a job id from its user; the mark knows better.
    ([*PYTHON, *RUNNER], {VARIABLE: OTHER}),
    *[(["{tools}/" + name, "1000"], MARK) for name in BINARIES],
    (["tcpdump", "1000"], MARK),
    (["{tools}/aexpect_helper"], MARK),
    (["bash", "-c", f"tcpdump 1000 {ECHO}"], MARK),
    (["sh", "-c", "{tools}/dnsmasq 1000"], MARK),
]


@pytest.mark.parametrize(
    ("command", "variables", "counts"),
    [*[(*row, True) for row in COUNTS], *[(*row, False) for row in DOES_NOT_COUNT]],
)
def test_what_counts(
    directory, path, start, monkeypatch, tools, command, variables, counts
):
    monkeypatch.setattr(helpers, "HELPER_AGE", 60 if "young" in command else 0)
    environment = {"PATH": f"{tools}:{os.environ['PATH']}", **variables}
    words = [word.format(tools=tools) for word in command]
    others = leave_lock(directory, 2)
    started = start(command=words, env=environment)
    if "env" in command:
        comm = Path(f"/proc/{started.pid}/comm")
        wait_for(lambda: "python" in comm.read_text())
    told = attempt(directory)
    assert told.state == ("LIVE" if counts else "WON")
    # Whoever gets the lock removes what is stale.
    assert others.exists() == counts
    if counts:
        assert told.path == str(path)
        assert started.pid in told.pids
        assert not any(this.is_ancestor for this in told.processes)
        # A zombie does not count.
        end(started)
        wait_for(lambda: attempt(directory).state == "WON")


def running(program):
    """Return the PIDs of the processes of a program whose name ends so."""
    return set(
        processes(lambda entry: program in (entry / "cmdline").read_text().split("\0"))
    )


def test_sniffer_that_another_one_has_started(directory, path, start, tools):
    """For ever a killed job would keep the lock by a tshark, which starts dumpcap."""
    environment = {"PATH": f"{tools}:{os.environ['PATH']}", **MARK}
    start(command=["tshark", "-c", "dumpcap 1000; :"], env=environment)
    wait_for(lambda: running("dumpcap"))
    assert attempt(directory).state == "WON"


def test_ksmtuned_and_its_sleep_count(directory, path, start, tools):
    """Whoever ends only what is listed must not find another sleep each time."""
    ksmtuned = start(command=[str(tools / "ksmtuned")], env=MARK)
    wait_for(lambda: len(attempt(directory).pids) == 2)
    told = attempt(directory)
    (sleep,) = told.pids - {ksmtuned.pid}
    assert Path(f"/proc/{sleep}/cmdline").read_text() == "sleep\x001000\0"
    # In this order: else it starts another one.
    for pid in (ksmtuned.pid, sleep):
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: attempt(directory).state == "WON")


@needs_other_users
def test_other_users_see_a_test_but_no_guest(directory, path, start):
    guest, test = start(env=MARK), start(*RUNNER, env=MARK)
    told = attempt_as(SOME_USER, directory)
    assert (told.state, told.reason) == ("LIVE", "GUESTS_OF_OTHERS")
    assert told.pids == {test.pid}
    assert attempt(directory).pids == {guest.pid, test.pid}
    end(test)
    # What it does not see it does not free: root sees the guest, and its lock.
    assert attempt_as(SOME_USER, directory).state == "WON"
    assert attempt(directory).pids == {guest.pid}


@needs_other_users
def test_root_that_may_not_read_environments(directory, path, start):
    guest = start(env=MARK, prefix=run_as(SOME_USER))
    os.chown(path, SOME_USER, SOME_USER)
    told = attempt(directory)
    assert (told.state, told.pids) == ("LIVE", {guest.pid})
    assert told.processes[0].uid == SOME_USER
    # Newer kernels let also those with the other two read.
    prefix = ["setpriv", "--bounding-set=-sys_ptrace,-sys_admin,-perfmon"]
    read = [*prefix, "cat", f"/proc/{guest.pid}/environ"]
    if subprocess.run(read, check=False, capture_output=True).returncode == 0:
        pytest.skip("here root may read environments in any case")
    with process(directory, *prefix) as contender:
        assert (contender.told.state, contender.told.reason) == ("UNKNOWN", "DENIED")
    os.chown(path, 0, 0)
    with process(directory, *prefix) as contender:
        assert contender.told.state == "WON"


@needs_other_users
@pytest.mark.parametrize(
    "guest_has",
    [["--regid=1"], ["--inh-caps=+net_raw", "--ambient-caps=+net_raw"]],
    ids=["another group", "a capability"],
)
def test_guest_that_its_own_user_may_not_read(directory, path, start, guest_has):
    """The job ran under newgrp(1), sg(1) or a service, and the next one does not."""
    os.chown(path, LONELY_USER, LONELY_USER)
    user = ["setpriv", f"--reuid={LONELY_USER}", "--clear-groups"]
    # Its environment can be read as that of any process of its user.
    other = start(command=[*user, *SHELL])
    guest = start(command=[*user, *guest_has, *SHELL], env=MARK)
    for started in (other, guest):
        started.stdout.readline()
    told = attempt_as(LONELY_USER, directory)
    assert (told.state, told.reason) == ("UNKNOWN", "DENIED")
    assert told.detail == str(guest.pid)
    assert attempt(directory).pids == {guest.pid}
    end(guest)
    assert attempt_as(LONELY_USER, directory).state == "WON"


HIDING = [*PID_NAMESPACE, "sh", "-c"]


@needs_pid_namespaces
@needs_other_users
def test_guest_that_its_own_user_is_shown_but_may_not_read(directory, path):
    """As above, where /proc has hidepid=1: that lists it, and shows nothing of it."""
    os.chown(path, LONELY_USER, LONELY_USER)
    user = f"setpriv --reuid={LONELY_USER} --clear-groups"
    begin = f"""
mount -o remount,hidepid=1 /proc || exit
{VARIABLE}={NAME} {user} --regid=1 sleep 1000 &
while kill -0 $! && ! grep -q sleep /proc/$!/comm; do :; done
"$@"
kill $!"""
    with process(directory, *HIDING, begin, "-", *run_as(LONELY_USER)) as contender:
        told = contender.told
        assert (told.state, getattr(told, "reason", None)) == ("UNKNOWN", "DENIED")
        assert names(directory) == [path.name]
    # Without the guest the user's own attempt succeeds.
    without = 'mount -o remount,hidepid=1 /proc && { "$@"; :; }'
    with process(directory, *HIDING, without, "-", *run_as(LONELY_USER)) as contender:
        assert contender.told.state == "WON"
    assert names(directory) == []


@needs_pid_namespaces
@needs_other_users
@pytest.mark.parametrize("hidepid", [1, 2])
def test_root_sees_what_is_hidden_from_others(directory, path, hidepid):
    """So it frees the lock of another user, and finds the guest of one."""
    hides = f"mount -o remount,hidepid={hidepid} /proc || exit\n"
    guest = f"""
{VARIABLE}={NAME} setpriv --reuid={SOME_USER} --regid=1 --clear-groups sleep 1000 &
while kill -0 $! && ! grep -q sleep /proc/$!/comm; do :; done
"""
    os.chown(path, SOME_USER, SOME_USER)
    with process(directory, *HIDING, f'{hides}{guest}"$@"; kill $!', "-") as contender:
        assert (contender.told.state, len(contender.told.pids)) == ("LIVE", 1)
    with process(directory, *HIDING, f'{hides}"$@"; :', "-") as contender:
        assert contender.told.state == "WON"
        assert [file.path for file in contender.told.stale] == [str(path)]
    assert names(directory) == []


def test_shell_that_a_killed_job_has_left(directory, path):
    environment = {**os.environ, **MARK}
    with process(directory, "sh", "-c", '"$@"; :', "-", env=environment) as other:
        told = other.told
        assert (told.state, told.path) == ("OUTER", str(path))
        assert told.pids == {other.pid}
    with process(directory, env=environment) as other:
        assert other.told.state == "WON"


def test_what_is_left_at_the_end(new_lock, tmp_path, start):
    """It is told of each lock of the process; of its own test each job alone, if it is
    marked."""

    def left(of, *, tests_only=False):
        found = of.find_leftovers(tests_only=tests_only, timeout=60)
        assert found.obstacle is None
        return {process.pid for process in found.processes}

    first, second = new_lock(), new_lock(where=tmp_path)
    start()
    first.acquire()
    assert left(first) == left(first, tests_only=True) == set()
    guest, test = start(), start("task-run", "-i", "1", "-j", job_id(1))
    second.acquire()
    both = start()
    assert left(first) == {guest.pid, test.pid, both.pid}
    assert left(first, tests_only=True) == {test.pid}
    assert left(second) == {both.pid}
    first.release()
    later = start()
    assert left(second) == {both.pid, later.pid}


@pytest.mark.parametrize("does_end", [True, False])
def test_end_of_a_job_looks_twice_however_long_it_waits(
    directory, held, start, monkeypatch, does_end
):
    """What was found is waited for; only then all processes are looked at again."""
    monkeypatch.setattr(ending, "END_TIMEOUT", 60 if does_end else 2)
    guest = start(command=["sleep", "1" if does_end else "1000"])
    comm = Path(f"/proc/{guest.pid}/comm")
    wait_for(lambda: comm.read_text() == "sleep\n")
    with mock.patch.object(leftovers, "Scan", wraps=leftovers.Scan) as scans:
        ending.give_back(held, looks=True)
    assert scans.call_count == 2
    assert (names(directory) == []) == does_end


FIRST_THREAD_ENDS = """
import ctypes, sys, threading
threading.Thread(target=sys.stdin.read).start()
print(flush=True)
ctypes.CDLL(None).pthread_exit(0)"""


def test_process_whose_first_thread_has_ended(directory, path, start):
    started = start(env=MARK, script=FIRST_THREAD_ENDS)
    wait_for(lambda: ") Z " in Path(f"/proc/{started.pid}/stat").read_text())
    assert attempt(directory).pids == {started.pid}


@needs_other_users
@pytest.mark.skipif(
    not os.access("/usr/bin/python3", os.X_OK), reason="no Python that all may run"
)
def test_process_of_a_user_whose_first_thread_has_ended(directory, path, start):
    """To its own user /proc denies the environment then, and that of threads not."""
    os.chown(path, LONELY_USER, LONELY_USER)
    identity = [f"--reuid={LONELY_USER}", f"--regid={os.getgid()}", "--clear-groups"]
    python = ["/usr/bin/python3", "-c", FIRST_THREAD_ENDS]
    started = start(command=["setpriv", *identity, *python], env=MARK)
    wait_for(lambda: ") Z " in Path(f"/proc/{started.pid}/stat").read_text())
    told = attempt_as(LONELY_USER, directory)
    assert (told.state, getattr(told, "pids", None)) == ("LIVE", {started.pid})


BLANK = """
import ctypes, sys, time
libc = ctypes.CDLL(None)
stat = open("/proc/self/stat").read().rpartition(")")[2].split()
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
    [
        (1000, 0.2, None, True),
        # It is in the middle of its exec for a moment.
        (0.2, 2, None, False),
        (1000, 0.1, SOME_USER, False),
    ],
)
def test_blank_process(
    directory, path, start, monkeypatch, seconds, limit, uid, counts
):
    """As in an exec. If it hangs there nobody can tell of which of its user's jobs it
    is."""
    monkeypatch.setattr(scan, "BLANK_TIME", limit)
    # By so many words the frames of the program are on another page of its stack than
    # their first.
    words = [str(seconds), *[""] * 600]
    started = start(*words, script=BLANK, prefix=run_as(uid) if uid else ())
    told = attempt(directory)
    assert told.state == ("LIVE" if counts else "WON")
    assert not counts or told.pids == {started.pid}


GO_ON = "import os, sys; print(end='\\n' * (len(sys.argv) == 2), flush=True)\n"
FORKS = f"""{GO_ON}
while os.path.exists(sys.argv[1]):
    if os.fork(): os._exit(0)"""
EXECS = f"""{GO_ON}
if os.path.exists(sys.argv[1]):
    words = open("/proc/self/cmdline").read().split("\\0")[:4]
    os.execv(sys.executable, [*words, "again"])"""


@pytest.mark.alone
@pytest.mark.parametrize("script", [FORKS, EXECS], ids=["forks", "execs"])
def test_other_process_at_each_look(
    directory, path, rounds, start, tmp_path, monkeypatch, script
):
    monkeypatch.setattr(scan, "SETTLE_TIMEOUT", 0.5)
    flag = tmp_path / "flag"
    flag.touch()
    start(flag, script=script, env=MARK)
    for _ in rounds(5):
        told = attempt(directory)
        assert (told.state, told.path) in [("LIVE", str(path)), ("NOT_NOW", str(path))]
    flag.unlink()
    wait_for(lambda: attempt(directory).state == "WON")


# Where it is empty, each look asks for that of the only thread, too.
@pytest.mark.parametrize(
    ("shown", "asked"), [(b"", 2), (None, 1)], ids=["empty", "denied"]
)
def test_guest_in_the_middle_of_an_exec(
    directory, path, start, monkeypatch, shown, asked
):
    """For a moment it shows no environment, or its own user may not read that."""
    guest, looks, read = start(env=MARK), [], procfs.read_memory

    def read_too_early(pid, what):
        is_early = len(looks) < asked * (scan.EXEC_READS - 1)
        if what == "environ" and str(guest.pid) in str(pid) and is_early:
            looks.append(pid)
            return shown
        return read(pid, what)

    monkeypatch.setattr(procfs, "read_memory", read_too_early)
    assert attempt(directory).pids == {guest.pid}


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


def test_pid_that_another_process_is_given_between_two_listings(
    directory, path, start, monkeypatch
):
    """What was older than the job has ended, and its PID is that of a guest now."""
    guest, gone = start(env=MARK), start()
    end(gone)
    gone.wait()
    real = procfs.read_stat
    leave_card(path, started=real(guest.pid).started)
    listings = iter([[str(gone.pid), str(guest.pid)]])
    older = []

    def read_stat(pid):
        stat = real(pid)
        if pid == guest.pid and not older:
            older.append(replace(stat, started=stat.started - 1))
            return older[0]
        return stat

    def hook(name, call):
        is_listing = name == "listdir" and call.args[0] == "/proc"
        return next(listings, [str(guest.pid)]) if is_listing else call()

    monkeypatch.setattr(procfs, "read_stat", read_stat)
    with intercepted(hook):
        told = attempt(directory)
    assert (told.state, getattr(told, "pids", None)) == ("LIVE", {guest.pid})
    assert older


def test_host_that_is_busy_all_the_time(directory, path, monkeypatch):
    """Nothing hangs there: each listing has one more process, which has just ended."""
    monkeypatch.setattr(lock, "LOOK_TIMEOUT", 2)
    # Linux has no PIDs as high as these.
    pids = itertools.count(2**22 + 1)

    def hook(name, call):
        is_listing = name == "listdir" and call.args[0] == "/proc"
        return [str(next(pids))] if is_listing else call()

    threads = threading.active_count()
    with intercepted(hook):
        told = attempt(directory)
    assert (told.state, told.reason, told.pids) == ("NOT_NOW", "RESTLESS", set())
    # No thread is left behind.
    assert threading.active_count() == threads
    assert names(directory) == [path.name]


def test_look_goes_back_to_the_oldest_of_several_jobs(directory, path, start):
    """Of jobs that have ended one has a guest that is older than all of the other."""
    guest = start(env=MARK)
    its_start = procfs.read_stat(guest.pid).started
    leave_card(path, started=its_start)
    for number in (1, 2**32 - 1):
        leave_card(leave_lock(directory, number), started=its_start + 1)
    told = attempt(directory)
    assert (told.state, told.path) == ("LIVE", str(path))
    assert told.pids == {guest.pid}


def test_kernel_thread_that_may_not_be_read_is_no_guest():
    """In a user namespace none may be read, and new ones start all the time."""
    trace = leftovers.Trace(NAME, JOB_ID, os.geteuid())
    looked = SimpleNamespace(is_in_user_namespace=True)
    for is_kernel_thread in (False, True):
        stat = procfs.Stat(4, "kworker/0:1", 2, 7, False, is_kernel_thread)
        process = scan.Process(stat, 0, b"", None)
        assert leftovers._counts_as_guest(process, trace, looked) != is_kernel_thread


@pytest.mark.alone
@needs_other_users
@pytest.mark.parametrize("uid", [0, LONELY_USER], ids=["root", "user"])
def test_busy_host(directory, start, uid):
    """To a user the environment of each own process is denied when that ends."""
    user = ["setpriv", f"--reuid={uid}", "--clear-groups"]
    for _ in range(12):
        start(command=[*user, "sh", "-c", "while :; do /bin/true; done"])
    os.chown(leave_lock(directory), uid, uid)
    states = []

    def has_verdict():
        states.append(attempt_as(uid, directory).state)
        return states[-1] != "NOT_NOW"

    wait_for(has_verdict)
    assert states[-1] == "WON"


# Where it is the square of these that counts, no machine ends in a year.
MANY = 100_000


@pytest.mark.parametrize("count", [MANY, 10 * MANY])
def test_words_of_others_cost_their_length(count):
    """Anybody can start a process with as many of them as the system takes."""
    began = time.monotonic()
    command = b"python3" + b"\0task-run" * count
    assert leftovers.job_id_in(command + b"\0") == ""
    assert leftovers.job_id_in(command + b"\0-j\0" + JOB_ID.encode() + b"\0") == JOB_ID
    assert leftovers.job_id_in(b"\0task-run\0" + b"-j-\0" * count) == ""
    for line in (
        "x" * count,
        "x" * count + ";",
        "x" * count + f" {ECHO}",
        "x" + " " * count + ";",
        "x " + "&& echo y" * count,
        "x && echo " + "y" * count + " > /dev/nul",
    ):
        program = helpers.program(["bash", "-c", line])
        assert program in ("", "x", "x" * count)
    assert helpers.program(["bash", *["-c"] * count, "x"]) == "x"
    assert helpers.program(["python" + "3." * count + "x"]).endswith(".x")
    environ = b"".join(b"%s%d=\0" % (VARIABLE.encode(), n) for n in range(count))
    assert marks.found_in(environ) == set()
    assert marks.found_in(environ + f"{VARIABLE}=a:b\0".encode()) == {"a", "b"}
    assert len(marks.found_in(f"{VARIABLE}={':' * count}a".encode())) == 1
    assert time.monotonic() - began < 60


def test_processes_with_very_many_words(directory, path, start):
    def allow_many():
        # The system takes as many as a quarter of this.
        stack = resource.RLIMIT_STACK
        resource.setrlimit(stack, (64 * 2**20, resource.getrlimit(stack)[1]))

    nearly = {f"{VARIABLE}{number}": "" for number in range(MANY)}
    start(*["task-run"] * MANY, env={VARIABLE: OTHER}, preexec_fn=allow_many)
    start(*["-j"] * MANY, env=nearly, preexec_fn=allow_many)
    line = f"{'x' * MANY}=1; echo; read line"
    guest = start(command=["bash", "-c", line], env=MARK)
    guest.stdout.readline()
    # It is ended if it hangs, in whatever way.
    with multiprocessing.get_context("fork").Pool(1) as pool:
        told = pool.apply_async(attempt, (directory,)).get(timeout=60)
    assert (told.state, told.reason, told.pids) == ("LIVE", None, {guest.pid})


@pytest.mark.parametrize("error", [RuntimeError, ValueError, KeyboardInterrupt])
def test_unforeseen_error_of_a_look(directory, path, monkeypatch, error):
    """It is told as what it is, and not as a host where all comes and goes too fast."""

    def fail(environ):
        raise error("unforeseen")

    monkeypatch.setattr(marks, "found_in", fail)
    with pytest.raises(error, match="unforeseen"):
        attempt(directory)
    assert names(directory) == [path.name]
    monkeypatch.undo()
    assert attempt(directory).state == "WON"


@needs_other_users
def test_no_thread_can_be_started(directory, path):
    def be_alone():
        os.setuid(LONELY_USER)
        resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))

    with multiprocessing.get_context("fork").Pool(1, be_alone) as pool:
        told = pool.apply(attempt, (directory,))
    assert (told.state, told.reason, told.path) == ("NOT_NOW", "NO_THREAD", str(path))


# A system call of it waits for the storage of a file, and keeps its memory meanwhile.
HANGS = """
import ctypes, mmap, sys, threading
file = open(sys.argv[1], "w+b")
file.truncate(mmap.PAGESIZE)
page = mmap.mmap(file.fileno(), mmap.PAGESIZE)
place = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(page)))
print(page[0], flush=True)
sys.stdin.readline()
memset = ctypes.CDLL(None).memset
write = threading.Thread(target=memset, args=(place, 1, 1), daemon=True)
write.start()
while " D " not in open(f"/proc/self/task/{write.native_id}/stat").read():
    pass
print(ctypes.CDLL(None).munmap(place, mmap.PAGESIZE), flush=True)
sys.stdin.read()
"""


class Storage:
    """A file system whose storage can be made to answer no more."""

    def __init__(self, place, start):
        self._place = place
        self._start = start

    def hang(self, *words, before=""):
        """Start a process that writes there: nobody can read its environment then.

        :param words: what else is in its command line
        :param before: what it does before
        """
        hanging = self._start(self._place / "file", *words, script=before + HANGS)
        # If this test is killed: whoever looks at that process hangs, ps(1) as well.
        thaw = f"sleep 60; fsfreeze --unfreeze {self._place}"
        self._start(command=["sh", "-c", thaw])
        subprocess.run(["fsfreeze", "--freeze", self._place], check=True)
        hanging.stdin.write(b"\n")
        hanging.stdin.flush()
        stat = Path(f"/proc/{hanging.pid}/stat")
        wait_for(lambda: ") D " in stat.read_text())
        return hanging

    def thaw(self):
        unfreeze = ["fsfreeze", "--unfreeze", self._place]
        subprocess.run(unfreeze, check=False, stderr=subprocess.DEVNULL)


@pytest.fixture
def storage(tmp_path, start):
    image, place = tmp_path / "image", tmp_path / "place"
    place.mkdir()
    for command in (
        ["truncate", "--size=32M", image],
        ["mkfs.ext4", "-q", image],
        ["mount", "-o", "loop", image, place],
    ):
        if subprocess.run(command, check=False).returncode:
            pytest.skip("mounting is not permitted here")
    made = Storage(place, start)
    yield made
    made.thaw()
    subprocess.run(["umount", "--lazy", place], check=True)


@pytest.mark.alone
@needs_root
def test_process_that_hangs(directory, path, start, monkeypatch, storage):
    """What was found before is enough to tell. As long as it hangs one look waits for
    it, however many attempts there are, and all of them are quick."""
    guest, gone = start(env=MARK), start()
    end(gone)
    gone.wait()
    hanging = storage.hang()
    threads = threading.active_count()
    listings = iter([{gone.pid, guest.pid}, {guest.pid, hanging.pid}])

    def hook(name, call):
        is_listing = name == "listdir" and call.args[0] == "/proc"
        return map(str, next(listings)) if is_listing else call()

    monkeypatch.setattr(lock, "LOOK_TIMEOUT", 1)
    with intercepted(hook):
        told = attempt(directory)
    assert (told.state, told.pids) == ("LIVE", {guest.pid})
    assert (told.reason, told.detail) == ("HANGING", str(hanging.pid))
    # Another look would take that long.
    monkeypatch.setattr(lock, "LOOK_TIMEOUT", 1000)
    for _ in range(3):
        told = attempt(directory)
        assert (told.state, told.pids) == ("LIVE", {guest.pid})
    end(guest)
    for _ in range(3):
        told = attempt(directory)
        assert (told.state, told.pids) == ("NOT_NOW", set())
        assert (told.reason, told.detail) == ("HANGING", str(hanging.pid))
    assert threading.active_count() == threads + 1
    assert names(directory) == [path.name]
    storage.thaw()
    hanging.stdout.readline()
    wait_for(lambda: attempt(directory).state == "WON")
    assert threading.active_count() == threads


TAKES_THE_LOCK = """
import sys
from avocado_vt_joblock import lock
job = lock.JobLock(*sys.argv[2:])
job.acquire()
"""
SHOWS = """
import logging, sys
from avocado_vt_joblock import DIR, TIMEOUT, showing
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
showing.LOOK_TIMEOUT = 1
sys.exit(showing.show({DIR: sys.argv[1], TIMEOUT: "0"}, None))
"""
IS_REFUSED = """
import sys
from avocado_vt_joblock import lock, messages
try:
    lock.JobLock(*sys.argv[1:]).acquire()
except lock.LockInTheWayError as error:
    print(messages.refusal(error, sys.argv[1], ""))
    sys.exit(2)
"""


@pytest.mark.alone
@needs_root
@pytest.mark.parametrize(
    ("script", "words"),
    [(SHOWS, []), (IS_REFUSED, [job_id(1)])],
    ids=["show", "refusal"],
)
def test_holder_that_hangs(directory, storage, script, words):
    """Nobody can read its command line, too. Whoever tells of its lock does not hang
    with it."""
    holder = storage.hang(directory, JOB_ID, before=TAKES_THE_LOCK)
    command = [sys.executable, "-c", script, str(directory), *words]
    try:
        # Two looks of a second each, at most; and no more than HANG for all else.
        told = subprocess.run(
            command, check=False, capture_output=True, cwd="/", text=True, timeout=HANG
        )
    except subprocess.TimeoutExpired:
        told = None
    finally:
        storage.thaw()
    assert told, "it hangs"
    assert told.returncode == 2, told
    assert "another job holds the lock." in told.stdout
    assert re.search(rf"^ +PID: +{holder.pid}\b", told.stdout, re.MULTILINE)
    holder.kill()
    holder.wait()
    assert attempt(directory).state == "WON"


LOOKS_FOR_LONG = """
import sys
from avocado_vt_joblock import lock
lock.LOOK_TIMEOUT = 1000
print(flush=True)
lock.JobLock(*sys.argv[1:]).acquire()
"""


@pytest.mark.alone
@needs_root
def test_slow_look_does_not_hold_the_guard(
    directory, path, start, storage, monkeypatch
):
    """Whoever comes meanwhile is refused at once, and does not go on without it."""
    storage.hang()
    start(directory, job_id(1), script=LOOKS_FOR_LONG)

    def published():
        # While the file is made its card and an unpublished file are there.
        shown = {name for name in names(directory) if not name.startswith(".")}
        return shown - {path.name}

    wait_for(published)
    (first,) = published()
    monkeypatch.setattr(lockdir, "GUARD_TIMEOUT", 1000)
    told = attempt(directory)
    assert (told.state, told.path) == ("LIVE", str(directory / first))


JOB = """
import sys
from avocado_vt_joblock import lock
job = lock.JobLock(*sys.argv[1:])
job.acquire()
print(flush=True)
sys.stdin.readline()
left = job.find_leftovers(tests_only=False, timeout=1)
print(left.processes, left.obstacle, flush=True)
sys.stdin.read()
"""


def find_leftovers_and_die(job):
    """Have a job look at what is left of it; then kill it."""
    job.stdin.write(b"\n")
    job.stdin.flush()
    found = job.stdout.readline().decode()
    end(job)
    return found


@pytest.mark.alone
@needs_root
def test_only_what_is_younger_than_the_job_can_hide_something(
    directory, start, storage, monkeypatch
):
    """An innocent process that hangs must not stop each job that comes later."""
    monkeypatch.setattr(lock, "LOOK_TIMEOUT", 1)
    other = directory.with_name("other")
    other.mkdir()
    older_job = start(directory, job_id(1), script=JOB)
    hanging = storage.hang()
    younger_job = start(other, job_id(2), script=JOB)
    threads = threading.active_count()
    assert find_leftovers_and_die(older_job) == "[] Obstacle.HANGING\n"
    assert find_leftovers_and_die(younger_job) == "[] None\n"
    for _ in range(2):
        told = attempt(directory)
        assert (told.state, told.reason) == ("NOT_NOW", "HANGING")
        assert told.detail == str(hanging.pid)
        assert attempt(other).state == "WON"
    # Who can look in the meantime does not make others forget that a look hangs.
    assert threading.active_count() == threads + 1
    # Without a card nobody can tell how old a job is.
    path = leave_lock(other)
    assert attempt(other).state == "NOT_NOW"
    assert names(other) == [path.name]


def test_look_that_ends_when_its_time_is_over(directory, path, monkeypatch):
    """It stays a look that may have missed something."""
    gate = threading.Event()

    def read(pid, what):
        gate.wait()
        return b"-"

    monkeypatch.setattr(procfs, "read_memory", read)
    look = leftovers.Look.take(since=0, timeout=0.2)
    gate.set()
    wait_for(lambda: not look._scan.is_running)
    trace = leftovers.Trace(path.name, JOB_ID, os.geteuid())
    assert look.leftovers_of(trace).obstacle is Obstacle.HANGING
    # The next one is complete.
    look = leftovers.Look.take(since=0, timeout=60)
    assert look.leftovers_of(trace) == Leftovers()
