"""A HOME in which avocado-vt is bootstrapped, and runs VT tests with real QEMU guests."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from sandbox import HANG, Sandbox, VTTest, finish, wait_for

HERE = Path(__file__).resolve().parent
BOOTSTRAP = (
    *("vt-bootstrap", "--vt-type", "qemu", "--yes-to-all"),
    *("--vt-no-downloads", "--vt-skip-verify-download-assets"),
)
#: What avocado-vt asks for, and the packages of Debian that have it.
TOOLS = (
    *("qemu-system-x86_64", "qemu-img", "qemu-io", "tcpdump"),
    *("ip", "arping", "nc", "xz", "diff", "gcc"),
)
PACKAGES = (
    "qemu-system-x86 qemu-utils tcpdump iproute2 arping nmap p7zip-full netcat-openbsd xz-utils gcc"
)
PATH = "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin"
#: How many processes a refusal describes.
LIMIT = 20
#: An environment variable of a job with a guest, which all that descends from it inherits.
VARIABLE = "VT_JOBLOCK_TEST"


def missing_tools() -> list[str]:
    """What avocado-vt needs for a guest and is not installed."""
    return [tool for tool in TOOLS if not shutil.which(tool, path=PATH)]


class GuestHome(Sandbox):
    """A user's home with a guest image, and real QEMU to boot it.

    :param root: an empty directory; a short path, since sockets lie below it
    """

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.hang_ups("default")
        (self.bin / "tcpdump").unlink()
        (self.bin / "qemu-kvm").unlink()
        (self.bin / "qemu-kvm").symlink_to(str(shutil.which("qemu-system-x86_64", path=PATH)))
        shutil.copytree(HERE / "provider", root / "provider", dirs_exist_ok=True)
        data = self.home / "avocado/data/avocado-vt"
        self.output(*BOOTSTRAP)
        # These are downloaded as soon as they are looked into.
        for provider in (data / "virttest/test-providers.d").glob("io-github-*.ini"):
            provider.unlink()
        self.image = data / "images/jeos-27-x86_64.qcow2"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", self.image, "16M"], check=True)
        self.image_before = digest(self.image)
        self.set_up()

    def set_up(self, more: str = "") -> None:
        """Configure avocado-vt for a guest that runs everywhere, and the lock directory.

        :param more: more of Avocado's configuration
        """
        (self.root / "tmp").mkdir(exist_ok=True)
        self.configure(
            f"""[plugins.vtjoblock]
dir = {self.lock_dir}
[vt]
type = qemu
[vt.common]
arch = x86_64
machine_type = i440fx
nettype = user
tmp_dir = {self.root}/tmp
[vt.qemu]
accel = tcg
smp = 1
sandbox = off
{more}"""
        )

    def hang_ups(self, how: str) -> None:
        """Have jobs start with SIGHUP as it is by default, or ignored as nohup(1) does.

        avocado-vt's helpers give each guest a terminal, so where they die a SIGHUP ends the guest.

        :param how: ``default`` or ``ignore``
        """
        self.prefix = ["env", f"--{how}-signal=HUP"]

    def start(self, *options: str, **parameters: str) -> GuestJob:
        """Start a job with a guest, and return it as soon as its test runs.

        :param options: of ``avocado run``
        :param parameters: of the test
        """
        return GuestJob(self, options, parameters)


class GuestJob:
    """A job with a test that holds a guest until it is told to end.

    :param home: where it runs
    :param options: of ``avocado run``
    :param parameters: of the test
    """

    def __init__(
        self, home: GuestHome, options: tuple[str, ...], parameters: dict[str, str]
    ) -> None:
        self.home = home
        self.test = VTTest(home, "guest", "pass")
        recipe = json.loads(self.test.recipe.read_text())["kwargs"]
        held = {key: recipe[key] for key in ("record", "until", "outcome", "guest")}
        words = [
            f"{key}={value}" for key, value in {**held, "clean_up_takes": "0", **parameters}.items()
        ]
        extra = [word for pair in words for word in ("--vt-extra-params", pair)]
        self.avocado = home.avocado(
            *("run", "--disable-sysinfo", *options, *extra, "--", "hold_guest"),
            env={**home.environment, VARIABLE: str(home.root)},
        )
        wait_for(lambda: self.test.has_begun, self.avocado)
        assert digest(home.image) != home.image_before

    def living(self) -> dict[int, str]:
        """The processes of this job that have not ended: their command lines by their PIDs."""
        # In the middle of an exec a process has no environment for a moment.
        return self._look() or self._look()

    def _look(self) -> dict[int, str]:
        mark = f"{VARIABLE}={self.home.root}".encode()
        users = {0, os.getuid()}
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                # Root's tcpdump goes on as a user of its own, whose processes do not count.
                uid = entry.stat().st_uid
                if uid in users and mark in (entry / "environ").read_bytes().split(b"\0"):
                    found[int(entry.name)] = os.fsdecode((entry / "cmdline").read_bytes())
        return {pid: command.replace("\0", " ") for pid, command in found.items()}

    def runner(self) -> int:
        """The process that Avocado has started for the test."""
        (pid,) = (pid for pid in self.tests() if parent(pid) == self.avocado.pid)
        return pid

    def forked_test(self) -> int:
        """The process that the runner has forked for the test."""
        runner = self.runner()
        (pid,) = (pid for pid in self.tests() if parent(pid) == runner)
        return pid

    def tests(self) -> set[int]:
        """The processes that run the test."""
        return self.running(" task-run ")

    def running(self, program: str) -> set[int]:
        """The processes that run a program."""
        return {pid for pid, command in self.living().items() if program in command}

    def avocado_has_ended(self) -> bool:
        """Whether Avocado itself has."""
        return self.avocado.poll() is not None


class Attempt(NamedTuple):
    """What came of another job."""

    #: What it printed.
    text: str
    #: Whether it was refused; else its test ran.
    refused: bool


class Contenders:
    """Other jobs with VT tests, started one after the other while a job ends.

    :param job: the job
    """

    def __init__(self, job: GuestJob) -> None:
        self.job = job
        self.count = 0
        self.refused = 0
        #: When something of the job was last seen to live.
        self.last_seen = 0.0

    def start_one(self) -> Attempt:
        """Start another job, and assert that it runs if nothing of the first does, and only then.

        What lives is looked at all the while: a process may end at any time.
        """
        self.count += 1
        test = self.job.home.vt_test(f"contender{self.count}")
        test.end()
        before = self._look()
        seen = dict(before)
        contender = self.job.home.run(test)
        while contender.poll() is None:
            seen.update(self._look())
            time.sleep(0.05)
        code, text = finish(contender)
        after = self._look()
        if test.has_begun:
            assert code == 0, text
            assert self.last_seen < test.notes()[0][1], f"it ran beside some of {seen}: {text}"
            return Attempt(text, refused=False)
        assert code == 2, text
        assert before, f"nothing of the job lived: {text}"
        self._assert_named(text, before, seen, after)
        self.refused += 1
        return Attempt(text, refused=True)

    def _look(self) -> dict[int, str]:
        now = time.monotonic()
        living = self.job.living()
        if living:
            self.last_seen = now
        return living

    def _assert_named(self, text: str, before: dict, seen: dict, after: dict) -> None:
        """Assert that a refusal names the processes that lived before, after and meanwhile."""
        named = {int(number) for number in re.findall(r"\b\d+\b", text)}
        assert named & seen.keys(), f"none of {seen}: {text}"
        avocado = self.job.avocado.pid
        if avocado in after:
            assert avocado in named, text
        elif avocado not in before:
            stable = before.keys() & after.keys()
            assert len(named & stable) >= min(len(stable), LIMIT), f"{stable} of {seen}: {text}"

    def start_until(self, so: Callable[[], object]) -> None:
        """Start other jobs until something is so."""
        deadline = time.monotonic() + HANG
        while not so():
            assert time.monotonic() < deadline, f"these do not end: {self.job.living()}"
            self.start_one()
            time.sleep(0.5)


def advice(text: str) -> set[int]:
    """The PIDs that a refusal says to kill."""
    (pids,) = re.findall(r"^ +kill ([0-9 ]+)$", text, re.MULTILINE)
    return {int(pid) for pid in pids.split()}


def kill(pids: Iterable[int], signum: int = signal.SIGKILL) -> None:
    """Send a signal to processes, of which some may have ended."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signum)


def parent(pid: int) -> int:
    """The process that has started another."""
    stat = Path(f"/proc/{pid}/stat").read_text()
    return int(stat.rpartition(")")[2].split()[1])


def digest(path: Path) -> str:
    """A checksum of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
