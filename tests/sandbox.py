"""A HOME of its own in which the real Avocado runs real VT tests, without QEMU."""

from __future__ import annotations

import contextlib
import importlib
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

Popen = subprocess.Popen[str]
HERE = Path(__file__).resolve().parent
AVOCADO = int(metadata.version("avocado-framework").split(".")[0])
AVOCADO_READS_RECIPES = AVOCADO >= 105
FAILURE = "Failure trying to set Avocado-VT job lock: "
#: A plugin of Avocado that does nothing but to be loaded at every start.
NOTHING = """
from avocado.core.plugin_interfaces import Init
class Nothing(Init):
    name = description = "nothing"
    def initialize(self): pass
"""
HANG = 120  # seconds


class Sandbox:
    """A user's home with a VT test provider, a lock directory, and the commands that
    use them."""

    python = sys.executable

    def __init__(self, root: Path) -> None:
        self.root = root
        self.home = root / "home"
        self.lock_dir = root / "locks"
        self.plugins = root / "plugins"
        self.latest = self.home / "avocado/job-results/latest"
        self.config = self.home / ".config/avocado/avocado.conf"
        self.processes: list[Popen] = []
        self.prefix: list[str] = []
        self.bin = root / "bin"
        self._first = ""
        providers = self.home / "avocado/data/avocado-vt/virttest/test-providers.d"
        downloads = providers / "downloads"
        for directory in (self.lock_dir, self.config.parent, self.bin, downloads):
            directory.mkdir(parents=True)
        (downloads / "keep").touch()
        # avocado-vt starts these before each test, though here are no guests for them.
        for program in ("qemu-kvm", "tcpdump"):
            (self.bin / program).symlink_to(shutil.which("true") or "/bin/true")
        shutil.copytree(HERE / "vt_provider", root / "provider")
        provider = f"[provider]\nuri: file://{root}/provider\n[qemu]\nsubdir: qemu/\n"
        (providers / "sandbox.ini").write_text(provider)
        self.configure(f"[plugins.vtjoblock]\ndir = {self.lock_dir}\n")

    def configure(self, text: str) -> None:
        self.config.write_text(text)

    def add_to_config(self, text: str) -> None:
        """Add to the user's avocado.conf, at whose end are the options of the lock."""
        self.configure(f"{self.config.read_text()}{text}\n")

    def belong_to(self, uid: int) -> None:
        for path in [self.root, *self.root.rglob("*")]:
            os.chown(path, uid, uid, follow_symlinks=False)
        self.prefix = run_as(uid)

    @property
    def environment(self) -> dict[str, str]:
        programs = [self.bin, Path(self.python).parent, "/usr/local/bin", "/usr/bin"]
        places = {
            "HOME": self.home,
            "TMPDIR": self.root,
            "PYTHONPATH": self.plugins,
            "PATH": ":".join(map(str, [*programs, "/bin", "/usr/sbin", "/sbin"])),
        }
        variables = {name: str(place) for name, place in places.items()}
        return {**variables, "LC_ALL": "C.UTF-8", "PYTHONFAULTHANDLER": "1"}

    def locks(self) -> list[Path]:
        return sorted(self.lock_dir.glob("avocado-vt-joblock-*.pid"))

    def popen(self, *command: str | Path, **options: object) -> Popen:
        """Start a command in the sandbox; :meth:`close` ends it with all that it
        started."""
        usual: dict[str, object] = {
            "env": self.environment,
            "cwd": self.root,
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.STDOUT,
            "text": True,
            "start_new_session": True,
            "preexec_fn": heed_signals,
        }
        words = [*self.prefix, *map(str, command)]
        process = subprocess.Popen(words, **{**usual, **options})
        self.processes.append(process)
        return process

    def avocado(self, *arguments: str | Path, **options: object) -> Popen:
        return self.popen(self.python, "-m", "avocado", *arguments, **options)

    def output(self, *arguments: str | Path) -> str:
        return ended(self.avocado(*arguments))

    def vt_test(self, name: str, **parameters: str) -> VTTest:
        return VTTest(self, name, **parameters)

    def plugin(self, name: str, source: str, **entry_points: str) -> None:
        """Install a module with plugins of Avocado: classes by their kinds, with __ for
        a dot."""
        info = self.plugins / f"{name}-1.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        metadata_of_it = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n"
        (info / "METADATA").write_text(metadata_of_it)
        (self.plugins / f"{name}.py").write_text(source)
        with (info / "entry_points.txt").open("w") as file:
            for kind, where in entry_points.items():
                group = kind.replace("__", ".")
                file.write(f"[avocado.plugins.{group}]\n{name} = {name}:{where}\n")

    def first(self, source: str) -> None:
        """Have every Avocado here run this, too, before anything else, to change what
        it does then."""
        self._first += source
        self.plugin("first", self._first + NOTHING, init="Nothing")

    def change(self, room: str, **constants: float) -> None:
        """Have every Avocado here use other constants in a room of the package."""
        module = importlib.import_module(f"avocado_vt_joblock.{room}")
        source = f"from avocado_vt_joblock import {room}\n"
        for name, value in constants.items():
            assert hasattr(module, name), f"{room} has no {name}"
            source += f"{room}.{name} = {value!r}\n"
        self.first(source)

    def run(
        self, *tests: VTTest | Path, options: Sequence[str] = (), **popen: object
    ) -> Popen:
        """Start ``avocado run``, or what comes nearest where that does not read
        recipes."""
        if AVOCADO_READS_RECIPES:
            words = ["run", "--disable-sysinfo", *options, "--", *map(str, tests)]
            return self.avocado(*words, **popen)
        assert not options
        return self.job_api(*tests, **popen)

    def job_api(
        self,
        *tests: VTTest | Path,
        config: dict[str, object] | None = None,
        how: dict[str, object] | None = None,
        **popen: object,
    ) -> Popen:
        """Start a program that runs a job by the Job API, with a suite for each test.

        :param config: the configuration of the job
        :param how: what ``job_api.py`` does otherwise
        """
        words = [json.dumps(config or {}), json.dumps(how or {}), *map(str, tests)]
        return self.popen(self.python, HERE / "job_api.py", *words, **popen)

    def living(self) -> dict[int, bytes]:
        """Return what runs here, by PID."""
        ours = f"TMPDIR={self.root}".encode()

        def is_here(entry: Path) -> bool:
            return ours in (entry / "environ").read_bytes().split(b"\0")

        return processes(is_here)

    def close(self) -> None:
        while living := self.living():
            for pid in living:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for process in self.processes:
            with process:
                pass  # This closes its streams, and waits for it.


class VTTest:
    """A VT test that runs until told to end; ``hold.py`` describes its parameters."""

    def __init__(self, sandbox: Sandbox, name: str, **parameters: str) -> None:
        self.sandbox = sandbox
        self.guest_pid = sandbox.root / f"{name}.guest"
        self.record = sandbox.root / f"{name}.record"
        # What the command prints that it runs.
        self.printed = sandbox.root / f"{name}.record.printed"
        self.until = sandbox.root / f"{name}.until"
        self.recipe = sandbox.root / f"{name}.json"
        recipe = json.loads((HERE / "vt_provider/recipe.json").read_text())
        files = {"record": self.record, "until": self.until, "guest": self.guest_pid}
        recipe["kwargs"].update({key: str(file) for key, file in files.items()})
        recipe["kwargs"].update(name=name, shortname=name, **parameters)
        self.recipe.write_text(json.dumps({**recipe, "uri": name}))

    def __str__(self) -> str:
        return str(self.recipe)

    def end(self) -> VTTest:
        self.until.touch()
        return self

    @property
    def guest(self) -> int:
        return int(self.guest_pid.read_text())

    def notes(self) -> list[tuple[str, float]]:
        lines = self.record.read_text().splitlines() if self.record.exists() else []
        return [(what, float(when)) for what, when in map(str.split, lines)]

    @property
    def has_begun(self) -> bool:
        return bool(self.notes())

    @property
    def is_silent(self) -> bool:
        results = self.sandbox.home / "avocado/job-results"
        logs = results.glob("job-*/test-results/*/debug.log")
        sign = f"{self.record} is silent from now on"
        return any(sign in log.read_text() for log in logs)


#: What starts a process with the name of a guest.
GUEST = "bash -c 'exec -a qemu-kvm sleep 1000'"


def run_as(uid: int) -> list[str]:
    """Return the prefix of a command to run it as another user.

    The interpreter may lie in root's home: so the user may read everything, but not
    write.
    """
    user = [f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]
    capability = "+dac_read_search"
    may = [f"--inh-caps={capability}", f"--ambient-caps={capability}"]
    return ["setpriv", *user, *may]


def can_act_as_others() -> bool:
    # Root in a container often cannot.
    if os.getuid() != 0 or not shutil.which("setpriv"):
        return False
    words = [*run_as(1), "true"]
    return subprocess.run(words, check=False, capture_output=True).returncode == 0


def finish(process: Popen) -> tuple[int, str]:
    try:
        text, _ = process.communicate(timeout=HANG)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)  # A Python tells where it hangs.
        text, _ = process.communicate(timeout=HANG)
        raise AssertionError(f"it hangs: {text}") from None
    return process.returncode, text


def ended(process: Popen, expected: int = 0) -> str:
    code, text = finish(process)
    assert code == expected, text
    return text


def wait_for(what: Callable[[], object], process: Popen | None = None) -> None:
    """Wait until something is so; fail when the process that is to bring it about ends
    before."""
    deadline = time.monotonic() + HANG
    while not what():
        if process and process.poll() is not None and not what():
            raise AssertionError(f"ended too early: {finish(process)}")
        if time.monotonic() > deadline:
            if process:
                process.kill()
            raise AssertionError(f"waited for too long: {process and finish(process)}")
        time.sleep(0.02)


def running_tests(job: Popen) -> dict[int, bytes]:
    """Return the processes that run tests of a job, by PID."""
    all_of_it = processes(lambda entry: os.getsid(int(entry.name)) == job.pid)
    sign = b"\0task-run\0"
    return {pid: command for pid, command in all_of_it.items() if sign in command}


def start(sandbox: Sandbox, test: VTTest, options: Sequence[str] = ()) -> Popen:
    """Start a job that runs until its test is told to end; wait until that has begun.

    A signal that interrupts Avocado while it logs may have it wait for itself for ever.
    """
    job = sandbox.run(test, options=options)
    wait_for(lambda: test.has_begun and test.is_silent, job)
    return job


def start_waiting(sandbox: Sandbox, name: str) -> tuple[Popen, VTTest, Path]:
    """Start a job that waits for the lock; wait until it says so.

    :return: the job, its test, and the file in which is what it prints
    """
    test = sandbox.vt_test(name).end()
    printed = sandbox.root / f"{name}.printed"
    with printed.open("w") as file:
        job = sandbox.run(test, stdout=file)
    wait_for(lambda: "Waiting" in printed.read_text(), job)
    return job, test, printed


def assert_runs(sandbox: Sandbox, name: str) -> str:
    test = sandbox.vt_test(name).end()
    text = ended(sandbox.run(test))
    assert [what for what, _ in test.notes()] == ["begin", "end"]
    assert list(sandbox.lock_dir.iterdir()) == []
    return text


def assert_refused(job: Popen, test: VTTest) -> str:
    text = ended(job, 2)
    assert not test.has_begun
    assert text.count(FAILURE) == 1
    assert "Traceback" not in text
    return text


def heed_signals() -> None:
    # nohup(1) has SIGHUP ignored, and a shell without job control SIGINT, by what it
    # starts.
    for signum in (signal.SIGHUP, signal.SIGINT):
        signal.signal(signum, signal.SIG_DFL)


def processes(is_wanted: Callable[[Path], bool]) -> dict[int, bytes]:
    """Return command lines by PID; a process that nobody has waited for yet has none
    any more."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (entry / "cmdline").read_bytes()
            if command and is_wanted(entry):
                found[int(entry.name)] = command
    return found
