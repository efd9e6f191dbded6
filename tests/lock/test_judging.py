"""What becomes of a lock file that a contender finds, by what it is and by who has written it."""

import errno
import fcntl
import os
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest
from faults import intercepted
from needs import (
    PID_NAMESPACE,
    SOME_USER,
    needs_mount_namespaces,
    needs_other_users,
    needs_pid_namespaces,
    needs_root,
)
from others import (
    AN_HOUR,
    CONTENT,
    attempt,
    attempt_as,
    date_back,
    dead_pid,
    kill,
    leave_stale_lock,
    lock_path,
    names,
    process,
)
from sandbox import run_as

from avocado_vt_joblock import lockfile, processes
from avocado_vt_joblock.processes import CLOCK_SLACK

#: Longer than any machine is up.
AGES = 10**9
# Where /proc still shows the PID namespace outside.
PROC_OF_OUTSIDE = [word for word in PID_NAMESPACE if word != "--mount-proc"]
# What proc_pid_stat(5) shows of it is to be read from the last parenthesis on.
ODD_NAME = "open('/proc/self/comm', 'w').write('a) Z 0 (')"
OURS, ITS = CONTENT.values()


def judged(directory, path):
    """What becomes of a lock: its state, and the reason; a stale one has to be gone."""
    before = path.lstat()
    told = attempt(directory)
    if told.state == "WON":
        assert not path.exists()
        return "STALE", None
    assert told.path == str(path)
    after = path.lstat()
    assert (after.st_ino, after.st_mtime, after.st_ctime) == (
        *(before.st_ino, before.st_mtime, before.st_ctime),
    )
    assert names(directory) == [path.name]
    return told.state, told.reason


@pytest.fixture
def writer(start):
    """Make the process that is to have written a lock, and return its PID."""

    def make(kind):
        if kind == "dead":
            return dead_pid()
        if kind == "itself":
            return os.getpid()
        script = "import sys; print(flush=True); sys.stdin.read()"
        popen = start(script=f"{ODD_NAME}; {script}" if kind == "odd" else script)
        if kind == "zombie":
            popen.kill()
            os.waitid(os.P_PID, popen.pid, os.WEXITED | os.WNOWAIT)
        if kind == "stopped":
            popen.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, popen.pid, os.WSTOPPED | os.WNOWAIT)
        return popen.pid

    return make


@pytest.mark.parametrize(
    ("content", "kind", "age", "state"),
    [
        # Its writer would have the kernel lock.
        *[(OURS, kind, 0, "STALE") for kind in ("dead", "itself", "alive", "zombie")],
        (OURS, "alive", AN_HOUR, "STALE"),
        *[(ITS, kind, 0, "STALE") for kind in ("dead", "zombie")],
        *[(ITS, kind, 0, "LIVE") for kind in ("itself", "alive", "stopped", "odd")],
        *[(ITS + end, "alive", 0, "LIVE") for end in (b"\n", b" \n", b"\n\n\n")],
        # That PID was given to another process later.
        *[(ITS, kind, AN_HOUR, "STALE") for kind in ("alive", "stopped", "odd")],
        # The clocks of two hosts, or of a file system and a process, differ a little.
        (ITS, "alive", CLOCK_SLACK / 2, "LIVE"),
        (ITS, "alive", -AN_HOUR, "LIVE"),
    ],
)
def test_pid(directory, writer, content, kind, age, state):
    path = lock_path(directory, 7)
    path.write_bytes(content % writer(kind))
    date_back(path, age)
    assert judged(directory, path) == (state, None)


def sparse(path):
    with path.open("wb") as file:
        file.truncate(4 * 2**30)


def link_to_live_pid(path):
    (path.parent.parent / "secret").write_text(f"{os.getpid()}\n")
    path.symlink_to("../secret")


NO_PID = [
    *[b"", b"\0" * 10, b"secret", b"-1", b"0", b"1" * 30, b"%d" % 2**31, b"+1", b"1_0", b"12 13"],
    *["٣".encode(), b"\xff\xfe", b"123\n" + b" " * 100 + b"4"],
]


@pytest.mark.parametrize("unpublished", [False, True], ids=["published", "unpublished"])
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        *[(lambda path, text=text: path.write_bytes(text), "NO_PID") for text in NO_PID],
        (sparse, "NO_PID"),
        (os.mkfifo, "NO_REGULAR_FILE"),
        (lambda path: os.mknod(path, stat.S_IFSOCK | 0o600), "NO_REGULAR_FILE"),
        (Path.mkdir, "NO_REGULAR_FILE"),
        (lambda path: path.symlink_to("/nonexistent"), "NO_REGULAR_FILE"),
        (lambda path: path.symlink_to(path.name), "NO_REGULAR_FILE"),
        (link_to_live_pid, "NO_REGULAR_FILE"),
        pytest.param(
            lambda path: os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3)),
            "NO_REGULAR_FILE",
            marks=needs_root,
        ),
    ],
)
def test_what_nobody_can_have_written(directory, make, reason, unpublished):
    """It stops the job, and nothing of it is followed, removed or changed."""
    path = lock_path(directory, 7)
    if unpublished:
        path = path.with_name(f".{path.name}")
    make(path)
    # As a power cut leaves it.
    os.utime(path, (0, 0), follow_symlinks=False)
    if not unpublished:
        assert judged(directory, path) == ("UNKNOWN", reason)
    else:
        assert attempt(directory).state == "WON"
        assert names(directory) == [path.name]


def test_names_that_only_resemble_a_lock(directory):
    name = lock_path(directory, 7).name
    others = [f"{name}.bak", f"{name}\n", f"x{name}", f"..{name}", name.upper()]
    others += [name.replace("0-", "-", 1), name.replace("-00000007", "-٠٠٠٠٠٠٠٧")]
    others += [os.fsdecode(name) for name in (b"avocado-vt-joblock-\xff\xfe", b"\xff\xfe")]
    for other in others:
        (directory / other).write_bytes(b"%d" % os.getpid())
    assert attempt(directory).state == "WON"
    assert names(directory) == sorted(others)


def test_which_is_told_of_several(directory, monkeypatch):
    """Whoever waits for a live one would be stopped in the end by one that nobody can judge."""
    paths = {"NOT_NOW": leave_stale_lock(directory)}
    monkeypatch.setattr(processes, "SETTLE_TIMEOUT", 0)
    assert attempt(directory).state == "NOT_NOW"
    for number, state in ((1, "LIVE"), (2, "UNKNOWN")):
        path = paths[state] = lock_path(directory, number)
        path.write_bytes(b"%d" % os.getpid() if state == "LIVE" else b"")
        told = attempt(directory)
        assert (told.state, told.path) == (state, str(path))
    assert names(directory) == sorted(path.name for path in paths.values())


def test_stale_lock_beside_a_live_one_is_removed(directory, new_lock):
    held = new_lock()
    held.acquire()
    leave_stale_lock(directory)
    assert attempt(directory).path == held.path
    assert names(directory) == [Path(held.path).name]


def test_many(directory):
    """Neither many stale locks nor many other files take long."""
    for number in range(20_000):
        os.close(os.open(directory / f"unrelated-{number}", os.O_CREAT))
    makers = list(CONTENT)
    paths = [leave_stale_lock(directory, number, makers[number % 2]) for number in range(1000)]
    began = time.monotonic()
    told = attempt(directory)
    assert time.monotonic() - began < 20
    assert sorted(file.path for file in told.stale) == sorted(map(str, paths))
    assert len(names(directory)) == 20_000


LOCKS_OF_A_STRANGER = {
    "flock": lambda fd: fcntl.flock(fd, fcntl.LOCK_EX),
    "open file description lock": lambda fd: fcntl.fcntl(
        fd, fcntl.F_OFD_SETLK, lockfile.whole_file(fcntl.F_RDLCK)
    ),
    "lock of the process": lambda fd: fcntl.lockf(fd, fcntl.LOCK_SH),
}


@pytest.mark.parametrize("kind", LOCKS_OF_A_STRANGER)
def test_who_may_only_read_a_stale_lock_cannot_make_it_look_live(directory, kind):
    path = leave_stale_lock(directory)
    with path.open() as stranger:
        LOCKS_OF_A_STRANGER[kind](stranger.fileno())
        assert judged(directory, path) == ("STALE", None)


def test_its_owner_can_make_a_stale_lock_look_live(directory):
    path = leave_stale_lock(directory)
    with path.open("r+") as file:
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, lockfile.whole_file(fcntl.F_WRLCK))
        assert judged(directory, path) == ("LIVE", None)


LEASE = (
    "import fcntl, os, signal, sys\n"
    "signal.signal(signal.SIGIO, signal.SIG_IGN)\n"
    "fd = os.open(sys.argv[1], os.O_RDWR)\n"
    "fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)\n"
    "print(flush=True); sys.stdin.read()\n"
)


def test_lease_makes_nobody_wait(directory, start):
    # Opening a file under a lease waits for its holder, who has 45 seconds to give it back.
    paths = [leave_stale_lock(directory, number) for number in range(20)]
    for path in paths:
        start(path, script=LEASE)
    began = time.monotonic()
    told = attempt(directory)
    assert time.monotonic() - began < 10
    assert (told.state, told.reason) == ("UNKNOWN", "SYSTEM")
    assert told.detail == os.strerror(errno.EWOULDBLOCK)
    assert names(directory) == sorted(path.name for path in paths)


def at_open_of(path, first):
    """Make a hook that does something each time that a lock file is opened."""

    def hook(name, call):
        if name == "open" and call.args[0] == str(path):
            first()
        return call()

    return hook


def test_lease_that_is_given_back_soon(directory):
    """As an NFS server does with the delegation of a client that holds a lock."""
    path = leave_stale_lock(directory)
    tries = []

    def refuse():
        tries.append(path)
        if len(tries) <= 3:
            raise BlockingIOError(errno.EWOULDBLOCK, os.strerror(errno.EWOULDBLOCK))

    with intercepted(at_open_of(path, refuse)):
        assert judged(directory, path) == ("STALE", None)


def test_file_turns_into_a_link_while_it_is_looked_at(directory):
    path = leave_stale_lock(directory)
    aside = path.with_name("aside")

    def turn():
        path.rename(aside)
        path.symlink_to(aside.name)

    with intercepted(at_open_of(path, turn)):
        told = attempt(directory)
    assert (told.state, told.reason, told.path) == ("UNKNOWN", "SYSTEM", str(path))
    assert path.is_symlink()


def test_lock_on_another_host_is_gone_when_its_handle_is_stale(directory):
    """What a system call on a file says (ESTALE) that was removed by another client of NFS."""
    path = lock_path(directory, 7)
    path.write_bytes(b"%d" % os.getpid())

    def hook(name, call):
        if name in ("lstat", "open") and call.args[0] == str(path):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return call()

    with intercepted(hook):
        assert attempt(directory).state == "WON"


@needs_other_users
class TestOtherUsers:
    @pytest.mark.parametrize(("uid", "other"), [(0, SOME_USER), (SOME_USER, 0), (SOME_USER, 1)])
    def test_holder_with_a_private_umask(self, directory, uid, other):
        with process(directory, *run_as(uid), umask=0o077) as holder:
            for user in (other, uid):
                told = attempt_as(user, directory)
                assert (told.state, told.path, told.uid) == ("LIVE", holder.told.path, uid)
                assert told.pid == int(Path(told.path).read_text())
        assert attempt_as(other, directory).state == "WON"

    def test_unreadable_lock(self, directory):
        path = leave_stale_lock(directory)
        path.chmod(0o600)
        told = attempt_as(SOME_USER, directory)
        assert (told.state, told.reason, told.path) == ("UNKNOWN", "SYSTEM", str(path))
        assert told.detail == os.strerror(errno.EACCES)

    @pytest.mark.parametrize("maker", CONTENT)
    def test_stale_lock_that_may_not_be_removed(self, directory, maker):
        """It stops nobody, and each job that passes it is told."""
        path = leave_stale_lock(directory, maker=maker)
        unpublished = leave_stale_lock(directory, 1)
        unpublished = unpublished.rename(unpublished.with_name(f".{unpublished.name}"))
        told = attempt_as(SOME_USER, directory)
        assert told.state == "WON"
        (stale,) = told.stale
        assert (stale.path, stale.reason) == (str(path), "SYSTEM")
        assert names(directory) == sorted([path.name, unpublished.name])


@needs_mount_namespaces
class TestProc:
    """Where /proc does not show all, what is left of a job cannot be told."""

    def contend(self, directory, mount, *user):
        prefix = ["unshare", "--mount", "sh", "-c", f'mount -t {mount} /proc && exec "$@"', "-"]
        with process(directory, *prefix, *user) as contender:
            return contender.told

    def test_none(self, directory):
        assert self.contend(directory, "tmpfs none").state == "WON"
        path = leave_stale_lock(directory)
        told = self.contend(directory, "tmpfs none")
        assert (told.state, told.reason, told.path) == ("UNKNOWN", "NO_PROC", str(path))
        assert path.exists()

    @needs_other_users
    @pytest.mark.parametrize("hidepid", [1, 2])
    def test_without_the_processes_of_others(self, directory, hidepid):
        path = leave_stale_lock(directory)
        where = directory, f"proc -o hidepid={hidepid} proc", *run_as(SOME_USER)
        told = self.contend(*where)
        assert (told.state, told.reason, told.path) == ("UNKNOWN", "HIDDEN", str(path))
        # Their own they see.
        os.chown(path, SOME_USER, SOME_USER)
        assert self.contend(*where).state == "WON"
        # By its start that process could not be the holder, but this is not to be seen.
        path = leave_stale_lock(directory, maker="avocado-vt", pid=os.getpid())
        date_back(path, AGES)
        if hidepid == 2:
            assert self.contend(*where).state == "LIVE"
        assert attempt_as(SOME_USER, directory).state == "WON"


# As Docker drops them; newer kernels let also those with the other two read.
WITHOUT_PTRACE = ["setpriv", "--bounding-set=-sys_ptrace,-sys_admin,-perfmon"]


@needs_other_users
def test_root_that_may_not_read_environments(directory, start):
    """As in many containers: it cannot see the guests of others, and its own jobs have to go on."""
    others = start(prefix=run_as(SOME_USER))
    read = [*WITHOUT_PTRACE, "cat", f"/proc/{others.pid}/environ"]
    if subprocess.run(read, check=False, capture_output=True).returncode == 0:
        pytest.skip("here root may read environments in any case")
    path = leave_stale_lock(directory)
    os.chown(path, SOME_USER, SOME_USER)
    with process(directory, *WITHOUT_PTRACE) as contender:
        told = contender.told
        assert (told.state, told.reason, told.path) == ("UNKNOWN", "DENIED", str(path))
    os.chown(path, 0, 0)
    with process(directory, *WITHOUT_PTRACE) as contender:
        assert contender.told.state == "WON"


@needs_pid_namespaces
@pytest.mark.parametrize("namespace", [PID_NAMESPACE, PROC_OF_OUTSIDE], ids=["proc", "no proc"])
class TestPIDNamespaces:
    def test_live_holder_inside(self, directory, namespace):
        with process(directory, *namespace) as holder:
            told = attempt(directory)
            assert (told.state, told.path, told.pid) == ("LIVE", holder.told.path, 1)
        assert attempt(directory).state == "WON"

    def test_live_holder_outside(self, directory, new_lock, namespace):
        lock = new_lock()
        lock.acquire()
        with process(directory, *namespace) as contender:
            assert (contender.told.state, contender.told.path) == ("LIVE", lock.path)
        assert Path(lock.path).exists()

    @pytest.mark.parametrize("heir", ["inside", "outside"])
    def test_killed_holder_inside(self, directory, namespace, heir):
        """Its PID was 1, as is that of the contender inside; outside that is an older one."""
        with process(directory, *namespace) as holder:
            kill(holder)
        assert int((directory / names(directory)[0]).read_text()) == 1
        with process(directory, *(namespace if heir == "inside" else [])) as contender:
            assert contender.told.state == "WON"
            assert len(names(directory)) == 1

    def test_killed_holder_outside(self, directory, namespace):
        leave_stale_lock(directory, pid=1)
        with process(directory, *namespace) as contender:
            assert contender.told.state == "WON"
            assert len(names(directory)) == 1

    def test_proc_of_another_namespace_is_not_asked(self, directory, namespace):
        # By their start neither the process 1 inside nor the one outside could be the holder.
        path = leave_stale_lock(directory, maker="avocado-vt", pid=1)
        date_back(path, AGES)
        with process(directory, *namespace) as contender:
            expected = "WON" if namespace is PID_NAMESPACE else "LIVE"
            assert contender.told.state == expected


def test_start_of_a_process_by_another_clock(tmp_path, start):
    """What the lock derives from /proc is what ps(1) says."""
    pid = start().pid
    command = ["env", "LC_ALL=C", "ps", "-o", "lstart=", "-p", str(pid)]
    text = subprocess.check_output(command, text=True)
    started = time.mktime(time.strptime(text.strip()))
    (tmp_path / "file").touch()
    # ps rounds to seconds.
    for offset in (-2, 2):
        os.utime(tmp_path / "file", (0, started + offset - CLOCK_SLACK))
        status = os.stat(tmp_path / "file")
        assert processes.may_have_written(pid, status, has_it_open=False) == (offset > 0)


def test_job_of_a_lock():
    path = f"/some/where/{lockfile.PREFIX}{'ab' * 20}-1000-0000000z.pid"
    assert lockfile.LockFile(path).job_id == "ab" * 20
