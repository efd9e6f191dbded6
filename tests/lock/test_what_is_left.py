"""What a job has started and outlives it: it keeps the lock live, and nothing else does."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from holders import (
    attempt,
    attempt_as,
    dead_pid,
    job_id,
    leave_stale_lock,
    lock_path,
    names,
    process,
)
from needs import (
    PID_NAMESPACE,
    SOME_USER,
    needs_mount_namespaces,
    needs_other_users,
    needs_pid_namespaces,
    needs_root,
)
from sandbox import run_as
from system_calls import count, intercepted

from avocado_vt_joblock import processes
from avocado_vt_joblock.lock import LockHeldError, LockUnknownError

JOB_ID = job_id(0xDEAD)
#: As Avocado starts a runner, in whose child avocado-vt runs the test.
RUNNER = ["task-run", "-i", "1-test", "-j", JOB_ID, "-k", "avocado-vt"]
WAIT = "import sys; print(flush=True); sys.stdin.read()"


@pytest.fixture
def start():
    """Start a process that runs until the end of the test, once it has begun."""
    started = []

    def start(*words, script=WAIT, prefix=(), **options):
        command = [*prefix, sys.executable, "-c", script, *words]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        # Not in the checkout, whose package would be found first.
        started.append(subprocess.Popen(command, cwd="/", **pipes, **options))
        started[-1].stdout.readline()
        return started[-1]

    yield start
    for popen in started:
        popen.kill()
        popen.communicate()


def mark_of(path):
    """The environment of a process of a job that holds a lock."""
    return {**os.environ, "AVOCADO_VT_JOBLOCK_1_00000000": str(path)}


def environ_of(pid):
    return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")


def pids(holder):
    return [this.pid for this in holder.processes]


def refused(lock):
    """Who holds the lock that another one cannot take."""
    with pytest.raises(LockHeldError) as caught:
        lock.acquire()
    return caught.value.holder


def wait_until_ended(pid):
    """Wait for a process that is not a child of this one."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            time.sleep(0.01)


def end(popen):
    popen.kill()
    popen.wait()


def test_guest_of_a_killed_job(directory, new_lock):
    with process(directory, starts=["sleep", "1000"]) as job:
        job.kill()
    guest = job.outcome["guest"]
    holder = refused(new_lock())
    assert holder.path == job.outcome["won"]
    assert pids(holder) == [guest]
    assert holder.processes[0].command == "sleep 1000"
    assert names(directory) == [Path(holder.path).name]
    os.kill(guest, signal.SIGKILL)
    wait_until_ended(guest)
    lock = new_lock()
    lock.acquire()
    assert names(directory) == [Path(lock.path).name]


def test_it_keeps_live_only_its_own_lock(directory, new_lock, start):
    kept, others = leave_stale_lock(directory), leave_stale_lock(directory, 1)
    start(env=mark_of(kept))
    assert refused(new_lock()).path == str(kept)
    assert not others.exists()


def test_mark_of_the_process(new_lock, start):
    lock = new_lock()
    lock.acquire()
    assert any(word.endswith(lock.path.encode()) for word in environ_of(start().pid))
    lock.release()
    assert not any(lock.path.encode() in word for word in environ_of(start().pid))
    assert not any(lock.path in value for value in os.environ.values())


def test_mark_ends_with_a_lock_that_is_left(new_lock):
    lock = new_lock()
    lock.acquire()
    lock.leave()
    assert not any(lock.path in value for value in os.environ.values())
    assert Path(lock.path).exists()
    new_lock().acquire()
    assert not Path(lock.path).exists()


def test_left_behind(new_lock, start):
    lock = new_lock()
    lock.acquire()
    assert lock.left_behind() == ([], "")
    left = start()
    assert [this.pid for this in lock.left_behind().processes] == [left.pid]
    assert lock.left_behind().processes[0].is_running()
    found = lock.left_behind().processes[0]
    end(left)
    assert not found.is_running()
    assert lock.left_behind() == ([], "")


def test_process_that_has_ended_is_not_running(new_lock, start):
    lock = new_lock()
    lock.acquire()
    started = start()
    (found,) = lock.left_behind().processes
    # Its PID is another process's.
    assert not found._replace(started=found.started - 1).is_running()
    started.kill()
    os.waitid(os.P_PID, started.pid, os.WEXITED | os.WNOWAIT)
    # Nobody has waited for it yet.
    assert not found.is_running()


def test_jobs_of_one_process_one_after_the_other(new_lock, start):
    first = new_lock()
    first.acquire()
    start()
    first.release()
    second = new_lock()
    second.acquire()
    assert second.left_behind() == ([], "")
    mine = start()
    assert [this.pid for this in second.left_behind().processes] == [mine.pid]


def test_jobs_of_one_process_at_the_same_time(directory, new_lock, tmp_path, start):
    """Both are marked on all that the process starts; the tests tell whose they are."""
    locks = [new_lock(job_id(1)), new_lock(job_id(2), where=tmp_path)]
    threads = [threading.Thread(target=lock.acquire) for lock in locks]
    for thread in threads:
        thread.start()
        thread.join()
    tests = [start("task-run", "-i", "1", "-j", job_id(number)).pid for number in (1, 2)]
    nested = start("task-run", "-i", "1", "-j", job_id(3)).pid
    for lock, test in zip(locks, tests):
        assert [this.pid for this in lock.left_behind().processes] == [test, nested]
    # The end of one is not the end of the other's mark.
    locks[0].release()
    later = start().pid
    assert [this.pid for this in locks[1].left_behind().processes] == [tests[1], nested, later]


NESTED = """
import os, sys
from avocado_vt_joblock.processes import mark
path, how, *command = sys.argv[1:]
mark(path)
if how == "forks":
    if os.fork():
        os.wait()
        os._exit(0)
    mark(command.pop(0))
os.execv(command[0], command)
"""


@pytest.mark.parametrize("how", ["forks", "has the same PID"])
def test_test_of_a_job_that_a_test_runs(directory, new_lock, start, how):
    """It is marked by both jobs, and keeps the locks of both live."""
    outer, inner = leave_stale_lock(directory), lock_path(directory, 1)
    test = [sys.executable, "-c", WAIT, "task-run", "-i", "1", "-j", job_id(1)]
    if how == "forks":
        start(str(outer), how, str(inner), *test, script=NESTED)
    else:
        again = [sys.executable, "-c", NESTED, str(inner), "runs the test"]
        start(str(outer), how, *again, *test, script=NESTED)
    holder = refused(new_lock())
    assert holder.path == str(outer)
    assert [process.command for process in holder.processes] == [" ".join(test)]


@pytest.mark.parametrize(
    ("words", "counts"),
    [
        (RUNNER, True),
        ([*RUNNER[:4], JOB_ID.upper(), *RUNNER[5:]], True),
        (RUNNER[1:], False),
        (RUNNER[:4], False),
        (["-j", JOB_ID, "task-run"], False),
        ([*RUNNER[:4], job_id(1)], False),
        ([" ".join(RUNNER)], False),
    ],
)
@pytest.mark.parametrize("environment", [{}, {"PATH": "/bin"}], ids=["empty", "usual"])
def test_test_is_known_by_its_command_line(directory, new_lock, start, words, counts, environment):
    path = leave_stale_lock(directory)
    test = start(*words, env=environment)
    if counts:
        assert pids(refused(new_lock())) == [test.pid]
        end(test)
    new_lock().acquire()
    assert not path.exists()


def test_test_of_another_job_with_the_same_id(directory, new_lock, start):
    """Avocado takes a job id from its user; the mark knows better."""
    leave_stale_lock(directory)
    start(*RUNNER, env=mark_of("/elsewhere/" + lock_path(directory, 7).name))
    new_lock().acquire()


def test_by_an_odd_job_id(directory, new_lock, start):
    lock = new_lock("nightly #7")
    lock.acquire()
    variable = {k: v for k, v in os.environ.items() if not k.startswith("AVOCADO_VT_JOBLOCK_")}
    test = start("task-run", "-i", "1", "-j", "nightly #7", env=variable)
    assert [this.pid for this in lock.left_behind().processes] == [test.pid]


@needs_other_users
@pytest.mark.parametrize(
    ("owner", "user", "counts"),
    [
        (SOME_USER, SOME_USER, True),
        (SOME_USER, 0, True),
        (0, 0, True),
        (0, SOME_USER, False),
        (SOME_USER, SOME_USER + 1, False),
    ],
)
@pytest.mark.parametrize("by", ["mark", "command line", "command line, not dumpable"])
def test_only_processes_of_the_owner_and_of_root_count(
    directory, new_lock, start, owner, user, counts, by
):
    path = lock_path(directory, 0xDEAD, uid=owner)
    path.write_bytes(b"%d\n\n" % dead_pid())
    os.chown(path, owner, owner)
    prefix = run_as(user)
    if by == "mark":
        started = start(env=mark_of(path), prefix=prefix)
    elif by == "command line":
        started = start(*RUNNER, prefix=prefix)
    else:
        script = f"import ctypes; ctypes.CDLL(None).prctl(4, 0); {WAIT}"
        started = start(*RUNNER, prefix=prefix, script=script)
        # It looks like a process of root.
        assert Path(f"/proc/{started.pid}/cmdline").stat().st_uid == 0
    if counts:
        assert pids(refused(new_lock())) == [started.pid]
    else:
        new_lock().acquire()


@needs_other_users
def test_other_users_see_a_test_but_no_guest(directory, start):
    path = leave_stale_lock(directory)
    guest = start(env=mark_of(path))
    test = start(*RUNNER, env=mark_of(path))
    told = attempt_as(SOME_USER, directory)["held"]
    assert [this[0] for this in told["processes"]] == [test.pid]
    assert {this[0] for this in attempt(directory)[1]["held"]["processes"]} == {guest.pid, test.pid}
    end(test)
    # A limit that the manual tells.
    assert "won" in attempt_as(SOME_USER, directory)


def test_zombie_does_not_count(directory, new_lock, start):
    path = leave_stale_lock(directory)
    started = start(env=mark_of(path))
    started.kill()
    os.waitid(os.P_PID, started.pid, os.WEXITED | os.WNOWAIT)
    new_lock().acquire()
    assert not path.exists()


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


def test_process_whose_first_thread_has_ended(directory, new_lock, start):
    """It looks like a zombie, and is none."""
    path, others = leave_stale_lock(directory), leave_stale_lock(directory, 1)
    started = start(env=mark_of(path), script=FIRST_THREAD_ENDS)
    holder = refused(new_lock())
    assert pids(holder) == [started.pid]
    assert holder.processes[0].is_running()
    assert not others.exists()


@pytest.mark.parametrize("others_end", [False, True], ids=["one ends", "all end"])
def test_threads_that_end_while_they_are_looked_at(directory, new_lock, start, others_end):
    path = leave_stale_lock(directory)
    started = start(env=mark_of(path), script=FIRST_THREAD_ENDS)
    gone = str(dead_pid())

    def hook(name, call):
        if name == "listdir" and call.args[0].endswith("/task"):
            return [gone] if others_end else [gone, *call()]
        return call()

    with intercepted(hook):
        holder = refused(new_lock())
    # Of its user is all that is known of it, if no thread is left to ask.
    assert pids(holder) == [started.pid]


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
def test_process_that_hangs(directory, new_lock, start, tmp_path, monkeypatch):
    """It writes to storage that does not answer, so its environment cannot be read."""
    monkeypatch.setattr(processes, "LOOK_TIMEOUT", 1)
    image, mounted = tmp_path / "image", tmp_path / "mounted"
    mounted.mkdir()
    with image.open("wb") as file:
        file.truncate(32 * 2**20)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    if subprocess.run(["mount", "-o", "loop", image, mounted], check=False).returncode:
        pytest.skip("mounting is not permitted here")
    path = leave_stale_lock(directory)
    guest = start(env=mark_of(path))
    with contextlib.ExitStack() as stack:
        stack.callback(subprocess.run, ["umount", mounted], check=True)
        hanging = start(mounted / "file", script=HANGS)
        stack.callback(end, hanging)
        problem = f"it took more than 1 s, process {hanging.pid} may hang"
        subprocess.run(["fsfreeze", "--freeze", mounted], check=True)
        try:
            hanging.stdin.write(b"\n")
            hanging.stdin.flush()
            while " D " not in Path(f"/proc/{hanging.pid}/stat").read_text():
                pass
            # What was found before is enough to tell.
            with pytest.raises(LockHeldError) as caught:
                new_lock().acquire()
            assert pids(caught.value.holder) == [guest.pid]
            assert caught.value.holder.unseen == problem
            end(guest)
            with pytest.raises(LockUnknownError, match=problem):
                new_lock().acquire()
            assert names(directory) == [path.name]
        finally:
            subprocess.run(["fsfreeze", "--unfreeze", mounted], check=True)
        hanging.stdout.readline()
        new_lock().acquire()
    assert not path.exists()


def test_own_process_does_not_count_but_its_parent_does(directory, start):
    """A shell that a test of the job started, for example."""
    path = leave_stale_lock(directory)
    with process(directory, env=mark_of(path)) as contender:
        assert "won" in contender.outcome
    leave_stale_lock(directory)
    script = "import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))"
    prefix = [sys.executable, "-c", script]
    with process(directory, *prefix, env=mark_of(path)) as contender:
        (parent,) = contender.outcome["held"]["processes"]
        assert parent[0] == contender.popen.pid


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
def test_process_that_is_another_one_at_each_look(directory, new_lock, rounds, tmp_path, script):
    path = leave_stale_lock(directory)
    flag = tmp_path / "flag"
    flag.touch()
    environment = {**mark_of(path), "SCRIPT": script, "UNTIL_GONE": str(flag)}
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as chain:
        try:
            chain.stdout.readline()
            for _ in rounds(15):
                # It is found, or it is plain that nothing can be.
                with pytest.raises((LockHeldError, LockUnknownError)) as caught:
                    new_lock().acquire()
                assert caught.value.holder.path == str(path)
        finally:
            flag.unlink()
            # Until the last one has closed it.
            chain.stdout.read()
    new_lock().acquire()
    assert not path.exists()


def test_process_that_the_first_listing_misses(directory, new_lock, start):
    """PIDs start again from the lowest one day, just when one forks and ends."""
    path = leave_stale_lock(directory)
    forked = start(env=mark_of(path))
    listings = []

    def hook(name, call):
        if name != "listdir":
            return call()
        listings.append([pid for pid in call() if listings or pid != str(forked.pid)])
        return listings[-1]

    with intercepted(hook):
        holder = refused(new_lock())
    assert pids(holder) == [forked.pid]


def test_one_pass_whatever_the_number_of_stale_locks(directory, new_lock):
    for number in range(50):
        leave_stale_lock(directory, number)
    # A pass ends with two rounds in which nothing has changed.
    assert count(new_lock().acquire).count("listdir") == 2
    assert len(names(directory)) == 1


def test_no_stale_lock_no_look_at_processes(new_lock):
    lock = new_lock()
    calls = count(lock.acquire) + count(lock.release)
    assert {"listdir", "kill", "readlink"} & set(calls) == set()


@needs_other_users
@needs_mount_namespaces
@pytest.mark.parametrize("hidepid", [1, 2])
def test_proc_hides_the_processes_of_others(directory, hidepid):
    remount = f'mount -t proc -o hidepid={hidepid} proc /proc && exec "$@"'
    prefix = ["unshare", "--mount", "sh", "-c", remount, "-", "setpriv"]
    user = ["--reuid=54321", "--regid=54321", "--clear-groups"]
    other = [*prefix, *user, "--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
    path = leave_stale_lock(directory)
    with process(directory, *other) as contender:
        assert str(path) in contender.outcome["error"]
        assert "/proc does not show" in contender.outcome["error"]
    assert path.exists()
    # Their own they see.
    os.chown(path, SOME_USER, SOME_USER)
    with process(directory, *other) as contender:
        assert "won" in contender.outcome


@needs_mount_namespaces
def test_no_proc(directory):
    prefix = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /proc && exec "$@"', "-"]
    with process(directory, *prefix) as contender:
        assert "won" in contender.outcome
    path = leave_stale_lock(directory)
    with process(directory, *prefix) as contender:
        assert "/proc does not show" in contender.outcome["error"]
    assert path.exists()


@needs_pid_namespaces
def test_guest_in_a_container_is_seen_from_outside(directory, new_lock):
    # Its init holds the lock; only the holder is killed, not what it started.
    init = 'trap "" TERM; "$@"; sleep 1000'
    with process(
        directory, *PID_NAMESPACE, "sh", "-c", init, "-", starts=["sleep", "1000"]
    ) as contender:
        holder = refused(new_lock())
        children = Path(f"/proc/{contender.popen.pid}/task/{contender.popen.pid}/children")
        (shell,) = children.read_text().split()
        inner = Path(f"/proc/{shell}/task/{shell}/children").read_text().split()
        assert contender.outcome["won"] == holder.path
        os.kill(int(inner[0]), signal.SIGKILL)
        contender.popen.stdout.close()
        while not (left := refused(new_lock()).processes):
            pass
        assert [this.command for this in left] == ["sleep 1000"]
        contender.popen.kill()
        contender.popen.wait()
