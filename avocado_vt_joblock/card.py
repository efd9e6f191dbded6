"""The card of a job: on which host it runs, and as which process there.

A card is a symbolic link. That of the lock file ``NAME`` is called ``.NAME.host``, and
its target is a text, for example "hv3.lab 1a2b3c4d 4026531836 4242 812345". Nobody
follows it.

It is a second witness that the holder of a lock lives. The first one, the kernel lock,
can be wrong: on NFS after the network was away, on file systems that carry no locks,
and after code in the job's process has closed files that it had not opened.

Anybody can make a card, and so stop a job. But nobody can free another's lock with one:
a card that makes a lock stale counts only if the lock file has the same owner.

A job that waits has a card, but no lock file. That card is its ticket. The mtime of the
link is when the job came, and stays. At each attempt the job renews the link's ctime,
which shows that it lives.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import time
from dataclasses import dataclass

from avocado_vt_joblock import procfs

#: Host, boot, PID namespace, PID, start time. A minus before the start time says that
#: the lock file was handed over: "hv3.lab 1a2b3c4d 4026531836 4242 -812345". A start
#: time that is missing is unknown.
_TEXT = re.compile(
    r"(?P<host>[^\s-]\S{0,254}) (?P<boot>\S{8}) (?P<pid_namespace>[0-9]{1,20})"
    r" (?P<pid>[0-9]{1,10}) (?P<is_handed_over>-?)(?P<started>[0-9]{0,20})",
)


@dataclass(frozen=True)
class Identity:
    """What names one process, among those of all hosts and boots."""

    host: str  # the node name of its host
    boot: str  # the first eight digits of the id of the boot
    pid_namespace: int  # the inode of its PID namespace
    pid: int
    started: int  # in ticks since boot


@dataclass(frozen=True)
class Card:
    """A card as it was found."""

    identity: Identity
    is_handed_over: bool  # whether its lock file was handed over to leftovers
    uid: int  # the owner of the link
    is_hard_link: bool  # has it several names? Then anybody may have put it here
    # Both in seconds since the Epoch, by the clock of the file system:
    came: float  # when the job made the card
    renewed: float  # when the job last renewed it, or when it made it
    reader: Identity  # the process that has read the card: this one

    @property
    def is_of_another_host(self) -> bool:
        """Whether the job runs where nothing can be looked at from here.

        A container of this host has another host name, but the same boot. After a
        reboot a host has another boot, but the same name.
        """
        is_other_name = self.identity.host != self.reader.host
        return is_other_name and not self.is_of_this_boot

    @property
    def is_of_this_boot(self) -> bool:
        """Whether the job runs on this host, maybe in a container."""
        return self.identity.boot == self.reader.boot

    @property
    def is_of_this_pid_namespace(self) -> bool:
        """Whether its PID means the same process here."""
        is_same = self.identity.pid_namespace == self.reader.pid_namespace
        return self.is_of_this_boot and is_same

    @property
    def earliest_start(self) -> int:
        """A start time in ticks: no process of the job has started before that.

        The card has the start time of the job's own process. In a time namespace
        (time_namespaces(7)) that time may be too late. So the result is never later
        than the moment at which the card was made.

        :return: 0 if it is unknown
        """
        if not self.is_of_this_boot:
            return 0
        made = procfs.ticks_ago(time.time() - self.came)
        return max(0, min(self.identity.started, made))

    @property
    def writer_lives(self) -> bool:
        """Whether the job's own process is seen to run, and has not handed over."""
        if self.is_handed_over or not self.is_of_this_pid_namespace:
            return False
        if not procfs.shows_own_namespace():
            return False
        return procfs.is_running(self.identity.pid, self.identity.started)

    def may_be_of(self, pid: int) -> bool:
        """Tell whether the process with a PID here may be the job's own process."""
        started = self.identity.started or None
        return self.is_of_this_pid_namespace and procfs.may_run(pid, started)


def own_identity() -> Identity:
    """Return the identity of this process.

    :raises OSError: when /proc does not tell
    """
    # A node name can hold anything. But a card has its fields between spaces, and for
    # ssh(1) a name that begins with a minus would be an option.
    host = "_".join(os.uname().nodename.split()).lstrip("-") or "_"
    return _identity(os.getpid(), host)


def own_start() -> int:
    """Return the start time of this process in ticks, or 0 where it is unknown."""
    try:
        return own_identity().started
    except OSError:
        return 0


# To read it anew for each card would double the cost of an attempt. The PID changes by
# fork(2), and the host's name may change: so they are arguments.
@functools.lru_cache(maxsize=1)
def _identity(pid: int, host: str) -> Identity:
    with open("/proc/sys/kernel/random/boot_id", encoding="utf-8") as file:
        # 1a2b3c4d-5e6f-4a1b-8c2d-3e4f5a6b7c8d
        boot = file.read(8)
    pid_namespace = os.stat("/proc/self/ns/pid").st_ino
    started = procfs.read_stat(procfs.own_pid()).started
    return Identity(host, boot, pid_namespace, pid, started)


# A child may be in another PID namespace, and have the same PID there.
os.register_at_fork(after_in_child=_identity.cache_clear)


def path_of(lock_path: str) -> str:
    """Return where the card of a lock file lies."""
    directory, slash, name = lock_path.rpartition("/")
    return f"{directory}{slash}.{name}.host"


def read(lock_path: str) -> Card | None:
    """Read the card of a lock file; the file itself is not touched.

    :return: None where there is none, or none that is understood
    :raises OSError: when the card, or the identity of this process, cannot be read
    """
    path = path_of(lock_path)
    try:
        text = os.readlink(path)
        status = os.lstat(path)
    except OSError as error:
        # It is gone, no link, or was removed by another client of NFS.
        if error.errno in (errno.ENOENT, errno.EINVAL, errno.ESTALE):
            return None
        raise
    match = _TEXT.fullmatch(text)
    if not match:
        return None
    try:
        reader = own_identity()
    except OSError as error:
        # Nobody can tell whether the card is of another host. So it may not be ignored.
        reason = f"/proc does not tell which host this is: {error.strerror}"
        raise OSError(errno.EIO, reason) from error
    identity = Identity(
        host=match["host"],
        boot=match["boot"],
        pid_namespace=int(match["pid_namespace"]),
        pid=int(match["pid"]),
        started=int(match["started"] or 0),
    )
    return Card(
        identity=identity,
        is_handed_over=bool(match["is_handed_over"]),
        uid=status.st_uid,
        is_hard_link=status.st_nlink > 1,
        came=status.st_mtime,
        renewed=status.st_ctime,
        reader=reader,
    )


def make(lock_path: str) -> None:
    """Make the card of this process, or renew it.

    If that is refused the job goes on without a card.
    """
    path = path_of(lock_path)
    with contextlib.suppress(OSError):
        try:
            os.symlink(_text(), path)
        except FileExistsError:
            if os.readlink(path) == _text():
                _renew(path)
            else:
                # An earlier attempt could not remove its lock file, and handed it over.
                _replace(path, _text())


def hand_over(lock_path: str) -> None:
    """Have the card say that its lock file was handed over."""
    with contextlib.suppress(OSError):
        _replace(path_of(lock_path), _text(is_handed_over=True))


def remove(lock_path: str) -> None:
    """Remove a card, after its lock file."""
    with contextlib.suppress(OSError):
        os.unlink(path_of(lock_path))


def _renew(path: str) -> None:
    """Set the ctime of a card to now, and keep its mtime.

    :raises OSError: when the system refuses that
    """
    status = os.lstat(path)
    came = status.st_mtime_ns
    if came == status.st_ctime_ns:
        # On most kernels the clock of a file system ticks every 4 ms, so now may be the
        # same moment. But only a card that was renewed later than it came is a ticket.
        came -= 1000
    os.utime(path, ns=(came, came), follow_symlinks=False)


def _replace(path: str, text: str) -> None:
    """Put a new card in the place of an old one, whose mtime it keeps.

    The place is never empty: a lock without a card would look stale on another host.

    :raises OSError: when the system refuses that
    """
    new = f"{path}.new"
    try:
        os.symlink(text, new)
    except FileExistsError:
        # An earlier call was interrupted.
        os.unlink(new)
        os.symlink(text, new)
    try:
        with contextlib.suppress(OSError):
            came = os.lstat(path).st_mtime_ns
            os.utime(new, ns=(came, came), follow_symlinks=False)
        os.rename(new, path)
    except OSError:
        os.unlink(new)
        raise


def _text(*, is_handed_over: bool = False) -> str:
    ours = own_identity()
    started = f"-{ours.started}" if is_handed_over else f"{ours.started}"
    return f"{ours.host} {ours.boot} {ours.pid_namespace} {ours.pid} {started}"
