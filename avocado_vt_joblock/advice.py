"""What is said of a lock that is in the way, and of leftovers: each with advice.

Each text says what happened, then what that means for the reader, then what to do. Its
lines fit a terminal of 80 columns where names are of usual length.
"""

from __future__ import annotations

import os
import re
import shlex

from avocado_vt_joblock import DIR
from avocado_vt_joblock.formats import since, tamed, user
from avocado_vt_joblock.leftovers import JobProcess, Leftovers, Obstacle
from avocado_vt_joblock.lockfile import Flaw, LockFile, State
from avocado_vt_joblock.marks import VARIABLE

#: How many processes are listed.
PROCESS_LIMIT = 20

#: The program of a guest, for example "/usr/bin/qemu-system-x86_64"; not "qemu-img".
_GUEST = re.compile(r"(?:\S*/)?(?:qemu(?:-kvm|-system-\S+)?|kvm)")
_STOP_YOUR_JOB = "If your job uses the same images, stop it (Ctrl-C)."
_DO_NOT_REMOVE = "Do not remove the file: two jobs at once destroy each other's images."
_OWN_DIRECTORY = f"""A job that shares no guest images with that one can have a lock
directory of its own: --vt-joblock-dir DIR, or {DIR}."""
_FLAWS = {
    Flaw.SYSTEM: "{}",
    Flaw.NO_PID: "there is no PID in it",
    Flaw.NO_REGULAR_FILE: "it is no regular file",
    Flaw.LEASED: "another program has a lease on the file",
}
_OBSTACLES = {
    Obstacle.NO_PROC: "/proc does not show what runs: {}",
    Obstacle.NO_THREAD: "no thread can be started to look at the processes",
    Obstacle.HANGING: "process {} does not answer, and so hides others",
    Obstacle.HIDDEN: "/proc does not show the processes of other users",
    Obstacle.DENIED: "the environment of process {} may not be read here",
    Obstacle.RESTLESS: "processes come and go too fast to see them all",
    Obstacle.GUESTS_OF_OTHERS: "only root can see the guests of other users",
    Obstacle.INTERRUPTED: "Ctrl-C ended the look",
}


def on_refusal(file: LockFile, *, has_waited: bool = False) -> str:
    """Say whose lock is in the way of a job that is refused, and what to do.

    :param file: the lock
    :param has_waited: whether the job has waited for it
    """
    if file.state is State.OUTER:
        return _outer(file)
    if file.state is State.UNKNOWN:
        return _unknown(file)
    text = on_waiting(file)
    is_at_work = file.state is State.LIVE and not file.leftovers.processes
    if is_at_work and not file.is_elsewhere:
        text += "\nWait until that job is done."
    text += how_to_wait(os.path.dirname(file.path), has_waited=has_waited)
    if file.is_elsewhere:
        return text  # It says already who may remove the file, and when.
    if is_at_work:
        text += f"\n{_OWN_DIRECTORY}"
    return f"{text}\n{_DO_NOT_REMOVE}"


def on_waiting(file: LockFile) -> str:
    """Say what a job waits for, and what to do about what is left of another one."""
    if file.is_elsewhere:
        what = "a job on another host holds the lock."
        return f"{what}{_facts(file)}\n{_elsewhere(file)}"
    if file.leftovers.processes:
        what = "a job has ended, but processes of it still run."
        stopped = who_is_stopped(file.leftovers.processes, file.uid)
        text = f"{what}{_facts(file)}{listed(file.leftovers)}\n{stopped}"
        return f"{text}\n{to_do(file.leftovers, file.uid)}"
    if file.state is State.NOT_NOW:
        what = "for now nobody can tell whether a job still runs:"
        return f"{what}\n{why_unknown(file)}.{_facts(file)}"
    return f"another job holds the lock.{_facts(file)}"


def on_showing(file: LockFile, processes: list[JobProcess]) -> str:
    """Say for ``show`` what a lock is.

    :param file: the lock
    :param processes: what is seen to run of its job, if its own process lives
    """
    if file.state is not State.STALE:
        text = on_refusal(file)
    elif file.leftovers.obstacle:
        text = guests_of_others(file, "Start no job that uses the same images.")
    else:
        text = f"a stale lock: a later job removes it.{_facts(file)}"
    if processes:
        text += f"\nWhat runs of that job:{listed(Leftovers(processes))}"
    return text


def how_to_wait(directory: str, *, has_waited: bool) -> str:
    """Say how a job waits, or waits longer; the text begins a new line.

    :param directory: the lock directory
    :param has_waited: whether the job has waited
    """
    wait = "wait longer" if has_waited else "wait"
    time = "8h" if has_waited else "2h"
    return f"""
To have a job {wait}, start it with --vt-joblock-timeout {time}.
To see what runs and who waits:
    avocado vt-joblock show --vt-joblock-dir {shlex.quote(directory)}"""


def guests_of_others(file: LockFile, to_do_now: str = _STOP_YOUR_JOB) -> str:
    """Warn of what may run of a job, and that this user cannot see.

    :param file: the lock of that job
    :param to_do_now: what a user of the same images has to do
    """
    name = owner(file)
    directory = shlex.quote(os.path.dirname(file.path))
    return f"""A guest of {name} may still run: a job of {name} has ended,
and only {name} and root can see whether a guest or a copy of images still runs.
{to_do_now}
{name} or root can see what runs:
    avocado vt-joblock show --vt-joblock-dir {directory}
If nothing does, this removes the lock file, as each job of theirs does:
    avocado vt-joblock run --vt-joblock-dir {directory} true
The file is {file.path}"""


def listed(left: Leftovers) -> str:
    """List processes that are left, and say what may be missing; begins a new line."""
    text = ""
    for process in left.processes[:PROCESS_LIMIT]:
        text += f"\n    {process.pid:>7}  {tamed(process.command)}"
    more = len(left.processes) - PROCESS_LIMIT
    if more > 0:
        text += f"\n    and {more} more"
    if left.obstacle is Obstacle.GUESTS_OF_OTHERS:
        text += f"\nThere may be guests, too: {obstacle(left)}."
    elif left.obstacle:
        text += f"\nThere may be more, tests too: {obstacle(left)}."
    return text


def to_do(left: Leftovers, uid: int | None) -> str:
    """Say what to do about the processes that are left of a job.

    :param left: what is left
    :param uid: the user of the job
    """
    processes = left.processes
    pids = [str(process.pid) for process in processes]
    for process in processes:
        if process.is_ancestor:
            return _to_do_about_shell(process)
    has_test = any(process.test_of for process in processes)
    is_unclear = left.obstacle or any(process.is_blank for process in processes)
    if has_test or is_unclear:
        test = "A test is among them. It" if has_test else "A test"
        return f"""{test} may be cleaning up and restoring images.
Wait some minutes. To look again:
    ps -o pid,user,stat,etime,args -p {",".join(pids)}"""
    guests = [str(process.pid) for process in processes if _is_guest(process)]
    fds = " ".join(f"/proc/{pid}/fd" for pid in guests or pids)
    return f"""No test is among them. So nothing will end a guest or restore images.
Wait for what copies or changes images, rsync or qemu-img for example.
If a guest still runs after one minute, {_user_or_root(uid, processes)} must act:
 1. See which images it uses:
    ls -l {fds}
 2. End guests, and nothing else:
    kill {" ".join(guests) or "PID"}
 3. Check each of these images:
    qemu-img check IMAGE
Next time, start what must not hold the lock, an agent for example, with:
    env -u {VARIABLE} COMMAND"""


def who_is_stopped(processes: list[JobProcess], uid: int | None) -> str:
    """Say whose jobs do not run because of leftovers.

    A job is stopped by what it sees. Everybody sees a test. Only its user and root see
    a guest. Only root sees a process of root, which sudo has started for example.

    :param processes: what is left of a job
    :param uid: the user of that job
    """
    if any(process.test_of for process in processes):
        return "Until all of that has ended, no job with VT tests runs here."
    whose = _user_or_root(uid, processes)
    return f"Until all of that has ended, no job of {whose} runs."


def why_unknown(file: LockFile) -> str:
    """Say why it is not certain whether a lock is held, or what its job has left.

    :return: "" where there is no such reason
    """
    if file.flaw:
        return _FLAWS[file.flaw].format(tamed(file.flaw_detail))
    return obstacle(file.leftovers)


def obstacle(left: Leftovers) -> str:
    """Say what may keep leftovers out of sight; return "" if nothing does."""
    if not left.obstacle:
        return ""
    return _OBSTACLES[left.obstacle].format(tamed(left.detail))


def owner(file: LockFile) -> str:
    """Return the name of the owner of a lock file."""
    return "unknown" if file.uid is None else user(file.uid)


def _facts(file: LockFile) -> str:
    """List what is known of a lock; begins a new line."""
    lines = [f"file:   {file.path}"]
    if file.card and file.is_elsewhere:
        lines.append(f"host:   {tamed(file.card.identity.host)}")
    # With leftovers the job's own process has ended. With NOT_NOW nobody can tell.
    if not file.leftovers.processes and file.state is not State.NOT_NOW:
        pid = f"{file.pid or 'unknown'}  {tamed(file.command())}"
        lines.append(f"PID:    {pid.rstrip()}")
        is_alive = file.state in (State.LIVE, State.OUTER)
        if is_alive and not file.pid_may_be_here and not file.is_elsewhere:
            lines += [
                "        It is not seen here: it is of another PID namespace, or has",
                "        ended and has left a child that holds the lock. To see that:",
                f"        fuser -v {shlex.quote(file.path)}",
            ]
    lines.append(f"user:   {owner(file)}")
    lines.append(f"job id: {file.job_id}")
    lines.append(f"since:  {since(file.since)}")
    return "".join(f"\n    {line}" for line in lines)


def _is_guest(process: JobProcess) -> bool:
    """Tell whether a process is plainly a guest; also one that a script runs."""
    return any(_GUEST.fullmatch(word) for word in process.command.split()[:2])


def _to_do_about_shell(process: JobProcess) -> str:
    return f"""Process {process.pid} has started this job, and was started by that job.
If it is your shell, end it, or put a new one in its place:
    exec env -u {VARIABLE} bash"""


def _elsewhere(file: LockFile) -> str:
    host = shlex.quote(tamed(file.card.identity.host)) if file.card else ""
    return f"""Only that host can tell whether the job still runs:
    ssh {host} "pgrep -af 'avocado|qemu'"
If it was killed, the next job on that host removes the file.
If that host is gone for good, {_user_or_root(file.uid, [])} removes the file:
    rm {shlex.quote(file.path)}"""


def _outer(file: LockFile) -> str:
    what = "this is the job that you are in. To wait for it would be to wait for ever."
    if file.leftovers.processes:
        text = f"{what}{_facts(file)}{listed(file.leftovers)}"
        return f"{text}\n{to_do(file.leftovers, file.uid)}"
    return f"{what}{_facts(file)}\n{_OWN_DIRECTORY}"


def _unknown(file: LockFile) -> str:
    whose = "" if file.uid is None else f"-u {shlex.quote(owner(file))} "
    look = f"pgrep {whose}-af 'avocado|qemu'"
    if file.leftovers.obstacle is Obstacle.DENIED:
        look += f"\n    ps -o pid,user,stat,args -p {file.leftovers.detail}"
    remove = "rm -r" if file.flaw is Flaw.NO_REGULAR_FILE else "rm"
    return f"""nobody can tell whether a job still holds the lock:
{why_unknown(file)}.{_facts(file)}
So no job runs until {_user_or_root(file.uid, file.leftovers.processes)} does this:
 1. Look for a job, a test or a guest of that user:
    {look}
 2. If there is none:
    {remove} {shlex.quote(file.path)}"""


def _user_or_root(uid: int | None, processes: list[JobProcess]) -> str:
    """Return who sees and may end these processes, and may remove a file of this user.

    :param uid: the user; None where that is unknown
    """
    # Of a file whose user is unknown, too, only root can be named.
    if not uid or any(process.uid == 0 for process in processes):
        return "root"
    return f"{user(uid)} or root"
