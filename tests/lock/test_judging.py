"""What becomes of a lock file that a contender finds, by what it is and by who has
written it."""

import ctypes
import errno
import fcntl
import multiprocessing
import os
import signal
import stat
import subprocess
import time
from pathlib import Path

import needs
import pytest
from conftest import WAIT
from faults import intercepted
from needs import LONELY_USER, SOME_USER
from others import (
    AN_HOUR,
    CONTENT,
    attempt,
    attempt_as,
    card_path,
    leave_card,
    leave_lock,
    lock_path,
    names,
    process,
)
from sandbox import run_as

from avocado_vt_joblock import (
    card,
    kernellock,
    leftovers,
    lockfile,
    marks,
    procfs,
    scan,
)

# What proc_pid_stat(5) shows of it is to be read from the last parenthesis on.
ODD_NAME = f"open('/proc/self/comm', 'w').write('a) Z 0 ('); {WAIT}"
YEARS = 365 * 24 * AN_HOUR
OURS, ITS = CONTENT.values()
ALIVE = ("alive", "stopped", "odd")


def judged(directory, path):
    """Return the verdict on the only lock there; what is not stale stays untouched."""
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
        # Two clocks differ a little, and files can be dated in the future.
        (ITS, "alive", lockfile.CLOCK_SLACK / 2, "LIVE"),
        (ITS, "alive", -AN_HOUR, "LIVE"),
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


NO_PID = [
    *(b"", b"\0" * 10, b"secret", b"-1", b"0", b"+1", b"1_0", b"12 13", b"\xff\xfe"),
    *(b"1" * 30, b"%d" % 2**31, "٣".encode(), b"123\n" + b" " * 100 + b"4"),
]
NO_REGULAR_FILE = {
    "fifo": os.mkfifo,
    "socket": lambda path: os.mknod(path, stat.S_IFSOCK | 0o600),
    "device": lambda path: os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3)),
    "directory": os.mkdir,
    "dangling link": lambda path: path.symlink_to("/nonexistent"),
    "loop": lambda path: path.symlink_to(path.name),
    "link": lambda path: path.symlink_to(
        leave_lock(path.parent.parent, 1, pid=os.getpid())
    ),
}


@pytest.mark.parametrize("content", NO_PID)
def test_content_that_no_job_has_written(directory, content):
    path = leave_lock(directory, content=content, age=YEARS)
    assert judged(directory, path) == ("UNKNOWN", "NO_PID")


@pytest.mark.parametrize("kind", NO_REGULAR_FILE)
def test_what_no_job_has_made(directory, kind):
    if kind == "device" and os.getuid() != 0:
        pytest.skip("only root can make one")
    path = lock_path(directory, 7)
    NO_REGULAR_FILE[kind](path)
    os.utime(path, (0, 0), follow_symlinks=False)
    assert judged(directory, path) == ("UNKNOWN", "NO_REGULAR_FILE")


def test_names_that_only_resemble_a_lock(directory):
    name = lock_path(directory, 7).name
    resembling = [
        *(f"{name}.bak", f"{name}\n", f"x{name}", f"..{name}", name.upper()),
        *("\udcff", f"{name}\udcff"),
        *(
            name.replace(f"-{os.getuid()}-", "--"),
            name.replace("-00000007", "-٠٠٠٠٠٠٠٧"),
        ),
    ]
    for other in resembling:
        (directory / other).write_bytes(b"%d" % os.getpid())
    assert attempt(directory).state == "WON"
    assert names(directory) == sorted(resembling)


def test_which_is_told_of_several(directory, monkeypatch):
    """Whoever waits for a live one would be stopped in the end by one that nobody can
    judge."""
    # No look is complete.
    monkeypatch.setattr(scan, "SETTLE_TIMEOUT", 0)
    contents = {"NOT_NOW": OURS, "LIVE": b"%d" % os.getpid(), "UNKNOWN": b""}
    for number, (state, content) in enumerate(contents.items()):
        path = leave_lock(directory, number, content, age=0)
        told = attempt(directory)
        assert (told.state, told.path) == (state, str(path))


def test_job_inside_of_a_job_is_told_so_before_all_else(directory, held):
    leave_lock(directory, content=b"")
    inherited = {marks.VARIABLE: os.path.basename(held.path)}
    with process(directory, env={**os.environ, **inherited}) as nested:
        assert (nested.told.state, nested.told.path) == ("OUTER", held.path)


def test_attempt_that_fails_removes_nothing(directory, start):
    """Only who gets the lock removes stale ones: what it removes, it tells of. Who is
    refused anyway does not look at the processes."""
    stale = [leave_lock(directory, number) for number in (1, 2)]
    ended = leave_lock(directory, 3)
    live = leave_lock(directory, 4, ITS, pid=os.getpid(), age=0)
    guest = start(env={marks.VARIABLE: ended.name})
    calls = []

    def told():
        calls.clear()
        with intercepted(lambda name, call: calls.append((name, *call.args)) or call()):
            return attempt(directory)

    before = names(directory)
    assert told().path == str(live)
    assert ("listdir", "/proc") not in calls
    assert names(directory) == before
    live.unlink()
    before.remove(live.name)
    assert told().path == str(ended)
    assert ("listdir", "/proc") in calls
    assert names(directory) == before
    guest.kill()
    guest.wait()
    assert {file.path for file in told().stale} == set(map(str, [*stale, ended]))
    assert names(directory) == []


def test_many(directory):
    for number in range(20_000):
        os.close(os.open(directory / f"unrelated-{number}", os.O_CREAT))
    contents = [OURS, ITS] * 500
    paths = [leave_lock(directory, *numbered) for numbered in enumerate(contents)]
    began = time.monotonic()
    assert {file.path for file in attempt(directory).stale} == set(map(str, paths))
    assert time.monotonic() - began < 20
    assert len(names(directory)) == 20_000


def test_only_its_owner_can_make_a_stale_lock_look_live(directory):
    read_lock = kernellock._struct_flock(fcntl.F_RDLCK)
    for take in (
        lambda file: fcntl.flock(file, fcntl.LOCK_EX),
        lambda file: fcntl.lockf(file, fcntl.LOCK_SH),
        lambda file: fcntl.fcntl(file, kernellock._SETLK, read_lock),
    ):
        path = leave_lock(directory)
        with path.open() as stranger:
            take(stranger)
            assert judged(directory, path) == ("STALE", None)
    path = leave_lock(directory)
    with path.open("r+") as owner:
        kernellock.take(owner.fileno())
        assert judged(directory, path) == ("LIVE", None)


def test_leases_make_nobody_wait(directory, start):
    """Who opens a file under a lease waits for its holder, who has 45 seconds to give
    it back."""
    script = f"""
import fcntl, os, signal, sys
signal.signal(signal.SIGIO, signal.SIG_IGN)
for path in sys.argv[1:]:
    fcntl.fcntl(os.open(path, os.O_RDWR), fcntl.F_SETLEASE, fcntl.F_WRLCK)
{WAIT}"""
    paths = [leave_lock(directory, number) for number in range(10)]
    start(*paths, script=script)
    began = time.monotonic()
    told = attempt(directory)
    assert time.monotonic() - began < 8
    # It may pass by itself.
    assert (told.state, told.reason) == ("NOT_NOW", "LEASED")
    assert len(names(directory)) == 10


@pytest.mark.parametrize(
    ("code", "times", "state", "stays"),
    [
        # An NFS server takes a delegation back.
        (errno.EWOULDBLOCK, 3, "WON", False),
        # Its other client has removed the file.
        (errno.ESTALE, 1, "WON", True),
        # It is a link now.
        (errno.ELOOP, 1, "UNKNOWN", True),
    ],
)
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


def test_holder_is_here_though_the_clock_went_forward(directory):
    """By its date the file is older than the process, which has it open, however."""
    with process(directory) as holder:
        an_hour_ago = (time.time() - AN_HOUR,) * 2
        os.utime(holder.told.path, an_hour_ago)
        # A card would tell exactly which process it is.
        card_path(Path(holder.told.path)).unlink()
        told = attempt(directory)
        assert (told.state, told.path) == ("LIVE", holder.told.path)
        assert (told.pid, told.pid_may_be_here) == (holder.pid, True)


@needs.needs_other_users
@pytest.mark.parametrize(
    ("uid", "other"), [(0, SOME_USER), (SOME_USER, 0), (SOME_USER, 1)]
)
def test_holder_of_another_user_with_a_private_umask(directory, uid, other):
    with process(directory, *run_as(uid), umask=0o077) as holder:
        for user in (other, uid):
            told = attempt_as(user, directory)
            assert (told.state, told.path) == ("LIVE", holder.told.path)
            assert told.uid == uid
    assert attempt_as(other, directory).state == "WON"


@needs.needs_other_users
@pytest.mark.parametrize("mode", [0o1777, 0o777], ids=["sticky", "not sticky"])
def test_stale_lock_of_another_user(directory, mode):
    """It stops nobody, and each job is told of it. It stays even where anybody may
    remove it: only its owner and root see whether a guest is left."""
    directory.chmod(mode)
    path = leave_lock(directory)
    left = [path, leave_card(path)]
    for _ in range(2):
        (stale,) = attempt_as(SOME_USER, directory).stale
        assert (stale.path, stale.leftovers.obstacle) == (
            str(path),
            leftovers.Obstacle.GUESTS_OF_OTHERS,
        )
        assert sorted(directory.iterdir()) == sorted(left)
    assert attempt(directory).stale[0].leftovers.obstacle is None
    assert list(directory.iterdir()) == []


@needs.needs_other_users
def test_lock_of_another_user_that_cannot_be_read(directory):
    path = leave_lock(directory)
    path.chmod(0o600)
    told = attempt_as(SOME_USER, directory)
    assert (told.state, told.reason) == ("UNKNOWN", "SYSTEM")
    assert told.detail == os.strerror(errno.EACCES)
    assert names(directory) == [path.name]


def told_to(directory, *prefix):
    """Return the verdict that a contender reaches elsewhere."""
    with process(directory, *prefix) as contender:
        told = contender.told
        return told.state, getattr(told, "reason", None)


def test_very_many_lock_files_do_not_cost_a_look_each(directory, held, monkeypatch):
    """After a while nobody asks which process has a file without a card open."""
    card.remove(held.path)
    asked = []
    monkeypatch.setattr(procfs, "has_open", lambda *words: asked.append(words) or True)
    assert attempt(directory).state == "LIVE"
    assert asked.pop() == (os.getpid(), Path(held.path).name)
    monkeypatch.setattr(lockfile, "OPEN_TIMEOUT", -1)
    assert attempt(directory).state == "LIVE"
    assert not asked


@needs.needs_mount_namespaces
def test_no_proc(directory):
    script = 'mount -t tmpfs none /proc && exec "$@"'
    without_proc = ["unshare", "--mount", "sh", "-c", script, "-"]
    assert told_to(directory, *without_proc) == ("WON", None)
    leave_lock(directory)
    assert told_to(directory, *without_proc) == ("UNKNOWN", "NO_PROC")


INSIDE = needs.PID_NAMESPACE
# Where /proc still shows the PID namespace outside.
NO_PROC = [word for word in INSIDE if word != "--mount-proc"]
# In these words a PID namespace has a process 1 of its own, of root.
INIT = [*INSIDE, "sh", "-c", '"$@"; :', "-"]


@needs.needs_pid_namespaces
@needs.needs_other_users
@pytest.mark.parametrize("hidepid", [1, 2])
def test_proc_that_hides_the_processes_of_others(directory, hidepid):
    script = f'mount -o remount,hidepid={hidepid} /proc && {{ "$@"; :; }}'
    hides = [*INSIDE, "sh", "-c", script, "-"]
    user = [*hides, *run_as(SOME_USER)]
    # By its start the process 1 could not be the holder, but this is not to be seen.
    path = leave_lock(directory, content="avocado-vt", pid=1, age=10 * YEARS)
    assert told_to(directory, *INIT, *run_as(SOME_USER))[0] == "WON"
    assert told_to(directory, *user) == ("LIVE", None)
    path.write_bytes(OURS % 1)
    assert told_to(directory, *user) == ("UNKNOWN", "HIDDEN")
    # Their own they see.
    os.chown(path, SOME_USER, SOME_USER)
    root = [*hides, "setpriv", "--bounding-set=-sys_ptrace"]
    assert told_to(directory, *root) == ("UNKNOWN", "HIDDEN")
    assert told_to(directory, *user) == ("WON", None)


@needs.needs_pid_namespaces
@needs.needs_other_users
def test_proc_that_hides_nothing_where_only_one_user_has_processes(directory):
    """That no other's process is to be seen is no sign that one is hidden."""
    leave_lock(directory)
    one_user = [*INSIDE, *run_as(SOME_USER)]
    listing = [*one_user, "ps", "-A", "-o", "euid="]
    seen = subprocess.run(listing, check=True, capture_output=True, text=True).stdout
    assert set(seen.split()) == {str(SOME_USER)}
    assert told_to(directory, *one_user) == ("WON", None)


PAIRS = [(INSIDE, []), ([], INSIDE), (NO_PROC, []), ([], NO_PROC)]
# There its PID is 1, which here is another process: the contender, or a shell.
PAIRS += [(INSIDE, INSIDE), (INSIDE, INIT)]


@needs.needs_pid_namespaces
@pytest.mark.parametrize(("holder", "heir"), PAIRS)
def test_holder_in_another_pid_namespace(directory, holder, heir):
    with process(directory, *holder) as first:
        with process(directory, *heir) as second:
            assert (second.told.state, second.told.path) == ("LIVE", first.told.path)
            assert not second.told.pid_may_be_here
        # Without its card it is the same, but for a /proc of another namespace.
        card_path(Path(first.told.path)).unlink()
        with process(directory, *heir) as second:
            assert (second.told.state, second.told.path) == ("LIVE", first.told.path)
            assert not (heir and second.told.pid_may_be_here)
        first.kill()
        first.stdout.read()
    # Its PID is somebody else's, which is an older process; inside that of the heir.
    for namespace in (heir, holder):
        leave_lock(directory, pid=1)
        assert told_to(directory, *namespace) == ("WON", None)
        assert names(directory) == []


@needs.needs_pid_namespaces
def test_proc_of_another_namespace_is_not_asked(directory):
    """By their start neither the process 1 inside nor the one outside could be the
    holder."""
    leave_lock(directory, content="avocado-vt", pid=1, age=10 * YEARS)
    assert told_to(directory, *NO_PROC) == ("LIVE", None)
    assert told_to(directory, *INSIDE) == ("WON", None)


def enter_user_namespace(uid, uid_map):
    """Be root of a user namespace that has been made by a user."""
    line = f"read go; echo '{uid_map}' > /proc/{os.getpid()}/uid_map"
    # Who is outside may map whom it wants.
    outside = subprocess.Popen(["sh", "-c", line], stdin=subprocess.PIPE)
    os.setuid(uid)
    clone_newuser = 0x10000000
    assert ctypes.CDLL(None).unshare(clone_newuser) == 0
    outside.communicate(b"go\n")
    assert outside.returncode == 0
    assert os.getuid() == 0


@needs.needs_user_namespaces
@needs.needs_other_users
@pytest.mark.parametrize(
    ("uid", "uid_map"),
    [(LONELY_USER, f"0 {LONELY_USER} 1"), (0, "0 0 1"), (0, "0 0 4294967295")],
    ids=["of a user", "of root", "of root, with all users"],
)
def test_user_namespace_that_hides_the_guest_of_a_killed_job(
    directory, start, uid, uid_map
):
    """As in a toolbox: the guest is seen, and not whose it is. Who is not in there sees
    both."""
    path = leave_lock(directory)
    os.chown(path, uid, uid)
    user = ["setpriv", f"--reuid={uid}", "--clear-groups"]
    guest = start(
        command=[*user, "sh", "-c", "echo; read line"],
        env={marks.VARIABLE: path.name},
    )
    guest.stdout.readline()
    fork = multiprocessing.get_context("fork")
    with fork.Pool(1, enter_user_namespace, (uid, uid_map)) as pool:
        told = pool.apply(attempt, (directory,))
    assert (told.state, told.reason) == ("UNKNOWN", "DENIED")
    assert names(directory) == [path.name]
    told = attempt_as(uid, directory)
    assert (told.state, told.pids) == ("LIVE", {guest.pid})
    guest.kill()
    guest.wait()
    assert attempt_as(uid, directory).state == "WON"
    assert names(directory) == []
