"""What becomes of a lock file that a contender finds, by what it is and by who has written it."""

import errno
import fcntl
import functools
import os
import signal
import stat
import time

import needs
import pytest
from conftest import WAIT
from faults import intercepted
from needs import SOME_USER
from others import AN_HOUR, CONTENT, attempt, attempt_as, leave_lock, lock_path, names, process
from sandbox import run_as

from avocado_vt_joblock import lockfile, processes

# What proc_pid_stat(5) shows of it is to be read from the last parenthesis on.
ODD_NAME = f"open('/proc/self/comm', 'w').write('a) Z 0 ('); {WAIT}"
YEARS = 365 * 24 * AN_HOUR
OURS, ITS = CONTENT.values()
ALIVE = ("alive", "stopped", "odd")


def judged(directory, path):
    before = path.lstat()
    told = attempt(directory)
    if told.state == "WON":
        assert names(directory) == []
        return "STALE", None
    assert (told.path, path.lstat().st_ctime) == (str(path), before.st_ctime)
    return told.state, told.reason


@pytest.mark.parametrize(
    ("content", "kind", "age", "state"),
    [
        # Its writer would have the kernel lock.
        *[(OURS, kind, 0, "STALE") for kind in ("dead", "itself", "alive", "zombie")],
        *[(ITS, kind, 0, "STALE") for kind in ("dead", "zombie")],
        *[(ITS, kind, 0, "LIVE") for kind in ("itself", *ALIVE)],
        *[(ITS + end, "alive", 0, "LIVE") for end in (b"\n", b" \n", b"\n\n\n")],
        # That PID was given to another process later.
        *[(ITS, kind, AN_HOUR, "STALE") for kind in ALIVE],
        *[(ITS, "alive", age, "LIVE") for age in (processes.CLOCK_SLACK / 2, -AN_HOUR)],
    ],
)
def test_pid(directory, start, content, kind, age, state):
    other = start(script=ODD_NAME if kind == "odd" else WAIT)
    if kind in ("zombie", "stopped"):
        other.send_signal(signal.SIGKILL if kind == "zombie" else signal.SIGSTOP)
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WSTOPPED | os.WNOWAIT)
    pid = {"dead": None, "itself": os.getpid()}.get(kind, other.pid)
    path = leave_lock(directory, content=content, pid=pid, age=age)
    assert judged(directory, path) == (state, None)


NO_PID = [b"", b"\0" * 10, b"secret", b"-1", b"0", b"1" * 30, b"%d" % 2**31, b"+1", b"1_0"]
NO_PID += [b"12 13", "٣".encode(), b"\xff\xfe", b"123\n" + b" " * 100 + b"4"]
NO_REGULAR_FILE = {
    "fifo": os.mkfifo,
    "socket": lambda path: os.mknod(path, stat.S_IFSOCK | 0o600),
    "device": lambda path: os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3)),
    "directory": os.mkdir,
    "dangling link": lambda path: path.symlink_to("/nonexistent"),
    "loop": lambda path: path.symlink_to(path.name),
    "link": lambda path: path.symlink_to(leave_lock(path.parent.parent, 1, pid=os.getpid())),
}


@pytest.mark.parametrize("kind", [*NO_PID, *NO_REGULAR_FILE])
def test_what_no_job_has_written(directory, kind):
    path = lock_path(directory, 7)
    if kind == "device" and os.getuid() != 0:
        pytest.skip("only root can make one")
    NO_REGULAR_FILE.get(kind, lambda path: path.write_bytes(kind))(path)
    os.utime(path, (0, 0), follow_symlinks=False)
    reason = "NO_REGULAR_FILE" if kind in NO_REGULAR_FILE else "NO_PID"
    assert judged(directory, path) == ("UNKNOWN", reason)


def test_names_that_only_resemble_a_lock(directory):
    name = lock_path(directory, 7).name
    others = [f"{name}.bak", f"{name}\n", f"x{name}", f"..{name}", name.upper(), "\udcff"]
    others += [name.replace("0-", "-", 1), name.replace("-00000007", "-٠٠٠٠٠٠٠٧"), f"{name}\udcff"]
    for other in others:
        (directory / other).write_bytes(b"%d" % os.getpid())
    assert (attempt(directory).state, names(directory)) == ("WON", sorted(others))


def test_which_is_told_of_several(directory, monkeypatch):
    """Whoever waits for a live one would be stopped in the end by one that nobody can judge."""
    monkeypatch.setattr(processes, "SETTLE_TIMEOUT", 0)
    contents = {"NOT_NOW": CONTENT["this package"], "LIVE": b"%d" % os.getpid(), "UNKNOWN": b""}
    for number, (state, content) in enumerate(contents.items()):
        path = leave_lock(directory, number, content, age=0)
        told = attempt(directory)
        assert (told.state, told.path, len(names(directory))) == (state, str(path), number + 1)
    monkeypatch.undo()
    attempt(directory)
    assert len(names(directory)) == 2


def test_many(directory):
    for number in range(20_000):
        os.close(os.open(directory / f"unrelated-{number}", os.O_CREAT))
    paths = [leave_lock(directory, number, [*CONTENT][number % 2]) for number in range(1000)]
    began = time.monotonic()
    assert {file.path for file in attempt(directory).stale} == set(map(str, paths))
    assert time.monotonic() - began < 20
    assert len(names(directory)) == 20_000


def test_only_its_owner_can_make_a_stale_lock_look_live(directory):
    kernel_locks = [lockfile.struct_flock(kind) for kind in (fcntl.F_RDLCK, fcntl.F_WRLCK)]
    for mode, state, take, *how in (
        ("r", "STALE", fcntl.flock, fcntl.LOCK_EX),
        ("r", "STALE", fcntl.lockf, fcntl.LOCK_SH),
        ("r", "STALE", fcntl.fcntl, lockfile.SETLK, kernel_locks[0]),
        ("r+", "LIVE", fcntl.fcntl, lockfile.SETLK, kernel_locks[1]),
    ):
        path = leave_lock(directory)
        with path.open(mode) as stranger:
            take(stranger, *how)
            assert judged(directory, path) == (state, None)


def test_leases_make_nobody_wait(directory, start):
    """Who opens a file under a lease waits for its holder, who has 45 seconds to give it back."""
    script = "import fcntl, os, signal, sys; signal.signal(signal.SIGIO, signal.SIG_IGN); "
    script += "fd = os.open(sys.argv[1], os.O_RDWR); "
    script += f"fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK); {WAIT}"
    for number in range(10):
        start(leave_lock(directory, number), script=script)
    began = time.monotonic()
    told = attempt(directory)
    assert time.monotonic() - began < 8
    assert (told.state, told.detail) == ("UNKNOWN", os.strerror(errno.EWOULDBLOCK))
    assert len(names(directory)) == 10


# An NFS server takes a delegation back, its other client has removed the file, or it is a link now.
OPENS = [(errno.EWOULDBLOCK, 3, "WON", False), (errno.ESTALE, 1, "WON", True)]
OPENS += [(errno.ELOOP, 1, "UNKNOWN", True)]


@pytest.mark.parametrize(("code", "times", "state", "stays"), OPENS)
def test_open_fails(directory, code, times, state, stays):
    path = leave_lock(directory)
    errors = [OSError(code, os.strerror(code))] * times

    def hook(name, call):
        if errors and name == "open" and call.args[0] == str(path):
            raise errors.pop()
        return call()

    with intercepted(hook):
        assert attempt(directory).state == state
    assert path.exists() == stays


@needs.needs_other_users
@pytest.mark.parametrize(("uid", "other"), [(0, SOME_USER), (SOME_USER, 0), (SOME_USER, 1)])
def test_holder_of_another_user_with_a_private_umask(directory, uid, other):
    with process(directory, *run_as(uid), umask=0o077) as holder:
        for user in (other, uid):
            told = attempt_as(user, directory)
            assert (told.state, told.path, told.uid) == ("LIVE", holder.told.path, uid)
    assert attempt_as(other, directory).state == "WON"


@needs.needs_other_users
def test_stale_lock_of_another_user(directory):
    """That it may not be removed stops nobody, but each job is told; unread it stops a job."""
    path = leave_lock(directory)
    path.with_name(f".{path.name}").touch()
    (stale,) = attempt_as(SOME_USER, directory).stale
    assert (stale.path, stale.reason) == (str(path), lockfile.Reason.SYSTEM)
    path.chmod(0o600)
    told = attempt_as(SOME_USER, directory)
    assert (told.state, told.detail) == ("UNKNOWN", os.strerror(errno.EACCES))
    assert len(names(directory)) == 2


def told_to(directory, *prefix, proc=None):
    if proc:
        mount = f'mount -t {proc} /proc && exec "$@"'
        prefix = ["unshare", "--mount", "sh", "-c", mount, "-", *prefix]
    with process(directory, *prefix) as contender:
        return contender.told.state, getattr(contender.told, "reason", None)


@needs.needs_mount_namespaces
def test_no_proc(directory):
    for told in (("WON", None), ("UNKNOWN", "NO_PROC")):
        assert told_to(directory, proc="tmpfs none") == told
        leave_lock(directory)


@needs.needs_mount_namespaces
@needs.needs_other_users
@pytest.mark.parametrize("hidepid", [1, 2])
def test_proc_that_hides_the_processes_of_others(directory, hidepid):
    proc = f"proc -o hidepid={hidepid} proc"
    see = functools.partial(told_to, directory, *run_as(SOME_USER), proc=proc)
    # By its start that process could not be the holder, but this is not to be seen.
    path = leave_lock(directory, content="avocado-vt", pid=os.getpid(), age=10 * YEARS)
    assert see() == ("LIVE", None)
    path.write_bytes(OURS % os.getpid())
    assert see() == ("UNKNOWN", "HIDDEN")
    # Their own they see.
    os.chown(path, SOME_USER, SOME_USER)
    assert see() == ("WON", None)


INSIDE = needs.PID_NAMESPACE
# Where /proc still shows the PID namespace outside.
NO_PROC = [word for word in INSIDE if word != "--mount-proc"]
PAIRS = [(INSIDE, []), ([], INSIDE), (NO_PROC, []), ([], NO_PROC)]
# There its PID is 1, which here is another process: the contender, or a shell.
PAIRS += [(INSIDE, [*INSIDE, *init]) for init in ([], ["sh", "-c", '"$@"; :', "-"])]


@needs.needs_pid_namespaces
@pytest.mark.parametrize(("holder", "heir"), PAIRS)
def test_holder_in_another_pid_namespace(directory, holder, heir):
    with process(directory, *holder) as first:
        with process(directory, *heir) as second:
            assert second.told.state == "LIVE"
            assert not (heir and second.told.pid_is_here)
        first.kill()
        first.stdout.read()
    # Its PID is somebody else's, which is an older process; inside that of the heir.
    for namespace in (heir, holder):
        leave_lock(directory, pid=1)
        assert told_to(directory, *namespace) == ("WON", None)
        assert names(directory) == []


@needs.needs_pid_namespaces
def test_proc_of_another_namespace_is_not_asked(directory):
    """By their start neither the process 1 inside nor the one outside could be the holder."""
    leave_lock(directory, content="avocado-vt", pid=1, age=10 * YEARS)
    assert told_to(directory, *NO_PROC) == ("LIVE", None)
    assert told_to(directory, *INSIDE) == ("WON", None)
