"""The texts, as functions: what real jobs print of them other tests show."""

import errno
import logging
import math
import os
import pwd
import re
import time

import pytest

from avocado_vt_joblock import advice, formats, messages, telling
from avocado_vt_joblock.card import Card, Identity, own_identity
from avocado_vt_joblock.leftovers import JobProcess, Leftovers, Obstacle
from avocado_vt_joblock.lock import JobIdError, LockInTheWayError, WaitedInVainError
from avocado_vt_joblock.lockdir import DirectoryError, Ticket, Use
from avocado_vt_joblock.lockfile import Flaw, LockFile, State
from avocado_vt_joblock.options import OptionError, OrderError, timeout

NAME = f"avocado-vt-joblock-{7:040x}-0-00000007.pid"
PATH = f"/two words/{NAME}"
#: Belongs to nobody.
UID = 54321
#: The PID of no process: Linux has none above 2**22.
NOBODY = 2**22 + 1
COLUMNS = 80


def lock_file(state, **facts):
    return LockFile(PATH, **{"uid": UID, "state": state, "since": time.time(), **facts})


def refusal(error):
    return messages.refusal(error, "/locks", "/results/job.log")


def in_the_way(state, **facts):
    return refusal(LockInTheWayError(lock_file(state, **facts)))


def process(pid, **facts):
    usual = {
        "started": 0,
        "command": "qemu -name vm1",
        "uid": UID,
        "marks": frozenset(),
    }
    usual |= {"test_of": "", "is_ancestor": False, "is_blank": False}
    return JobProcess(pid, **{**usual, **facts})


def card(host="hv3.lab", boot="00000000"):
    identity = Identity(host, boot, pid_namespace=1, pid=4242, started=1)
    when = {"came": time.time(), "renewed": time.time()}
    return Card(
        identity,
        is_handed_over=False,
        uid=UID,
        is_hard_link=False,
        reader=own_identity(),
        **when,
    )


def directory_error(number, use):
    return DirectoryError(use, OSError(number, os.strerror(number)))


GUEST = [process(4502)]
TEST = [process(4481, test_of=f"{7:040x}"), *GUEST]
IN_THE_WAY = {
    "held": lock_file(State.LIVE, pid=NOBODY),
    "held in another namespace": lock_file(State.LIVE, pid=1, pid_may_be_here=False),
    "held on another host": lock_file(State.LIVE, card=card(), pid_may_be_here=False),
    "guest": lock_file(State.LIVE, leftovers=Leftovers(GUEST)),
    "test": lock_file(State.LIVE, leftovers=Leftovers(TEST)),
    "not all seen": lock_file(
        State.LIVE, leftovers=Leftovers(GUEST, Obstacle.HANGING, "77")
    ),
    "not seen": lock_file(
        State.NOT_NOW, leftovers=Leftovers(obstacle=Obstacle.RESTLESS)
    ),
    "leased": lock_file(State.NOT_NOW, flaw=Flaw.LEASED),
    "unknown": lock_file(State.UNKNOWN, flaw=Flaw.NO_PID),
    "outer": lock_file(State.OUTER, pid=NOBODY),
    "shell": lock_file(
        State.OUTER, leftovers=Leftovers([process(9, is_ancestor=True)])
    ),
}
ERRORS = {
    **{name: LockInTheWayError(file) for name, file in IN_THE_WAY.items()},
    "in vain": WaitedInVainError(LockInTheWayError(IN_THE_WAY["held"]), 300.0),
    "others wait": LockInTheWayError(None, 2),
    "timeout": OptionError("plugins.vtjoblock.timeout", "soon"),
    "directory": OptionError("plugins.vtjoblock.dir", "locks"),
    "order": OrderError(["jobscripts"]),
    "missing": directory_error(errno.ENOENT, Use.OPEN),
    "full": directory_error(errno.ENOSPC, Use.WRITE),
    "no locks": directory_error(errno.ENOLCK, Use.LOCK),
    "no kernel locks": directory_error(errno.EINVAL, Use.LOCK),
    "job id": JobIdError("nightly #7"),
    "interrupted": KeyboardInterrupt(),
    "unforeseen": RuntimeError("odd"),
}
LEFT = {
    "guest": Leftovers(GUEST),
    "test": Leftovers(TEST),
    "unseen": Leftovers([], Obstacle.HANGING, "77"),
}
TEXTS = {
    **{f"refusal: {name}": refusal(error) for name, error in ERRORS.items()},
    **{
        f"waiting: {name}": messages.waiting(error, 60.0)
        for name, error in ERRORS.items()
        if isinstance(error, (LockInTheWayError, DirectoryError))
    },
    **{
        f"left: {name}": messages.left_behind(left, PATH, is_in_place=True)
        for name, left in LEFT.items()
    },
    "ending": messages.ending(LEFT["test"], 5.0),
    "gone": messages.not_released(FileNotFoundError(2, "No such file"), PATH),
    "not released": messages.not_released(PermissionError(13, "denied"), PATH),
    "sticky bit": messages.no_sticky_bit("/locks"),
    "unknown key": messages.unknown_key("timout"),
    "guests": advice.guests_of_others(lock_file(State.STALE)),
    "not removed": messages.not_removed(lock_file(State.STALE, not_removed="denied")),
    "overview": messages.overview("/locks", "refused", [Ticket(NAME, card())]),
    "stale": advice.on_showing(lock_file(State.STALE), []),
    "shown": advice.on_showing(IN_THE_WAY["held"], TEST),
    "on terminal": messages.on_terminal(83.0, 3600.0, 2),
    "stopped": messages.stopped_waiting(83.0, "No test"),
    "reminder": messages.still_waiting(300.0, 3600.0),
    "no command": messages.NO_COMMAND,
    "option": messages.option_of_avocado("--config"),
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_lines_fit_a_terminal(text):
    """But for what Avocado writes before, and for paths."""
    lines = text.replace(messages.FAILURE, "").splitlines()
    lines = [line for line in lines if NAME not in line and "More: less /" not in line]
    assert [line for line in lines if len(line) > COLUMNS] == []
    assert not any(line.endswith(" ") or line == "" for line in lines)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_never_two_only_if_in_a_row(text):
    assert text.count("nly if") < 2


@pytest.mark.parametrize(
    ("left", "kills"),
    [
        (Leftovers([process(4), process(5)]), "4 5"),
        # Only what is plainly a guest: who ends a copy has half an image.
        (Leftovers([process(4), process(5, command="rsync -a qemu kvm")]), "4"),
        (Leftovers([process(4, command="sh /bin/qemu-kvm -S")]), "4"),
        (Leftovers([process(4, command="qemu-img convert a b")]), "PID"),
        (Leftovers([process(4), process(5, test_of="7")]), None),
        (Leftovers([process(4)], Obstacle.RESTLESS), None),
        (Leftovers([process(4)], Obstacle.GUESTS_OF_OTHERS), None),
        (Leftovers([process(4), process(5, is_blank=True)]), None),
        (Leftovers([process(4), process(5, is_ancestor=True)]), None),
    ],
)
def test_advice_to_kill(left, kills):
    """Only where no test is left, all was seen, and it is not the reader's shell."""
    is_outer = any(this.is_ancestor for this in left.processes)
    state = State.OUTER if is_outer else State.LIVE
    text = in_the_way(state, leftovers=left)
    assert re.findall(r"^    kill (.*)$", text, re.MULTILINE) == (
        [kills] if kills else []
    )
    assert (f"after one minute, {UID} or root must act:" in text) == bool(kills)
    # Which images, before the kill; what to do with these, after it.
    order = [text.find(part) for part in ("/proc/4/fd", "kill", "qemu-img check")]
    assert (order == sorted(order) and min(order) > 0) == bool(kills)
    assert ("env -u AVOCADO_VT_JOBLOCK" in text) == bool(kills or is_outer)
    assert ("\nProcess 5 has started this job" in text) == is_outer


def test_command_lines_are_tamed():
    """They are anybody's words, for a terminal, for a line, and for XML."""
    odd = "\x1b[31m]]>\n    kill 1\r\u202e" + "x" * 500
    processes = [process(pid, command=odd) for pid in range(25)]
    text = in_the_way(State.LIVE, leftovers=Leftovers(processes))
    assert r"\x1b[31m]] >\n    kill 1\r\u202exxx" in text
    assert not set("\x1b\r\u202e") & set(text)
    assert "]]>" not in text
    listed = [line for line in text.splitlines() if "xxx" in line]
    assert len(listed) == 20
    assert max(map(len, listed)) < 200
    assert "\n    and 5 more\n" in text


def test_words_of_a_card_are_tamed():
    text = in_the_way(State.LIVE, card=card(host="a\x1b[31m;rm"))
    assert r"host:   a\x1b[31m;rm" in text
    assert "\x1b" not in text
    assert "ssh 'a" in text


def test_pid():
    """With its command line where it is a process of here."""
    told = in_the_way(State.LIVE, pid=os.getpid())
    assert re.search(rf"^    PID:    {os.getpid()}  \S*python\S* ", told, re.MULTILINE)
    assert "fuser" not in told
    told = in_the_way(State.LIVE, pid=os.getpid(), pid_may_be_here=False)
    assert f"PID:    {os.getpid()}\n" in told
    assert "of another PID namespace" in told
    assert f"fuser -v '{PATH}'" in told


def test_where_a_job_of_another_host_can_be_judged():
    told = in_the_way(State.LIVE, card=card(), pid=4242, pid_may_be_here=False)
    assert "a job on another host holds the lock." in told
    for fact in ("host:   hv3.lab", "PID:    4242\n", "ssh hv3.lab", f"rm '{PATH}'"):
        assert fact in told
    # What does not help there.
    assert "fuser" not in told
    ours = own_identity()
    here = in_the_way(State.LIVE, card=card(ours.host, ours.boot), pid=1)
    assert "host:" not in here


@pytest.mark.parametrize("has_waited", [False, True])
def test_job_of_another_host_can_be_waited_for(has_waited):
    """And the way to remove its file is not forbidden in the next line."""
    error = LockInTheWayError(IN_THE_WAY["held on another host"])
    if has_waited:
        error = WaitedInVainError(error, 300.0)
    told = refusal(error)
    longer = " longer" if has_waited else ""
    assert f"To have a job wait{longer}, start it with --vt-joblock-timeout" in told
    show = "avocado vt-joblock show --vt-joblock-dir '/two words'"
    assert f"\nTo see what runs and who waits:\n    {show}\n" in told
    assert f"\n    rm '{PATH}'" in told
    assert "Do not remove the file" not in told


@pytest.mark.parametrize("left", LEFT.values(), ids=LEFT)
def test_file_that_is_gone_neither_stays_nor_stops_jobs(left):
    told = messages.left_behind(left, PATH, is_in_place=True)
    assert f"The lock file stays:\n    {PATH}" in told
    gone = messages.left_behind(left, PATH, is_in_place=False)
    assert NAME not in gone
    for words in ("stay", "no job", "next job", "Until all of that has ended"):
        assert words not in gone
    # What is left is told in any case.
    assert gone.splitlines()[0] == told.splitlines()[0]
    for each in left.processes:
        assert f"{each.pid}  {each.command}" in gone


@pytest.mark.parametrize(
    ("processes", "uid", "stopped"),
    [
        (TEST, UID, "no job with VT tests runs here."),
        (TEST, 0, "no job with VT tests runs here."),
        (GUEST, UID, f"no job of {UID} or root runs."),
        (GUEST, 0, "no job of root runs."),
        # A guest of root's, by sudo for example, which only root sees.
        ([*GUEST, process(4503, uid=0)], UID, "no job of root runs."),
    ],
)
def test_who_is_stopped_by_what_is_left(monkeypatch, processes, uid, stopped):
    """Everybody sees a test, and only its user and root see a guest."""
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    texts = [
        in_the_way(State.LIVE, leftovers=Leftovers(processes), uid=uid),
        messages.left_behind(Leftovers(processes), PATH, is_in_place=True),
    ]
    for text in texts:
        assert f"\nUntil all of that has ended, {stopped}\n" in text
        assert text.count("Until all of that has ended") == 1


def test_longest_time_to_wait():
    """It is more than the years of a calendar; Python has numbers for it."""
    longest = timeout("99999999d")
    with pytest.raises(OptionError):
        timeout("100000000d")
    line = messages.on_terminal(83.0, longest, 0)
    assert line.startswith("Waiting for the lock: 0:01:23 of 99999999 days, 0:00:00")
    told = messages.waiting(LockInTheWayError(None, 1), longest)
    assert told.startswith("Waiting until ")
    assert messages.still_waiting(83.0, longest).startswith("Still waiting until ")


def test_what_to_do():
    """Remedies that help: another lock directory only where jobs may run at once."""
    held = in_the_way(State.LIVE)
    assert "To have a job wait, start it with --vt-joblock-timeout 2h" in held
    assert "avocado vt-joblock show" in held
    assert "of its own: --vt-joblock-dir DIR, or plugins.vtjoblock.dir" in held
    assert "Do not remove the file" in held
    in_vain = TEXTS["refusal: in vain"]
    assert "out of time after 0:05:00: another job holds the lock" in in_vain
    assert "To have a job wait longer, start" in in_vain
    outer = in_the_way(State.OUTER)
    assert "this is the job that you are in" in outer
    assert "timeout" not in outer
    assert "minute, root must act" in in_the_way(
        State.LIVE, leftovers=Leftovers([process(4, uid=0)])
    )
    later = in_the_way(State.NOT_NOW, leftovers=Leftovers([], Obstacle.HANGING, "77"))
    assert "process 77 does not answer" in later
    assert "To have a job wait," in later
    for text in (later, in_the_way(State.UNKNOWN, flaw=Flaw.NO_PID)):
        assert "plugins.vtjoblock.dir" not in text
    assert "rm " not in later
    assert "2 jobs that came before this one wait" in TEXTS["refusal: others wait"]


def test_first_words_of_the_most_dangerous_state():
    """A guest that may run beside this job, which only others can see."""
    lines = TEXTS["guests"].splitlines()
    assert lines[0].startswith(f"A guest of {UID} may still run")
    assert "If your job uses the same images, stop it (Ctrl-C)" in " ".join(lines[:3])
    assert "    avocado vt-joblock run --vt-joblock-dir '/two words' true" in lines
    assert lines[-1] == f"The file is {PATH}"


@pytest.mark.parametrize("reason", [*Flaw, *Obstacle])
def test_every_reason_has_words(reason):
    if isinstance(reason, Flaw):
        facts = {"flaw": reason, "flaw_detail": "DETAIL"}
    else:
        facts = {"leftovers": Leftovers([], reason, "DETAIL")}
    text = in_the_way(State.UNKNOWN, **facts)
    assert re.search(r"nobody can tell whether a job still holds the lock:\n\S+", text)
    remove = "rm -r" if reason is Flaw.NO_REGULAR_FILE else "rm"
    assert f"\n    {remove} '{PATH}'" in text
    assert f"pgrep -u {UID} -af 'avocado|qemu'" in text


CORRECT, MAKE_ROOM = "\nCorrect the setting.", "\nMake room there."
MAKE_IT, LOOK = "\nMake it: mkdir -p /locks\n", "look for what cleans"


@pytest.mark.parametrize(
    ("number", "use", "told", "remedy"),
    [
        (errno.ENOENT, Use.OPEN, "does not exist", MAKE_IT),
        (errno.ENOTDIR, Use.OPEN, "is not a directory", CORRECT),
        (errno.EACCES, Use.OPEN, "cannot be opened: Permission denied", CORRECT),
        (errno.EMFILE, Use.OPEN, "cannot be opened: Too many open files", CORRECT),
        (errno.ENOSPC, Use.WRITE, "cannot be written: No space left", MAKE_ROOM),
        (errno.EDQUOT, Use.WRITE, "cannot be written: Disk quota", MAKE_ROOM),
        (errno.EACCES, Use.WRITE, "cannot be written: Permission", CORRECT),
        (errno.EROFS, Use.WRITE, "cannot be written: Read-only", CORRECT),
        (errno.ENOENT, Use.WRITE, "cannot be written: No such file", LOOK),
        (errno.ENOLCK, Use.LOCK, "locks no files: No locks available", CORRECT),
    ],
)
def test_what_the_system_refuses(number, use, told, remedy):
    text = refusal(directory_error(number, use))
    assert told in text
    assert remedy in text
    assert "plugins.vtjoblock.dir = '/locks'\n" in text


def test_directory_that_is_set_by_another_name(monkeypatch):
    monkeypatch.setenv("HOME", "/home/user1")
    error = directory_error(errno.ENOENT, Use.OPEN)
    text = messages.refusal(error, "~/locks", None)
    assert "plugins.vtjoblock.dir = '~/locks' (/home/user1/locks)" in text


def test_what_else_stops_a_job():
    # Another directory would not help.
    assert "Linux 3.15" in TEXTS["refusal: no kernel locks"]
    assert "plugins.vtjoblock.dir" not in TEXTS["refusal: no kernel locks"]
    unforeseen = TEXTS["refusal: unforeseen"]
    assert "RuntimeError: odd.\nDetails are in /results/job.log." in unforeseen
    assert "it was interrupted before its tests" in TEXTS["refusal: interrupted"]
    assert "the job id 'nightly #7' is not 40 hex" in TEXTS["refusal: job id"]


@pytest.mark.parametrize(("name", "error"), ERRORS.items(), ids=ERRORS)
def test_what_nobody_has_thought_of(name, error):
    """Only of that the log has a traceback."""
    is_known = bool(messages.why_stopped(error, "/locks"))
    assert is_known == (name not in ("unforeseen", "interrupted"))


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("unknown", "whether a job still holds the lock: there is no PID in it. User "),
        ("missing", "the lock directory does not exist: plugins.vtjoblock.dir = '/lo"),
        ("timeout", "this is not a time to wait: plugins.vtjoblock.timeout = 'soon'"),
    ],
)
def test_headline_says_what_is_wrong(name, line):
    assert line in messages.headline(ERRORS[name], refusal(ERRORS[name]))


def test_headline_says_whose_the_lock_is():
    error = LockInTheWayError(lock_file(State.LIVE, pid=4242, since=0.0))
    line = messages.headline(error, refusal(error))
    since = formats.local_time(0.0)
    told = f"another job holds the lock. User {UID}, PID 4242, since {since}."
    assert line == f"{messages.FAILURE}{told}"
    # There is nothing to add to others.
    timeout = ERRORS["timeout"]
    assert messages.headline(timeout, "one\ntwo") == "one"


def test_one_is_not_many():
    assert "1 process of it still runs." in messages.ending(LEFT["guest"], 5)
    assert "2 processes of it still run." in messages.ending(LEFT["test"], 5)
    assert "1 process of the job still runs:" in TEXTS["left: guest"]
    assert "2 processes of the job still run:" in TEXTS["left: test"]
    assert ", after 1 job." in messages.on_terminal(1.0, math.inf, 1)


def test_time():
    """Also of a file whose date anybody has set."""
    for when in (-(2**62), 2**62):
        assert re.search(
            r"since:  \S+$", in_the_way(State.LIVE, since=float(when)), re.MULTILINE
        )
    hours_ago = formats.since(time.time() - 2 * 3600 - 191)
    assert re.fullmatch(r"[\d-]{10} [\d:]{8} \(2:03:1\d ago\)", hours_ago)
    assert "ago" not in formats.since(time.time() + 3600)
    others_wait = LockInTheWayError(None, 1)
    forever = messages.waiting(others_wait, math.inf)
    assert forever.startswith("Waiting for as long as it takes:\n")
    told = messages.waiting(others_wait, 60.5)
    assert re.match(r"Waiting until [\d-]{10} [\d:]{8}:\n", told)
    iso = formats.iso_time(time.time())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d", iso)
    assert formats.iso_time(2.0**62) is None


def test_name_service_is_asked_once_for_each_user(monkeypatch):
    """It may take 15 seconds to answer."""
    asked = []

    def getpwuid(uid):
        asked.append(uid)
        raise KeyError(uid)

    formats.user.cache_clear()
    monkeypatch.setattr(pwd, "getpwuid", getpwuid)
    processes = [process(4, uid=UID), process(5, uid=UID + 1)]
    assert f"user:   {UID}\n" in in_the_way(State.LIVE, leftovers=Leftovers(processes))
    in_the_way(State.UNKNOWN, flaw=Flaw.NO_PID)
    assert len(asked) == len(set(asked))
    monkeypatch.undo()
    formats.user.cache_clear()
    assert "user:   root\n" in in_the_way(State.LIVE, uid=0)


def test_tell_survives_handlers_that_raise(caplog):
    class OddError(BaseException):
        pass

    class Strict(logging.Handler):
        def emit(self, record):
            raise OddError

    handler = Strict()
    logging.getLogger(telling.JOB_LOG).addHandler(handler)
    try:
        telling.tell("one")
    finally:
        logging.getLogger(telling.JOB_LOG).removeHandler(handler)
    told = [record.name for record in caplog.records if record.message == "one"]
    assert telling.USER_LOG in told
