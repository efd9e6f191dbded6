"""Who is alive: other users, other PID namespaces, PIDs that somebody else has now."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from holders import (
    AN_HOUR,
    CONTENT,
    attempt_as,
    date_back,
    dead_pid,
    leave_stale_lock,
    lock_path,
    process,
)
from needs import PID_NAMESPACE, SOME_USER, needs_other_users, needs_pid_namespaces
from sandbox import run_as

from avocado_vt_joblock.lock import LockHeldError
from avocado_vt_joblock.processes import CLOCK_SLACK, may_have_written

#: Longer than any machine is up.
AGES = 10**9
# Where /proc still shows the PID namespace outside.
PROC_OF_OUTSIDE = [word for word in PID_NAMESPACE if word != "--mount-proc"]


@pytest.fixture
def bystander():
    """A process that has nothing to do with locks."""
    started = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    yield started
    started.communicate()


@pytest.mark.parametrize("maker", CONTENT)
def test_dead_holder(directory, new_lock, maker):
    path = leave_stale_lock(directory, maker=maker)
    new_lock().acquire()
    assert not path.exists()


@pytest.mark.parametrize("content", [b"%d", b"%d\n", b"%d \n", b"%d\n\n\n"])
def test_live_holder_without_a_flock(directory, new_lock, bystander, content):
    path = lock_path(directory, 7)
    path.write_bytes(content % bystander.pid)
    with pytest.raises(LockHeldError) as caught:
        new_lock().acquire()
    assert caught.value.holder.path == str(path)
    assert caught.value.holder.pid == bystander.pid
    assert path.exists()


@pytest.mark.parametrize("maker", CONTENT)
def test_pid_is_used_by_another_process_now(directory, new_lock, bystander, maker):
    path = leave_stale_lock(directory, maker=maker, pid=bystander.pid)
    new_lock().acquire()
    assert not path.exists()


def test_pid_is_used_by_an_older_process(directory, new_lock):
    # As after the death of a holder in a container, where PIDs are low. No flock: it is gone.
    path = leave_stale_lock(directory, pid=os.getppid())
    date_back(path, 0)
    new_lock().acquire()
    assert not path.exists()


def test_clocks_may_differ_a_little(directory, new_lock, bystander):
    path = leave_stale_lock(directory, maker="avocado-vt", pid=bystander.pid)
    date_back(path, CLOCK_SLACK / 2)
    with pytest.raises(LockHeldError):
        new_lock().acquire()
    assert path.exists()


def test_lock_from_the_future(directory, new_lock, bystander):
    path = leave_stale_lock(directory, maker="avocado-vt", pid=bystander.pid)
    date_back(path, -AN_HOUR)
    with pytest.raises(LockHeldError):
        new_lock().acquire()
    assert path.exists()


@pytest.mark.parametrize("age", [0, AN_HOUR])
@pytest.mark.parametrize("maker", CONTENT)
def test_holder_that_its_parent_has_not_waited_for(directory, new_lock, maker, age):
    child = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    child.stdout.read()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    path = leave_stale_lock(directory, maker=maker, pid=child.pid)
    date_back(path, age)
    new_lock().acquire()
    assert not path.exists()
    child.communicate()


def test_holder_with_an_odd_name(directory, new_lock):
    """What proc_pid_stat(5) shows is to be read from the last parenthesis on."""
    script = "import sys\nopen('/proc/self/comm', 'w').write('a) Z 0 (')\nprint(flush=True)\n"
    with subprocess.Popen(
        [sys.executable, "-c", script + "sys.stdin.read()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as odd:
        odd.stdout.readline()
        path = leave_stale_lock(directory, maker="avocado-vt", pid=odd.pid)
        date_back(path, 0)
        with pytest.raises(LockHeldError):
            new_lock().acquire()
        date_back(path, AN_HOUR)
        new_lock().acquire()
        odd.communicate()


def test_stopped_holder(directory, new_lock):
    with process(directory) as holder:
        holder.popen.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, holder.popen.pid, os.WSTOPPED | os.WNOWAIT)
        with pytest.raises(LockHeldError) as caught:
            new_lock().acquire()
        assert caught.value.holder.pid == holder.popen.pid
        holder.popen.send_signal(signal.SIGCONT)
    new_lock().acquire()


@pytest.mark.parametrize(("uid", "other"), [(0, SOME_USER), (SOME_USER, 0), (SOME_USER, 1)])
@needs_other_users
def test_holder_of_another_user_with_a_private_umask(directory, uid, other):
    with process(directory, *run_as(uid), umask=0o077) as holder:
        told = attempt_as(other, directory)["held"]
        assert told["path"] == holder.outcome["won"]
        assert told["pid"] == int(Path(told["path"]).read_text())
        assert told["uid"] == uid
        assert attempt_as(uid, directory)["held"] == told
    assert "won" in attempt_as(other, directory)


@needs_other_users
@needs_pid_namespaces
def test_proc_does_not_show_the_holder(directory):
    # By its start it could not be the holder, but that is not to be seen.
    path = leave_stale_lock(directory, maker="avocado-vt", pid=os.getpid())
    date_back(path, AGES)
    script = 'mount -t proc -o hidepid=2 proc /proc && exec "$@"'
    prefix = ["unshare", "--mount", "sh", "-c", script, "-", *run_as(SOME_USER)]
    with process(directory, *prefix) as contender:
        assert contender.outcome["held"]["path"] == str(path)
    # Where it is to be seen:
    with process(directory, *run_as(SOME_USER)) as contender:
        assert "won" in contender.outcome


@needs_pid_namespaces
@pytest.mark.parametrize("namespace", [PID_NAMESPACE, PROC_OF_OUTSIDE], ids=["proc", "no proc"])
class TestPIDNamespaces:
    def test_live_holder_inside(self, directory, new_lock, namespace):
        with process(directory, *namespace) as holder:
            assert "won" in holder.outcome
            with pytest.raises(LockHeldError) as caught:
                new_lock().acquire()
            assert caught.value.holder.path == holder.outcome["won"]
            assert caught.value.holder.pid == 1
        new_lock().acquire()

    def test_live_holder_outside(self, directory, new_lock, namespace):
        lock = new_lock()
        lock.acquire()
        with process(directory, *namespace) as contender:
            assert contender.outcome["held"]["path"] == lock.path
        assert Path(lock.path).exists()
        lock.release()
        with process(directory, *namespace) as contender:
            assert "won" in contender.outcome

    def test_killed_holder_inside(self, directory, new_lock, namespace):
        # Its PID was 1, which is somebody else's here, and older than the lock.
        with process(directory, *namespace) as holder:
            holder.kill()
            (path,) = directory.iterdir()
            assert int(path.read_text()) == 1
            new_lock().acquire()
            assert not path.exists()

    def test_killed_holder_with_the_same_pid(self, directory, namespace):
        with process(directory, *namespace) as holder:
            holder.kill()
        with process(directory, *namespace) as contender:
            assert "won" in contender.outcome

    def test_killed_holder_outside(self, directory, namespace):
        path = leave_stale_lock(directory, pid=1)
        with process(directory, *namespace) as contender:
            assert "won" in contender.outcome
            assert not path.exists()

    def test_proc_of_another_namespace_is_not_asked(self, directory, namespace):
        # By their start neither the process 1 inside nor the one outside could be the holder.
        path = leave_stale_lock(directory, maker="avocado-vt", pid=1)
        date_back(path, AGES)
        with process(directory, *namespace) as contender:
            if namespace is PID_NAMESPACE:
                assert "won" in contender.outcome
            else:
                assert contender.outcome["held"]["path"] == str(path)


def test_start_of_a_process_by_another_clock(bystander):
    """What the lock derives from /proc is what ps(1) says."""
    command = ["env", "LC_ALL=C", "ps", "-o", "lstart=", "-p", str(bystander.pid)]
    text = subprocess.check_output(command, text=True)
    started = time.mktime(time.strptime(text.strip()))
    # ps rounds to seconds.
    assert may_have_written(bystander.pid, started + 2 - CLOCK_SLACK)
    assert not may_have_written(bystander.pid, started - 2 - CLOCK_SLACK)
    assert not may_have_written(dead_pid(), started)
