"""``avocado vt-joblock``: the lock is shown, and held for other work."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from needs import SOME_USER, needs_avocado_vt, needs_other_users
from others import leave_lock, process
from sandbox import (
    assert_refused,
    ended,
    finish,
    heed_signals,
    start,
    wait_for,
)

from avocado_vt_joblock import card

pytestmark = needs_avocado_vt
WHOSE = {"host", "pid", "uid", "user", "since"}


def vt_joblock(sandbox, *words, **options):
    """Start the command; what it writes on standard error is not what is asked for."""
    options = {"stderr": subprocess.DEVNULL, **options}
    return sandbox.avocado("vt-joblock", *words, **options)


def show(sandbox, expected):
    """Return what is shown, as text and as JSON, with this exit code."""
    file = sandbox.root / "shown.json"
    text = ended(vt_joblock(sandbox, "show", "--json", file), expected)
    return text, json.loads(file.read_text())


def locks_and_cards(sandbox):
    """All that lies in the lock directory, with its times."""
    return {path: path.lstat().st_mtime_ns for path in sandbox.lock_dir.iterdir()}


def ticket(sandbox, renewed=True):
    """Leave the ticket of a job that waits; without a lock file that is its card."""
    path = sandbox.lock_dir / f"avocado-vt-joblock-{7:040x}-0-00000007.pid"
    card.make(str(path))
    time.sleep(0.02)  # Coarser than the clock of the file system.
    if renewed:
        card.make(str(path))
    return path


def test_free_lock_is_shown(sandbox):
    text, shown = show(sandbox, 0)
    assert f"Lock directory: {sandbox.lock_dir}\n" in text
    assert "The lock is free" in text
    expected = {"directory": str(sandbox.lock_dir), "verdict": "free", "problem": None}
    assert shown == {**expected, "locks": [], "waiting": []}
    assert locks_and_cards(sandbox) == {}


def test_held_lock_is_shown(sandbox, holder):
    """With what runs, and as a refusal tells of it; nothing is changed by that."""
    job, test = holder
    (path,) = sandbox.locks()
    before = locks_and_cards(sandbox)
    text, shown = show(sandbox, 2)
    (lock,) = shown["locks"]
    keys = {"file", "state", "reason", "command", "job_id", "processes", *WHOSE}
    assert lock.keys() == keys
    assert (lock["file"], lock["state"], lock["reason"]) == (str(path), "live", None)
    assert (lock["pid"], lock["uid"]) == (job.pid, os.getuid())
    assert lock["host"] == os.uname().nodename
    assert lock["job_id"] == (sandbox.latest / "id").read_text().strip()
    assert lock["command"].endswith(
        f"-m avocado run --disable-sysinfo -- {test.recipe}"
    )
    assert re.fullmatch(r"[\d-]{10}T[\d:]{8}[+-]\d\d:\d\d", lock["since"])
    runner = [each for each in lock["processes"] if " task-run " in each["command"]]
    assert runner
    assert runner[0].keys() == {"pid", "command", "uid", "user"}
    assert shown["verdict"] == "refused"
    for fact in (
        "another job holds the lock.",
        f"file:   {path}",
        f"PID:    {job.pid} ",
    ):
        assert fact in text
    assert re.search(rf"^ +{runner[0]['pid']}  \S", text, re.MULTILINE)
    assert locks_and_cards(sandbox) == before


def test_json_on_standard_output_is_nothing_else(sandbox):
    leave_lock(sandbox.lock_dir, content="avocado-vt", pid=os.getpid(), age=0)
    text = ended(vt_joblock(sandbox, "show", "--json", "-"), 2)
    assert json.loads(text)["verdict"] == "refused"


@pytest.mark.parametrize(
    ("content", "state", "verdict", "code"),
    [("this package", "stale", "free", 0), (b"", "unknown", "stopped", 2)],
)
def test_dead_lock_is_shown_and_not_removed(sandbox, content, state, verdict, code):
    path = leave_lock(sandbox.lock_dir, content=content)
    text, shown = show(sandbox, code)
    (lock,) = shown["locks"]
    assert (lock["state"], shown["verdict"]) == (state, verdict)
    assert bool(lock["reason"]) == (state == "unknown")
    assert str(path) in text
    assert path.exists()


def test_what_is_left_of_a_job_is_shown(sandbox):
    test = sandbox.vt_test("test", starts="sleep 1000")
    job = start(sandbox, test)
    os.killpg(job.pid, signal.SIGKILL)
    finish(job)
    text, shown = show(sandbox, 2)
    (lock,) = shown["locks"]
    assert lock["state"] == "live"
    assert test.guest in {each["pid"] for each in lock["processes"]}
    assert "a job has ended, but processes of it still run." in text


def test_who_waits_is_shown(sandbox):
    """A job that does not wait would be refused."""
    path = ticket(sandbox)
    text, shown = show(sandbox, 2)
    (waiting,) = shown["waiting"]
    assert waiting.keys() == WHOSE
    assert (waiting["pid"], waiting["uid"]) == (os.getpid(), os.getuid())
    assert (shown["verdict"], shown["locks"]) == ("refused", [])
    assert re.search(rf"^PID {os.getpid()} of \S+ waits since ", text, re.MULTILINE)
    Path(card.path_of(str(path))).unlink()


def test_directory_that_does_not_serve_is_shown(sandbox):
    options = ["show", "--vt-joblock-dir", "/nonexistent", "--json", "-"]
    shown = json.loads(ended(vt_joblock(sandbox, *options), 2))
    assert (shown["directory"], shown["verdict"]) == ("/nonexistent", "stopped")
    assert "does not exist" in shown["problem"]


@needs_other_users
def test_other_users_and_root_see_the_lock(sandboxes):
    """Also where they may only read: then their own jobs would be stopped."""
    one, other = sandboxes(), sandboxes()
    one.lock_dir.chmod(0o755)
    test = one.vt_test("test")
    one.belong_to(SOME_USER)
    job = start(one, test)
    other.configure(f"[plugins.vtjoblock]\ndir = {one.lock_dir}\n")
    assert show(other, 2)[1]["locks"][0]["pid"] == job.pid  # as root
    other.belong_to(SOME_USER + 1)
    text, shown = show(other, 2)
    (lock,) = shown["locks"]
    assert (lock["pid"], lock["uid"], lock["state"]) == (job.pid, SOME_USER, "live")
    assert shown["verdict"] == "stopped"
    assert "cannot be written: Permission denied" in text
    test.end()
    ended(job)


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("timeout = soon", "this is not a time to wait:"),
        (
            "[plugins.job.prepost]\norder = ['jobscripts']",
            "some plugins would run without the lock:",
        ),
    ],
)
def test_setting_that_stops_each_job_is_shown(sandbox, setting, told):
    """The lock is free, and yet no job gets it."""
    sandbox.add_to_config(setting)
    text, shown = show(sandbox, 2)
    assert (shown["verdict"], shown["locks"]) == ("stopped", [])
    assert told in shown["problem"]
    assert "Something is wrong" in text
    assert told in text


def test_holder_is_shown_in_spite_of_a_wrong_setting(sandbox, held_lock):
    sandbox.add_to_config("timeout = soon")
    text, shown = show(sandbox, 2)
    assert shown["verdict"] == "stopped"
    assert [each["pid"] for each in shown["locks"]] == [held_lock.pid]
    assert "this is not a time to wait:" in text
    assert "another job holds the lock." in text


def test_file_for_json_that_cannot_be_written(sandbox):
    file = "/nonexistent/shown.json"
    shown = vt_joblock(sandbox, "show", "--json", file, stderr=subprocess.STDOUT)
    text = ended(shown, 1)
    about = [line for line in text.splitlines() if "nonexistent" in line]
    assert about == [f"{file}: No such file or directory"]
    assert "The lock is free" in text
    assert "Traceback" not in text


def run(sandbox, *command, **options):
    return vt_joblock(sandbox, "run", *command, stderr=subprocess.STDOUT, **options)


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["sh", "-c", "exit 3"], 3),
        (["--", "sh", "-c", "exit 4"], 4),
        (["sh", "-c", "kill -9 $$"], 128 + 9),
        (["/etc/passwd"], 126),
        (["no-such-program"], 127),
        ([], 125),
        (["--"], 125),
    ],
)
def test_exit_code_is_that_of_the_command(sandbox, command, code):
    ended(run(sandbox, *command), code)
    assert locks_and_cards(sandbox) == {}


@pytest.mark.parametrize("how", ["by its path", "by its name"])
def test_script_that_does_not_say_by_which_shell_it_is_run(sandbox, how):
    """As for any shell, and for env(1), that is sh."""
    script = sandbox.bin / "script"
    script.write_text('echo "$0: $*"\nexit "$#"\n')
    script.chmod(0o755)
    command = script if how == "by its path" else script.name
    text = ended(run(sandbox, command, "one", "two words", "three"), 3)
    assert f"{script}: one two words three\n" in text
    assert locks_and_cards(sandbox) == {}


def test_options_of_the_command_are_its_own(sandbox):
    """Where Avocado would read them, too, it is told what to write."""
    config = sandbox.root / "no.conf"
    words = ["echo", "--config", config, "--show", "x", "-v", "-V", "--", "--help"]
    text = ended(run(sandbox, "--", *words))
    assert f"--config {config} --show x -v -V -- --help" in text
    # Behind the command also those of this one.
    text = ended(run(sandbox, "echo", "a", "-n", "--vt-joblock-dir", "x"))
    assert "a -n --vt-joblock-dir x\n" in text
    config.write_text("")
    text = ended(run(sandbox, "echo", "--config", config), 125)
    assert "avocado vt-joblock run -- COMMAND" in text


def test_command_is_refused_beside_a_job_and_a_job_beside_it(sandbox, holder):
    job, test = holder
    text = ended(run(sandbox, "touch", sandbox.root / "ran"), 125)
    assert "another job holds the lock." in text
    assert f"PID:    {job.pid} " in text
    waiting = run(
        sandbox, "--vt-joblock-timeout", "1h", "sh", "-c", "echo ran; exec sleep 99"
    )
    line = waiting.stdout.readline()
    while "Waiting until" not in line:
        line = waiting.stdout.readline()
    assert not (sandbox.root / "ran").exists()
    test.end()
    while line != "ran\n":
        line = waiting.stdout.readline()
    other = sandbox.vt_test("other")
    text = assert_refused(sandbox.run(other), other)
    # It names the command.
    assert f"PID:    {waiting.pid}  " in text
    assert (
        "vt-joblock run --vt-joblock-timeout 1h sh -c echo ran; exec sleep 99" in text
    )
    waiting.send_signal(signal.SIGTERM)
    assert waiting.wait(60) == 128 + signal.SIGTERM
    assert locks_and_cards(sandbox) == {}


def test_job_inside_is_refused_as_nested(sandbox):
    test = sandbox.vt_test("test")
    job = [sandbox.python, "-m", "avocado", "run", "--disable-sysinfo", "--"]
    text = ended(run(sandbox, "--", *job, test.recipe), 2)
    assert "this is the job that you are in." in text
    assert not test.has_begun


@pytest.mark.parametrize("options", [[], ["--vt-joblock-timeout", "1h"]])
def test_child_that_is_left_keeps_the_lock(sandbox, options):
    sandbox.first("from avocado_vt_joblock import ending\nending.END_TIMEOUT = 2\n")
    line = "setsid sleep 1000 > /dev/null 2>&1 & echo $!; exit 5"
    text = ended(run(sandbox, *options, "sh", "-c", line), 5)
    child = int(re.search(r"^(\d+)$", text, re.MULTILINE)[1])
    assert "1 process of the job still runs:" in text
    assert re.search(rf"^ +{child}  sleep 1000$", text, re.MULTILINE)
    assert show(sandbox, 2)[1]["locks"][0]["processes"][0]["pid"] == child
    os.kill(child, signal.SIGKILL)
    wait_for(lambda: not sandbox.living())
    ended(run(sandbox, "true"))
    assert locks_and_cards(sandbox) == {}


#: Notes the signals that it gets; ends with an exit code of its own after so many.
NOTES = """
import os, signal, sys, time
got = []
for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
    signal.signal(getattr(signal, name), lambda number, frame: got.append(number))
print("ready", os.getpid(), flush=True)
while len(got) < int(sys.argv[1]):
    time.sleep(0.01)
time.sleep(0.3)
print("got", *got, flush=True)
sys.exit(7)
"""


def notes(count):
    return [sys.executable, "-c", NOTES, str(count)]


def read_until(stream, what):
    """Read lines until one has this word; return the words behind it."""
    for line in stream:
        # A terminal shows ^Z and ^C before it.
        _, found, rest = line.partition(what)
        if found:
            return rest.split()
    raise AssertionError(f"no line has {what}")


def test_signals_reach_the_command_and_nobody_waits_less_for_it(sandbox):
    process = run(sandbox, "--", *notes(4))
    read_until(process.stdout, "ready")
    sent = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1]
    for signum in sent:
        process.send_signal(signum)
        time.sleep(0.1)  # So that they come in this order.
    (path,) = sandbox.locks()
    assert path.exists()
    assert read_until(process.stdout, "got") == [str(int(each)) for each in sent]
    assert process.wait(60) == 7
    assert locks_and_cards(sandbox) == {}


def ignore_the_end_of_children():
    heed_signals()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)


def test_parent_that_ignores_the_end_of_its_children(sandbox):
    """A program inherits that, and then nothing tells of the end of the command."""
    command = run(sandbox, "sh", "-c", "exit 3", preexec_fn=ignore_the_end_of_children)
    ended(command, 3)
    assert locks_and_cards(sandbox) == {}


#: A thread that blocks no signals, as a plugin may have one, or a look at processes
#: that is about to end. The command has ended before it is waited for.
THREAD_TAKES_SIGNALS = """
import os, threading, time
threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
spawn = os.posix_spawnp
def spawned(*words, **options):
    pid = spawn(*words, **options)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    time.sleep(0.2)
    return pid
os.posix_spawnp = spawned
"""


def test_end_of_the_command_that_only_another_thread_is_told_of(sandbox):
    sandbox.first(THREAD_TAKES_SIGNALS)
    ended(run(sandbox, "sh", "-c", "exit 3"), 3)
    assert locks_and_cards(sandbox) == {}


#: As it is for a command that is root's: by sudo, for example.
REFUSES_SIGTERM = """
import os, signal
kill = os.kill
def refused(pid, number):
    if number == signal.SIGTERM:
        raise PermissionError(1, "Operation not permitted")
    kill(pid, number)
os.kill = refused
"""


def test_command_that_may_not_be_sent_a_signal_is_waited_for(sandbox):
    sandbox.first(REFUSES_SIGTERM)
    process = run(sandbox, "--", *notes(1))
    read_until(process.stdout, "ready")
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGUSR1)
    got = read_until(process.stdout, "got")
    assert got == [str(int(signal.SIGUSR1))]
    assert process.wait(60) == 7
    assert locks_and_cards(sandbox) == {}


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_signal_after_the_end_of_the_command_changes_nothing(sandbox, signum):
    """While what the command has left is waited for there is nobody to pass it on
    to."""
    sandbox.change("ending", END_TIMEOUT=60.0)
    line = "setsid sleep 1000 > /dev/null 2>&1 & echo child $!; exit 5"
    process = run(sandbox, "sh", "-c", line)
    child = int(read_until(process.stdout, "child")[0])
    read_until(process.stdout, "Waiting up to 60 s.")
    process.send_signal(signum)
    os.kill(child, signal.SIGKILL)
    text = ended(process, 5)
    assert "Traceback" not in text
    assert locks_and_cards(sandbox) == {}


#: Starts a command in the foreground of a terminal, as a shell does; continues it once.
SHELL = """
import fcntl, os, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
pid = os.fork()
if pid == 0:
    os.setpgid(0, 0)
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    os.tcsetpgrp(0, os.getpid())
    os.execvp(sys.argv[1], sys.argv[1:])
_, status = os.waitpid(pid, os.WUNTRACED)
assert os.WIFSTOPPED(status)
print("stopped", flush=True)
os.killpg(pid, signal.SIGCONT)
_, status = os.waitpid(pid, 0)
print("ended", os.waitstatus_to_exitcode(status), flush=True)
"""


def test_terminal_stops_and_interrupts_the_command_once(sandbox):
    """Ctrl-Z stops it together with its Avocado; Ctrl-C is not passed on once more."""
    parent, child = pty.openpty()
    avocado = [sandbox.python, "-m", "avocado", "vt-joblock", "run", "--", *notes(1)]
    words = [sys.executable, "-c", SHELL, *avocado]
    sandbox.popen(*words, stdin=child, stdout=child, stderr=child)
    os.close(child)
    with open(parent, errors="replace", newline="\n") as terminal:
        pid = int(read_until(terminal, "ready")[0])
        os.write(parent, b"\x1a")
        read_until(terminal, "stopped")
        wait_for(lambda: ") T " not in Path(f"/proc/{pid}/stat").read_text())
        os.write(parent, b"\x03")
        assert read_until(terminal, "got") == ["2"]
        assert read_until(terminal, "ended") == ["7"]


def test_ctrl_c_ends_the_waiting_for_the_lock(sandbox):
    with process(str(sandbox.lock_dir)):
        waiting = run(
            sandbox, "--vt-joblock-timeout", "-1", "touch", sandbox.root / "ran"
        )
        while "Waiting" not in waiting.stdout.readline():
            pass
        waiting.send_signal(signal.SIGINT)
        text = ended(waiting, 125)
        assert re.search(r"Stopped waiting for the lock after 0:00:\d\d\.", text)
        assert not (sandbox.root / "ran").exists()
        assert len(sandbox.locks()) == 1


def test_options_of_avocado_run_win_over_config_files(sandbox):
    test = sandbox.vt_test("test")
    sandbox.add_to_config("timeout = soon")
    options = ["--vt-joblock-dir", "/nonexistent", "--vt-joblock-timeout", "0.1s"]
    text = assert_refused(sandbox.run(test, options=options), test)
    assert "plugins.vtjoblock.dir = '/nonexistent'" in text
    with process(str(sandbox.lock_dir)):
        text = assert_refused(sandbox.run(test, options=options[2:]), test)
        assert "out of time after 0:00:00" in text


def test_help_tells_what_to_write(sandbox):
    told = " ".join(ended(vt_joblock(sandbox, "run", "--help")).split())
    assert "Write -- before the command if it has options" in told
    assert "125" in told
    told = " ".join(ended(sandbox.avocado("run", "--help")).split())
    assert "--vt-joblock-timeout TIME" in told
    assert "--vt-joblock-dir DIR" in told
