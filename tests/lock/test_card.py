"""The card beside a lock file: on which host a job runs, and as which process."""

import errno
import fcntl
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import needs
import pytest
from conftest import WAIT
from faults import intercepted
from needs import LONELY_USER, SOME_USER, needs_pid_namespaces, needs_root
from others import (
    AN_HOUR,
    attempt,
    card_path,
    cards,
    contend,
    job_id,
    leave_card,
    leave_lock,
    lock_path,
    names,
    process,
)
from sandbox import run_as, wait_for

from avocado_vt_joblock import card, kernellock, lock, lockdir, lockfile, marks, procfs

JOB_ID = job_id(0xDEAD)
ANOTHER_HOST = {"host": "hv7.lab", "boot": "0badb007"}
LAST_BOOT = {"boot": "0badb007"}
BLANK = b""
FIRST, LAST = 0, 0xFFFFFFFF  # of all names
#: How avocado-vt writes the file of a job that lives.
LIVE_OF_AVOCADO_VT = b"%d" % os.getpid()
MARK = {marks.VARIABLE: lock_path(Path(), 0xDEAD).name}


@pytest.fixture
def path(directory):
    return leave_lock(directory)


@pytest.fixture
def calls():
    """Note what the package calls: names, and the paths that it hands over."""
    noted = []

    def hook(name, call):
        noted.append((name, *map(str, call.args)))
        return call()

    with intercepted(hook):
        yield noted


def end(popen):
    """Kill a process; it stays as a zombie until it is reaped."""
    popen.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, popen.pid, os.WEXITED | os.WNOWAIT)


def start_of(popen):
    return {"pid": popen.pid, "started": procfs.read_stat(popen.pid).started}


def test_what_a_job_writes(directory, held):
    link = card_path(Path(held.path))
    boot = Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
    namespace = os.stat("/proc/self/ns/pid").st_ino
    started = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
    where = f"{os.uname().nodename} {boot} {namespace} {os.getpid()}"
    assert os.readlink(link) == f"{where} {started}"
    held.hand_over()
    assert os.readlink(link) == f"{where} -{started}"
    assert attempt(directory).state == "WON"
    assert os.listdir(directory) == []


def test_card_is_renewed_and_keeps_when_the_job_came(directory):
    path = lock_path(directory, 1)
    card.make(str(path))
    first = card.read(str(path))
    time.sleep(0.05)
    card.make(str(path))
    second = card.read(str(path))
    assert first.came == first.renewed < second.renewed
    # Less than two jobs can be apart that do not come at once.
    assert first.came - 1e-5 < second.came <= first.came
    card.remove(str(path))


def test_card_of_a_job_that_could_not_remove_its_file(directory, held, new_lock):
    """It was handed over. The job has the lock later all the same."""
    made = new_lock()

    def hook(name, call):
        if name == "unlink" and call.args[0] == made.path:
            raise OSError(errno.EIO, "no")
        return call()

    with intercepted(hook):
        assert contend(made, waits=True).state == "LIVE"
    first = card.read(made.path)
    assert first.is_handed_over
    held.release()
    assert contend(made, waits=True).state == "WON"
    second = card.read(made.path)
    assert second.writer_lives
    assert second.came == first.came


# A job of another host.

WHAT_LIES_THERE = {
    "file": lambda path: None,
    "blank file": lambda path: path.write_bytes(BLANK),
    "live file": lambda path: path.write_bytes(LIVE_OF_AVOCADO_VT),
    "directory": lambda path: (path.unlink(), path.mkdir()),
    "FIFO": lambda path: (path.unlink(), os.mkfifo(path)),
}


@pytest.mark.parametrize("what", WHAT_LIES_THERE)
def test_lock_of_another_host_is_live_and_not_touched(directory, calls, what):
    """It might hang as long as that host is silent, or be taken from it."""
    path = leave_lock(directory, FIRST)
    WHAT_LIES_THERE[what](path)
    link = leave_card(path, **ANOTHER_HOST, pid=4242)
    calls.clear()
    told = attempt(directory)
    assert (told.state, told.path, told.reason) == ("LIVE", str(path), None)
    assert (told.pid, told.pid_may_be_here) == (4242, False)
    assert (told.uid, told.since) == (os.getuid(), link.lstat().st_mtime)
    assert [call for call in calls if str(path) in call] == []
    assert ("listdir", "/proc") not in calls
    link.unlink()


@needs_root
def test_lock_of_another_host_is_of_the_owner_of_its_card(directory):
    path = leave_lock(directory, FIRST)
    leave_card(path, uid=SOME_USER, **ANOTHER_HOST)
    told = attempt(directory)
    assert (told.state, told.uid) == ("LIVE", SOME_USER)


PROC_WITH_PROCESSES_ONLY = [
    *("unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c"),
    *('mount -t proc -o subset=pid proc /proc && exec "$@"', "-"),
]
needs_proc_with_processes_only = pytest.mark.skipif(
    not needs._works(*PROC_WITH_PROCESSES_ONLY, "true"),
    reason="no mount of /proc with subset=pid here",
)


@pytest.mark.parametrize("code", [errno.ENOENT, errno.EACCES, errno.EIO])
def test_who_does_not_know_its_own_host_takes_no_lock(
    directory, path, monkeypatch, code
):
    """It cannot tell a job of another host from one of here that has ended."""
    link = leave_card(path, **ANOTHER_HOST)

    def fail():
        raise OSError(code, os.strerror(code), "/proc/sys/kernel/random/boot_id")

    monkeypatch.setattr(card, "own_identity", fail)
    told = attempt(directory)
    assert (told.state, getattr(told, "path", None)) == ("UNKNOWN", str(path))
    assert sorted(directory.iterdir()) == sorted([path, link])


@needs_proc_with_processes_only
def test_proc_that_shows_processes_only(directory, path):
    """As some services have it: there nobody knows the boot of the host."""
    link = leave_card(path, **ANOTHER_HOST)
    with process(directory, *PROC_WITH_PROCESSES_ONLY) as contender:
        told = contender.told
    assert (told.state, getattr(told, "path", None)) == ("UNKNOWN", str(path))
    assert sorted(directory.iterdir()) == sorted([path, link])


@needs_proc_with_processes_only
def test_held_lock_beside_a_proc_that_shows_processes_only(directory, held):
    with process(directory, *PROC_WITH_PROCESSES_ONLY) as contender:
        assert contender.told.state in ("LIVE", "UNKNOWN")
    assert names(directory) == [Path(held.path).name]


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES])
def test_card_that_the_system_does_not_show_is_not_taken_for_none(
    directory, path, code
):
    """It may be of another host, where the job runs."""
    link = leave_card(path, **ANOTHER_HOST)

    def hook(name, call):
        if name == "readlink" and call.args == (str(link),):
            raise OSError(code, os.strerror(code))
        return call()

    with intercepted(hook):
        told = attempt(directory)
    assert (told.state, told.reason) == ("UNKNOWN", "SYSTEM")
    assert told.detail == os.strerror(code)
    assert sorted(directory.iterdir()) == sorted([path, link])


# The same host, before it was booted.


@pytest.mark.parametrize(
    "content",
    ["this package", LIVE_OF_AVOCADO_VT, BLANK],
    ids=["this package", "avocado-vt", "blank"],
)
def test_lock_of_the_last_boot_is_stale_without_a_look(directory, calls, content):
    """After a power cut the file may be blank, but the link survives."""
    path = leave_lock(directory, content=content, age=0)
    leave_card(path, **LAST_BOOT)
    told = attempt(directory)
    assert [file.path for file in told.stale] == [str(path)]
    assert ("listdir", "/proc") not in calls
    assert os.listdir(directory) == []


def test_lock_of_the_last_boot_whose_kernel_lock_is_held(directory, path):
    """Hosts of one name share the directory, for example."""
    leave_card(path, **LAST_BOOT)
    with path.open("r+") as file:
        kernellock.take(file.fileno())
        assert attempt(directory).state == "LIVE"
    assert attempt(directory).state == "WON"


# The same boot.


def test_job_that_lives_without_its_kernel_lock(directory, start):
    """Code in its process has closed what it has not opened."""
    holder = start(
        directory,
        JOB_ID,
        script=f"""
import os, sys
from avocado_vt_joblock import lock
made = lock.JobLock(*sys.argv[1:])
made.acquire()
os.closerange(3, 100)
{WAIT}""",
    )
    told = attempt(directory)
    assert (told.state, told.pid, told.pid_may_be_here) == ("LIVE", holder.pid, True)
    assert told.processes == []
    end(holder)
    assert attempt(directory).state == "WON"
    assert os.listdir(directory) == []


@pytest.mark.parametrize("content", ["this package", "avocado-vt", BLANK])
def test_process_that_the_card_names(directory, start, content):
    path = leave_lock(directory, content=content)
    other = start()
    leave_card(path, **start_of(other))
    assert attempt(directory).state == "LIVE"
    end(other)
    told = attempt(directory)
    assert told.state == ("UNKNOWN" if content == BLANK else "WON")


@pytest.mark.parametrize("later", [-1, 1])
def test_pid_that_is_used_again(directory, path, start, later):
    fields = start_of(start())
    fields["started"] += later
    leave_card(path, **fields)
    assert attempt(directory).state == "WON"


def test_pid_of_another_namespace(directory, path, start):
    leave_card(path, **start_of(start()), pid_namespace=1)
    (stale,) = attempt(directory).stale
    assert not stale.pid_may_be_here


@needs_root
@pytest.mark.parametrize("name", ["elsewhere", "of two words"])
def test_container_that_has_another_host_name(directory, name):
    """It has the boot of its host, where its processes are seen."""
    rename = 'printf "$0" > /proc/sys/kernel/hostname; exec "$@"'
    with process(directory, "unshare", "--uts", "sh", "-c", rename, name) as holder:
        told = attempt(directory)
        assert (told.state, told.pid, told.pid_may_be_here) == (
            "LIVE",
            holder.pid,
            True,
        )
        assert told.card.identity.host == name.replace(" ", "_")
        holder.kill()
        holder.wait()
        assert attempt(directory).state == "WON"


@needs_pid_namespaces
def test_process_of_this_pid_in_a_container(directory, path):
    """Its /proc shows other processes: nobody there is taken for the holder."""
    leave_card(path, pid=1, started=procfs.read_stat(1).started)
    assert attempt(directory).state == "LIVE"
    inside = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    with process(directory, *inside) as contender:
        assert contender.told.state == "WON"


LEAVES_ITS_FILE = f"""
import subprocess, sys
from avocado_vt_joblock import lock
made = lock.JobLock(*sys.argv[1:])
made.acquire()
guest = subprocess.Popen(["sleep", "1000"])
made.hand_over()
print(guest.pid, flush=True)
sys.stdin.readline()
guest.kill()
guest.wait()
print(flush=True)
{WAIT}"""


def test_job_that_has_left_its_file(directory, start):
    """The lock is live as long as something of it runs; its own process does not
    count."""
    # start() reads its first line.
    job = start(directory, JOB_ID, script=f"print(flush=True)\n{LEAVES_ITS_FILE}")
    guest = int(job.stdout.readline())
    told = attempt(directory)
    assert (told.state, told.pids) == ("LIVE", {guest})
    job.stdin.write(b"\n")
    job.stdin.flush()
    job.stdout.readline()
    assert attempt(directory).state == "WON"
    assert job.poll() is None
    assert os.listdir(directory) == []


# Who has made the card.


@needs_root
@pytest.mark.parametrize(
    ("content", "fields", "told"),
    [
        ("this package", LAST_BOOT, ("WON", None)),
        (BLANK, LAST_BOOT, ("UNKNOWN", "NO_PID")),
        (LIVE_OF_AVOCADO_VT, LAST_BOOT, ("LIVE", None)),
        (LIVE_OF_AVOCADO_VT, {"pid_namespace": 1}, ("LIVE", None)),
        (LIVE_OF_AVOCADO_VT, {"started": 1}, ("LIVE", None)),
    ],
    ids=["boot", "blank", "avocado-vt", "namespace", "start"],
)
def test_card_of_a_stranger_frees_no_lock(directory, content, fields, told):
    path = leave_lock(directory, content=content, age=0)
    leave_card(path, uid=SOME_USER, **fields)
    seen = attempt(directory)
    assert (seen.state, getattr(seen, "reason", None)) == told
    # Of the owner it would.
    if seen.state != "WON" and fields is LAST_BOOT:
        leave_card(path, **fields)
        assert attempt(directory).state == "WON"


@needs_root
def test_card_of_a_stranger_frees_no_lock_of_a_job_whose_guest_runs(
    directory, path, start
):
    guest = start(env=MARK)
    leave_card(path, uid=SOME_USER, **LAST_BOOT)
    assert attempt(directory).pids == {guest.pid}


@pytest.mark.parametrize(
    ("fields", "state"), [({}, "LIVE"), ({"pid_namespace": 1}, "WON")]
)
def test_card_without_a_start_time(directory, fields, state):
    """That is unknown. What has this PID here may be the job, if it can be."""
    path = leave_lock(directory, content=LIVE_OF_AVOCADO_VT, age=0)
    leave_card(path, pid=os.getpid(), started="-", **fields)
    assert attempt(directory).state == state


@needs_root
def test_hard_link_of_anothers_card_frees_no_lock(directory):
    """Where fs.protected_hardlinks is 0 anybody can make one."""
    path = leave_lock(directory, content=LIVE_OF_AVOCADO_VT, age=0)
    dead = leave_card(lock_path(directory, FIRST), **LAST_BOOT)
    os.link(dead, card_path(path), follow_symlinks=False)
    assert attempt(directory).state == "LIVE"
    dead.unlink()
    assert attempt(directory).state == "WON"


@needs_root
def test_card_of_a_stranger_may_stop_a_job(directory, path, start):
    """Any file with the name of a lock may."""
    leave_card(path, uid=SOME_USER, **start_of(start()))
    assert attempt(directory).state == "LIVE"


def test_what_started_before_the_job_is_not_read(directory, path, start, calls):
    older = start(env=MARK)
    its_start = start_of(older)["started"]
    place = ("stat", f"/proc/{older.pid}")
    for started, is_of_job in ((its_start, True), (its_start + 1, False)):
        leave_card(path, started=started)
        calls.clear()
        told = attempt(directory)
        assert told.state == ("LIVE" if is_of_job else "WON")
        assert (place in calls) == is_of_job
    # Without a card it may be of the job.
    leave_lock(directory)
    assert attempt(directory).pids == {older.pid}


@pytest.mark.parametrize("offset", [5, 24 * AN_HOUR])
def test_start_that_is_later_than_its_card_is_not_believed(
    directory, path, start, offset
):
    """In a time namespace the same moment has other ticks."""
    leave_card(path, started=procfs.ticks_ago(-offset))
    guest = start(env=MARK)
    told = attempt(directory)
    assert (told.state, getattr(told, "pids", None)) == ("LIVE", {guest.pid})


STARTS_A_GUEST = f"""
import os, subprocess, sys
from avocado_vt_joblock import lock
made = lock.JobLock(*sys.argv[1:])
made.acquire()
guest = subprocess.Popen(["sleep", "1000"])
print(flush=True)
print(os.getpid(), guest.pid, flush=True)
{WAIT}"""
IN_TIME_NAMESPACE = ["unshare", "--time", "--fork", "--boottime"]


@pytest.mark.skipif(
    not needs._works(*IN_TIME_NAMESPACE, "5", "true"), reason="no time namespaces here"
)
@pytest.mark.parametrize("offset", ["5", "-5", "86400"])
@pytest.mark.parametrize("who", ["job", "next job", "both"])
def test_guest_of_a_killed_job_in_a_time_namespace(directory, start, offset, who):
    namespace = [*IN_TIME_NAMESPACE, offset]
    of_job = namespace if who != "next job" else []
    of_next = namespace if who != "job" else []
    job = start(directory, JOB_ID, script=STARTS_A_GUEST, prefix=of_job)
    pid, guest = map(int, job.stdout.readline().split())
    with process(directory, *of_next) as contender:
        assert (contender.told.state, contender.told.pid) == ("LIVE", pid)
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: job.poll() is not None)
    with process(directory, *of_next) as contender:
        told = contender.told
        assert (told.state, getattr(told, "pids", None)) == ("LIVE", {guest})
    os.kill(guest, signal.SIGKILL)
    wait_for(lambda: attempt(directory).state == "WON")


@needs_root
def test_stranger_cannot_hide_what_a_job_has_started(directory, path, start):
    older = start(env=MARK)
    leave_card(path, uid=SOME_USER, started=start_of(older)["started"] + 1)
    assert attempt(directory).pids == {older.pid}


# What is no card.

GARBAGE = [
    "/etc/passwd",
    "hv3.lab",
    "hv3.lab 1a2b3c4d 4026531836 4242",
    "hv3.lab 1a2b3c4d 4026531836 4242 812345 1",
    "hv3.lab 1a2b3c4d 4026531836 4242 812345\n",
    "hv3.lab 1a2b3c4d 4026531836 -4242 812345",
    "hv3.lab 1a2b3c4d 4026531836 4242 --812345",
    "hv3.lab 1a2b3c4d 4026531836 4242 \u0663",
    "hv3.lab 1a2b3c4d5 4026531836 4242 812345",
    "  1a2b3c4d 4026531836 4242 812345",
    f"hv3.lab 1a2b3c4d 4026531836 4242 {'1' * 4000}",
    f"{'h' * 300} 1a2b3c4d 4026531836 4242 812345",
    "\udcff\udcfe",
]


@pytest.mark.parametrize("text", GARBAGE)
def test_garbage_is_no_card(directory, text):
    path = leave_lock(directory, content=LIVE_OF_AVOCADO_VT, age=0)
    leave_card(path, text)
    told = attempt(directory)
    assert (told.state, told.card) == ("LIVE", None)
    leave_lock(directory)
    assert attempt(directory).state == "WON"
    assert os.listdir(directory) == []


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch, os.mkfifo])
def test_what_only_has_the_name_of_a_card(directory, path, make):
    make(card_path(path))
    assert attempt(directory).state == "WON"
    # What is a file goes with the lock.
    if make is Path.mkdir:
        card_path(path).rmdir()
    assert os.listdir(directory) == []


@pytest.mark.parametrize("error", [FileNotFoundError(2, ""), OSError(116, "ESTALE")])
def test_card_that_goes_while_it_is_read(directory, path, error):
    link = leave_card(path, **ANOTHER_HOST)

    def hook(name, call):
        if name == "lstat" and call.args == (str(link),):
            link.unlink()
            path.unlink()
            raise error
        return call()

    with intercepted(hook):
        assert attempt(directory).state == "WON"


def test_file_system_without_links(directory, start, new_lock):
    """All is as without a card."""

    def hook(name, call):
        if name == "symlink":
            raise PermissionError(1, "no links here")
        return call()

    made = new_lock()
    with intercepted(hook):
        for how in (made.release, made.hand_over):
            made.acquire()
            assert cards(directory) == []
            told = attempt(directory)
            assert (told.state, told.pid, told.card) == ("LIVE", os.getpid(), None)
            how()
        assert attempt(directory).state == "WON"
    assert os.listdir(directory) == []


# Tickets: who waits, and came before.


@pytest.fixture
def ticket(directory, monkeypatch):
    """Have a job of another host wait that came an hour ago; return its ticket.

    It renews that at each attempt, which here is for the whole test.
    """
    monkeypatch.setattr(lockdir, "TICKET_TIMEOUT", AN_HOUR / 2)
    link = leave_card(lock_path(directory, FIRST), **ANOTHER_HOST)
    os.utime(link, (time.time() - AN_HOUR,) * 2, follow_symlinks=False)
    yield link
    link.unlink(missing_ok=True)


@pytest.mark.parametrize("waits", [False, True])
def test_stale_lock_that_only_a_later_job_can_judge(
    directory, path, ticket, new_lock, waits
):
    """For the job that came first it is live for ever. So the later one removes it,
    says so, and lets the first one have its turn."""
    leave_card(path)
    later = new_lock()
    with pytest.raises(lock.LockInTheWayError) as refused:
        later.acquire(waits=waits)
    assert (refused.value.file, refused.value.jobs_before) == (None, 1)
    (removed,) = refused.value.stale
    assert (removed.path, removed.not_removed) == (str(path), "")
    assert names(directory) == sorted(cards(directory))
    assert (card_path(Path(later.path)).name in cards(directory)) == waits
    assert not later.is_held
    # There is nothing left to do for it but to wait.
    with pytest.raises(lock.LockInTheWayError) as refused:
        later.acquire(waits=waits)
    assert (refused.value.jobs_before, refused.value.stale) == (1, [])
    ticket.unlink()
    assert later.acquire(waits=waits) == []


def test_job_that_came_later_makes_no_attempt(directory, ticket, new_lock, calls):
    """By its file it would refuse the one whose turn it is."""
    later = new_lock()
    for _ in range(2):
        told = contend(later, waits=True)
        assert (told.state, told.jobs_before) == ("NOT_YET", 1)
    assert "fchmod" not in {name for name, *_ in calls}
    later.abandon()


MAKES_A_TICKET = f"""
import sys, time
from avocado_vt_joblock import card
card.make(sys.argv[1])
time.sleep(0.05)
card.make(sys.argv[1])
{WAIT}"""


@pytest.mark.parametrize("waits", [False, True])
def test_ticket_of_a_job_that_was_killed(
    directory, start, new_lock, monkeypatch, waits
):
    """On its own host that is known at once; nobody waits until it is old."""
    monkeypatch.setattr(lockdir, "TICKET_TIMEOUT", AN_HOUR)
    path = lock_path(directory, FIRST)
    first = start(path, script=MAKES_A_TICKET)
    made = new_lock()
    told = contend(made, waits=waits)
    assert (told.state, told.jobs_before) == ("NOT_YET", 1)
    end(first)
    assert contend(made, waits=waits).state == "WON"
    card.remove(str(path))


KEEPS_A_TICKET = """
import os, sys, time
from avocado_vt_joblock import card
card.make(sys.argv[1])
time.sleep(0.05)
card.make(sys.argv[1])
print(os.getpid(), flush=True)
time.sleep(1000)
"""


@needs_pid_namespaces
@needs.needs_other_users
@pytest.mark.parametrize("hidepid", [1, 2])
def test_ticket_of_a_job_that_proc_hides(directory, hidepid):
    """That another user's process is not seen does not tell that it has ended."""
    words = [*needs.PID_NAMESPACE, "sh", "-c"]
    waiting = [*run_as(SOME_USER), sys.executable, "-c", KEEPS_A_TICKET]
    waiting.append(str(lock_path(directory, FIRST)))
    script = f"""
mount -o remount,hidepid={hidepid} /proc || exit
exec 3<&0
{shlex.join(waiting)} | {{ read pid; "$@" <&3; kill $pid; }}"""
    with process(directory, *words, script, "-", *run_as(LONELY_USER)) as contender:
        told = contender.told
        assert (told.state, getattr(told, "jobs_before", 0)) == ("NOT_YET", 1)
    for name in cards(directory):
        directory.joinpath(name).unlink()


@needs.needs_mount_namespaces
def test_ticket_counts_at_once_where_the_clock_ticks_slowly(directory):
    """On ramfs, as on most file systems before Linux 6.13, it ticks every 4 ms."""
    script = f"""
import os, sys
sys.path[:0] = {sys.path!r}
from others import contend, job_id
from avocado_vt_joblock import lock
for number in range(50):
    holder, first, second = (lock.JobLock(sys.argv[1], job_id(n)) for n in range(3))
    holder.acquire()
    assert contend(first, waits=True).state == "LIVE"
    holder.release()
    told = contend(second)
    assert told.state == "NOT_YET", (number, told)
    first.abandon()
"""
    mount = 'mount -t ramfs none "$4" && exec "$@"'
    command = ["unshare", "--mount", "sh", "-c", mount, "-", sys.executable, "-c"]
    subprocess.run([*command, script, directory], check=True, timeout=60)


def test_jobs_whose_cards_cannot_be_renewed_do_not_wait_for_each_other(
    directory, new_lock
):
    def hook(name, call):
        if name == "utime":
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return call()

    holder, first, second = new_lock(), new_lock(), new_lock()
    holder.acquire()
    with intercepted(hook):
        for made in (first, second):
            assert contend(made, waits=True).state == "LIVE"
        holder.release()
        told = [contend(made, waits=True).state for made in (first, second)]
    assert told == ["WON", "LIVE"]
    second.abandon()


def test_ticket_that_was_renewed_in_the_future(directory, ticket, new_lock):
    """The clock of a file system may be set back."""

    def hook(name, call):
        if name == "lstat" and call.args == (str(ticket),):
            real = call()
            return SimpleNamespace(
                st_uid=real.st_uid,
                st_nlink=1,
                st_mtime=real.st_mtime,
                st_ctime=real.st_ctime + AN_HOUR,
            )
        return call()

    made = new_lock()
    assert contend(made, waits=True).state == "NOT_YET"
    with intercepted(hook):
        assert contend(made, waits=True).state == "WON"
    # By that time it is litter as well.
    assert not os.path.lexists(ticket)


# What a crash has left.


def test_card_without_its_lock_is_litter_after_a_minute(directory, monkeypatch):
    path = lock_path(directory, 1)
    link = leave_card(path)
    new = link.with_name(f"{link.name}.new")
    os.symlink("x", new)
    note = directory / f"{link.name}.txt"
    note.touch()
    assert attempt(directory).state == "WON"
    assert len(os.listdir(directory)) == 3
    monkeypatch.setattr(lockdir, "LITTER_AGE", -1)
    assert attempt(directory).state == "WON"
    assert os.listdir(directory) == [note.name]


def test_card_of_a_lock_that_avocado_vt_has_removed(directory, held):
    """It knows no cards. That one is not of a job that waits, though it was renewed."""

    def hook(name, call):
        if name == "rename":
            time.sleep(0.05)
        return call()

    with intercepted(hook):
        held.hand_over()
    os.unlink(held.path)
    assert attempt(directory).state == "WON"
    card.remove(held.path)


def test_card_beside_its_lock_is_no_litter(directory, held, monkeypatch):
    monkeypatch.setattr(lockdir, "LITTER_AGE", -1)
    assert attempt(directory).path == held.path
    assert len(cards(directory)) == 1


# Joint starts on several hosts: they have no common guard.


@pytest.fixture
def rival(directory):
    """Have a job of another host start now; return what removes its lock again."""

    def start(number):
        path = leave_lock(directory, number)
        link = leave_card(path, **ANOTHER_HOST)

        def give_up():
            path.unlink()
            link.unlink()

        return path, give_up

    return start


def looks_again(directory, meanwhile=lambda: None):
    """Contend once; return what came of it, and how often it has looked again."""
    pauses = []

    def hook(name, call):
        if name == "sleep" and call.args == (lock.RIVAL_PAUSE,):
            pauses.append(name)
            meanwhile()
        return call()

    with intercepted(hook):
        told = attempt(directory)
    return told, len(pauses)


def test_rival_that_gives_way(directory, rival):
    _, give_up = rival(LAST)

    def guard_is_free():
        guard = os.open(directory, os.O_RDONLY)
        fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(guard)
        give_up()

    told, pauses = looks_again(directory, guard_is_free)
    assert (told.state, pauses) == ("WON", 1)


def test_rival_that_stays(directory, rival):
    path, _ = rival(LAST)
    began = time.monotonic()
    told, pauses = looks_again(directory)
    assert (told.state, told.path) == ("LIVE", str(path))
    assert pauses > 1
    assert time.monotonic() - began < lock.RIVAL_TIMEOUT + 60


def test_rival_that_is_first(directory, rival):
    """Who is not gives way at once, whoever else is there."""
    rival(LAST)
    rival(FIRST)
    told, pauses = looks_again(directory)
    assert (told.state, pauses) == ("LIVE", 0)


def test_job_of_another_host_that_came_before(directory, rival):
    rival(LAST)
    time.sleep(lock.RIVAL_DISTANCE + 0.1)
    told, pauses = looks_again(directory)
    assert (told.state, pauses) == ("LIVE", 0)


def test_rival_beside_a_job_of_this_host(directory, rival, held):
    rival(LAST)
    _, pauses = looks_again(directory)
    assert pauses == 0


def test_rival_beside_a_lock_that_is_stale(directory, path, rival):
    """The look comes when the rival has given way, and only then."""
    _, give_up = rival(LAST)
    told, pauses = looks_again(directory, give_up)
    assert ([file.path for file in told.stale], pauses) == ([str(path)], 1)


def test_others_of_this_host_are_refused_while_one_waits_for_its_rival(
    directory, rival, new_lock
):
    _, give_up = rival(LAST)
    refused = []

    def meanwhile():
        refused.append(contend(new_lock(job_id(LAST - 1))).state)
        give_up()

    told, _ = looks_again(directory, meanwhile)
    assert (told.state, refused) == ("WON", ["LIVE"])


# A file that is under a lease.


def test_file_that_cannot_be_opened_for_now(directory, path, monkeypatch):
    """An NFS server has a lease on it for a host that is silent; a job waits on."""
    monkeypatch.setattr(lockfile, "OPEN_TIMEOUT", 0)

    def hook(name, call):
        if name == "open" and call.args[0] == str(path):
            raise BlockingIOError(11, "")
        return call()

    with intercepted(hook):
        told = attempt(directory)
    assert (told.state, told.reason) == ("NOT_NOW", "LEASED")
    assert names(directory) == [path.name]
