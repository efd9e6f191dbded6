"""A HOME of its own in which the real Avocado runs real VT tests, without QEMU."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent
AVOCADO = int(metadata.version("avocado-framework").split(".")[0])
AVOCADO_READS_RECIPES = AVOCADO >= 105
LOCK_GLOB = "avocado-vt-joblock-*.pid"
#: How long anything may take before it counts as a hang, in seconds.
HANG = 120


class Sandbox:
    """A user's home with a VT test provider, a lock directory, and the commands that use them.

    :param root: an empty directory
    """

    python = sys.executable

    def __init__(self, root: Path) -> None:
        self.root = root
        self.home = root / "home"
        self.lock_dir = root / "locks"
        self.config = self.home / ".config/avocado/avocado.conf"
        self.processes: list[subprocess.Popen[str]] = []
        self.prefix: list[str] = []
        vt_data = self.home / "avocado/data/avocado-vt"
        providers = vt_data / "virttest/test-providers.d"
        downloads = providers / "downloads"
        for directory in (self.lock_dir, self.config.parent, providers, downloads):
            directory.mkdir(parents=True)
        (downloads / "keep").touch()
        # avocado-vt starts these before each test, though here are no guests for them.
        self.bin = root / "bin"
        self.bin.mkdir()
        for program in ("qemu-kvm", "tcpdump"):
            (self.bin / program).symlink_to(shutil.which("true") or "/bin/true")
        shutil.copytree(HERE / "vt_provider", root / "provider")
        (providers / "sandbox.ini").write_text(
            f"[provider]\nuri: file://{root}/provider\n[qemu]\nsubdir: qemu/\n"
        )
        self.configure(f"[plugins.vtjoblock]\ndir = {self.lock_dir}\n")

    def configure(self, text: str) -> None:
        """Replace the user's avocado.conf."""
        self.config.write_text(text)

    def belong_to(self, uid: int) -> None:
        """Make this the sandbox of another user; only root can."""
        for path in [self.root, *self.root.rglob("*")]:
            os.chown(path, uid, uid, follow_symlinks=False)
        self.prefix = run_as(uid)

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables for a process in this sandbox."""
        path = f"{self.bin}:{Path(self.python).parent}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
        return {
            "HOME": str(self.home),
            "PATH": path,
            "LC_ALL": "C.UTF-8",
            "TMPDIR": str(self.root),
            "PYTHONFAULTHANDLER": "1",
        }

    def locks(self) -> list[Path]:
        """The lock files that are there."""
        return sorted(self.lock_dir.glob(LOCK_GLOB))

    def popen(self, *command: str | Path, **options: object) -> subprocess.Popen[str]:
        """Start a command in the sandbox; :meth:`close` ends it with all that it started."""
        defaults = {"env": self.environment, "cwd": self.root, "stdin": subprocess.DEVNULL}
        process = subprocess.Popen(
            [*self.prefix, *map(str, command)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            # It is ignored by what a shell without job control starts in the background.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            **{**defaults, **options},  # type: ignore[call-overload]
        )
        self.processes.append(process)
        return process

    def avocado(self, *arguments: str | Path, **options: object) -> subprocess.Popen[str]:
        """Start Avocado."""
        return self.popen(self.python, "-m", "avocado", *arguments, **options)

    def output(self, *arguments: str | Path) -> str:
        """Run Avocado, and return what it prints when it succeeds."""
        code, text = finish(self.avocado(*arguments))
        assert code == 0, text
        return text

    def vt_test(self, name: str, outcome: str = "pass") -> VTTest:
        """Make a VT test."""
        return VTTest(self, name, outcome)

    def run(self, *tests: VTTest | Path, options: Sequence[str] = ()) -> subprocess.Popen[str]:
        """Start ``avocado run``, or what comes nearest where that does not read recipes."""
        if AVOCADO_READS_RECIPES:
            return self.avocado("run", "--disable-sysinfo", *options, "--", *recipes(tests))
        assert not options
        return self.job_api({}, *tests)

    def job_api(self, config: dict[str, object], *tests: VTTest | Path) -> subprocess.Popen[str]:
        """Start a job by the Job API with a suite for each test."""
        return self.popen(self.python, HERE / "job_api.py", json.dumps(config), *recipes(tests))

    def close(self) -> None:
        """End what is still running."""
        for process in self.processes:
            # Its whole session: a job's tests are processes of their own.
            for pid in session(process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream:
                    stream.close()


class VTTest:
    """A VT test that runs until told to end.

    :param sandbox: where it runs
    :param name: its name
    :param outcome: ``pass`` or ``fail``
    """

    def __init__(self, sandbox: Sandbox, name: str, outcome: str) -> None:
        self.record = sandbox.root / f"{name}.record"
        self.until = sandbox.root / f"{name}.until"
        self.recipe = sandbox.root / f"{name}.json"
        parameters = {
            "name": name,
            "shortname": name,
            "vm_type": "qemu",
            "type": "hold",
            "provider": "sandbox",
            "vms": "",
            "start_vm": "no",
            "not_preprocess": "yes",
            "main_vm": "vm1",
            "nettype": "user",
            "record": str(self.record),
            "until": str(self.until),
            "outcome": outcome,
        }
        self.recipe.write_text(
            json.dumps({"kind": "avocado-vt", "uri": name, "kwargs": parameters})
        )

    def end(self) -> None:
        """Let the test end, now or as soon as it runs."""
        self.until.touch()

    def notes(self) -> list[tuple[str, float]]:
        """What the test has recorded: pairs of ``begin`` or ``end`` and seconds."""
        lines = self.record.read_text().splitlines() if self.record.exists() else []
        return [(what, float(when)) for what, when in map(str.split, lines)]

    @property
    def has_begun(self) -> bool:
        """Whether it has started to run."""
        return bool(self.notes())


def recipes(tests: Sequence[VTTest | Path]) -> list[Path]:
    """The recipes of tests, of which some may be recipes already."""
    return [test.recipe if isinstance(test, VTTest) else test for test in tests]


def run_as(uid: int) -> list[str]:
    """The prefix of a command to run it as another user.

    The interpreter may lie in root's home: so the user may read everything, but not write.
    """
    user = [f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]
    capability = "+dac_read_search"
    return ["setpriv", *user, f"--inh-caps={capability}", f"--ambient-caps={capability}"]


def can_act_as_others() -> bool:
    """Whether commands can be run as another user; root in a container often cannot."""
    if os.getuid() != 0 or not shutil.which("setpriv"):
        return False
    return subprocess.run([*run_as(1), "true"], check=False, capture_output=True).returncode == 0


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Wait for a process to end, and return its exit code and what it printed."""
    try:
        text, _ = process.communicate(timeout=HANG)
    except subprocess.TimeoutExpired:
        # A Python tells where it hangs.
        process.send_signal(signal.SIGABRT)
        text, _ = process.communicate(timeout=HANG)
        raise AssertionError(f"it hangs: {text}") from None
    return process.returncode, text


def wait_for(what: Callable[[], object], process: subprocess.Popen[str] | None = None) -> None:
    """Wait until something is so; fail when the process that is to bring it about ends before."""
    deadline = time.monotonic() + HANG
    while not what():
        if process and process.poll() is not None and not what():
            raise AssertionError(f"ended too early: {finish(process)}")
        if time.monotonic() > deadline:
            if process:
                process.kill()
            raise AssertionError(f"waited for too long: {process and finish(process)}")
        time.sleep(0.02)


def session(leader: int) -> dict[int, bytes]:
    """The processes of a session that have not ended, other than its leader.

    :return: their command lines by their PIDs
    """
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != leader:
            with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                # One that nobody has waited for yet has no command line any more.
                if os.getsid(int(entry.name)) == leader:
                    found[int(entry.name)] = (entry / "cmdline").read_bytes()
    return {pid: command for pid, command in found.items() if command}


def running_tests(job: subprocess.Popen[str]) -> dict[int, bytes]:
    """The processes of a job that run a test."""
    return {pid: text for pid, text in session(job.pid).items() if b"\0task-run\0" in text}
