"""A HOME in which avocado-vt is bootstrapped, and runs VT tests with real QEMU
guests."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

from sandbox import Sandbox, finish, processes, running_tests, wait_for

HERE = Path(__file__).resolve().parent
# A guest that runs everywhere.
CONFIG = """
[plugins.vtjoblock]
dir = {home.lock_dir}
[vt]
type = qemu
[vt.common]
arch = x86_64
machine_type = i440fx
nettype = user
tmp_dir = {home.root}/tmp
[vt.qemu]
accel = tcg
smp = 1
sandbox = off
"""
#: What avocado-vt asks for, and the packages of Debian that have it.
TOOLS = "qemu-system-x86_64 qemu-img qemu-io tcpdump ip arping nc xz diff gcc"
PACKAGES = (
    "qemu-system-x86 qemu-utils tcpdump iproute2 arping nmap p7zip-full "
    "netcat-openbsd xz-utils gcc"
)
PATH = "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin"
#: What the command line of a test has, which names all the others, too; that of two
#: helpers of avocado-vt that touch no image; and that of a guest.
KINDS = TEST, HELPER, SNIFFER, GUEST = (
    " task-run ",
    "aexpect_helper",
    "tcpdump",
    "/qemu-system",
)
#: An environment variable of a job with a guest, which all that descends from it
#: inherits.
VARIABLE = "VT_JOBLOCK_TEST"


class GuestHome(Sandbox):
    """A user's home with a guest image, and real QEMU to boot it.

    Its path is short, since sockets lie below it.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        (self.bin / "tcpdump").unlink()
        (self.bin / "qemu-kvm").unlink()
        (self.bin / "qemu-kvm").symlink_to(
            str(shutil.which("qemu-system-x86_64", path=PATH))
        )
        shutil.copytree(HERE / "provider", root / "provider", dirs_exist_ok=True)
        (root / "tmp").mkdir()
        data = self.home / "avocado/data/avocado-vt"
        bootstrap = "vt-bootstrap --vt-type qemu --yes-to-all --vt-no-downloads"
        self.output(*bootstrap.split(), "--vt-skip-verify-download-assets")
        # These are downloaded as soon as they are looked into.
        for provider in (data / "virttest/test-providers.d").glob("io-github-*.ini"):
            provider.unlink()
        self.image = data / "images/jeos-27-x86_64.qcow2"
        subprocess.run(
            ["qemu-img", "create", "-q", "-f", "qcow2", self.image, "16M"], check=True
        )
        self.image_before = self.image.read_bytes()


class GuestJob:
    """A job whose test holds a guest until it is told to end, and others that want its
    lock."""

    def __init__(self, home: GuestHome, config: str = "", **parameters: str) -> None:
        home.configure(CONFIG.format(home=home) + config)
        self.home = home
        self.test = home.vt_test("guest", **parameters)
        self.guest_counts = True  # else it is left on purpose
        self.others = 0  # how many have been started
        self.refusal = ""  # what the last one of them has printed
        self.last_seen = 0.0  # when something that counts was last seen to live
        recipe = json.loads(self.test.recipe.read_text())["kwargs"]
        names = {"record", "until", "outcome", "guest", "starts", "runs", *parameters}
        extra = [f"--vt-extra-params={name}={recipe[name]}" for name in names]
        self.avocado = home.avocado(
            *("run", "--disable-sysinfo", *extra, "--", "hold_guest"),
            env={**home.environment, VARIABLE: str(home.root)},
        )
        wait_for(lambda: self.test.has_begun, self.avocado)
        assert home.image.read_bytes() != home.image_before

    def living(self) -> dict[int, str]:
        """Of the processes of this job the kinds, or else the command lines, by their
        PIDs."""
        mark = f"{VARIABLE}={self.home.root}".encode()
        ours = processes(
            lambda entry: mark in (entry / "environ").read_bytes().split(b"\0")
        )
        lines = {
            pid: os.fsdecode(line).replace("\0", " ") for pid, line in ours.items()
        }
        return {
            pid: next((kind for kind in KINDS if kind in line), line)
            for pid, line in lines.items()
        }

    def running(self, *kinds: str) -> set[int]:
        return {pid for pid, kind in self.living().items() if kind in kinds}

    def signal(self, signum: int, *kinds: str) -> None:
        for pid in self.running(*kinds):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signum)

    def another_runs(self) -> bool:
        """Start another job; assert that it runs if nothing of this one does, and only
        then."""
        self.others += 1
        test = self.home.vt_test(f"other{self.others}").end()
        looks = [self._look()]
        other = self.home.run(test)
        began = 0.0
        while other.poll() is None:
            # Not when the test itself begins: before, avocado-vt may end a guest of
            # another job.
            if not began and running_tests(other):
                began = time.monotonic()
            looks.append(self._look())
            time.sleep(0.05)
        code, self.refusal = finish(other)
        looks.append(self._look())
        if not test.has_begun:
            assert code == 2, self.refusal
            self._assert_true(self.refusal, looks)
            return False
        assert code == 0, self.refusal
        assert self.last_seen < began, f"it ran beside some of {looks[0]}"
        assert list(self.home.lock_dir.iterdir()) == []
        return True

    def _look(self) -> dict[int, str]:
        now = time.monotonic()
        living = self.living()
        if self._counting(living):
            self.last_seen = now
        return living

    def _counting(self, living: dict[int, str]) -> set[int]:
        """Those of some processes that keep the lock."""
        kinds = {*living.values()} - {HELPER, SNIFFER} if self.guest_counts else {TEST}
        return {pid for pid, kind in living.items() if kind in kinds}

    def _assert_true(self, text: str, looks: list[dict[int, str]]) -> None:
        """Assert that a refusal names what keeps the lock, and says to kill nothing
        else."""
        ever = {pid: kind for look in looks for pid, kind in look.items()}
        always = {pid: ever[pid] for pid in set.intersection(*map(set, looks))}
        named = {
            int(pid)
            for pid in re.findall(r"^ +(?:PID: +)?(\d+)(?:  |$)", text, re.MULTILINE)
        }
        # A young helper may be about to start a guest.
        helpers = {pid for pid, kind in ever.items() if kind == HELPER}
        assert named & (self._counting(ever) | helpers), f"none of {ever}: {text}"
        assert not named & {pid for pid, kind in looks[0].items() if kind == SNIFFER}, (
            text
        )
        if "another job holds the lock" in text:
            assert named == {self.avocado.pid} <= looks[0].keys(), text
        else:
            assert self._counting(always) - {self.avocado.pid} <= named, (
                f"{always}: {text}"
            )
        # A test ends its guest by itself, and restores images.
        if TEST in always.values():
            assert not advice(text), text
        elif self.avocado.pid not in ever and TEST not in ever.values():
            # In the middle of an exec any process may be one: it is shown with
            # brackets.
            unclear = "There may be more" in text or re.search(
                r"^ +\d+  \[", text, re.MULTILINE
            )
            guests = {pid for pid in named if ever.get(pid) == GUEST}
            assert advice(text) == guests or unclear, text


def advice(text: str) -> set[int]:
    """The PIDs that a refusal says to kill."""
    return {
        int(pid)
        for line in re.findall(r"^ +kill (.+)$", text, re.MULTILINE)
        for pid in line.split()
        if pid != "PID"
    }
