"""Measure the lock beside others; write the page docs/figures.rst and its plot."""

import logging
import os
import random
import tempfile
import time
from contextlib import ExitStack, suppress
from importlib import metadata
from operator import truediv
from pathlib import Path
from platform import python_version
from statistics import median
from subprocess import Popen, getoutput
from types import SimpleNamespace

import filelock
from avocado.core.exceptions import JobError

from avocado_vt_joblock.plugin import VT_KIND, VTJobLock
from avocado_vt_joblock.settings import DIR, TIMEOUT

DOCS = Path(__file__).resolve().parents[1] / "docs"
OURS, VT, SOFT, FLOOR = "this plugin", "avocado-vt", "SoftFileLock", "floor"
STYLES = {OURS: "C0o-", VT: "C1^-", SOFT: "C2D--", FLOOR: "C7x:"}
#: How many rounds with so many other entries in the lock directory.
ROUNDS = {1_000: 500, 10_000: 150, 100_000: 40}
#: How often to go from no more processes to so many, and how many rounds there each time.
TURNS, MORE, LOCK_ROUNDS, STALE_ROUNDS = 3, 3_000, 300, 20
SLEEP = ["setpriv", "--pdeathsig", "KILL", "sleep", "600"]
#: For how long to wait for a lock that is held, in seconds.
WAIT = 20


def locks(directory: str) -> dict:
    """The contenders: functions that take a lock, and return what releases it."""
    from avocado_vt.plugins.vt_joblock import VTJobLock as VTPlugin
    from avocado_vt.test import VirtTest

    job = SimpleNamespace(
        unique_id="0" * 40,
        config={DIR: directory},
        test_suites=[SimpleNamespace(enabled=True, tests=[SimpleNamespace(kind=VT_KIND)])],
        result=SimpleNamespace(tests=[{"status": "PASS"}]),
        exitcode=0,
        # For avocado-vt's plugin, which knows VT tests by what Avocado made of them in the past.
        test_suite=SimpleNamespace(tests=[(VirtTest, {})]),
    )
    vt_plugin = VTPlugin()
    vt_plugin.lock_dir = directory

    def ours(timeout=0):
        plugin = VTJobLock()
        job.config[TIMEOUT], job.status = timeout, "PASS"
        plugin.pre(job)
        return lambda: plugin.post(job)

    def vt():
        vt_plugin.pre_tests(job)
        return lambda: vt_plugin.post_tests(job)

    def soft(timeout=0):
        lock = filelock.SoftFileLock(f"{directory}/soft.lock", timeout=timeout)
        lock.acquire()
        return lock.release

    def floor():
        path = f"{directory}/floor.pid"
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        os.write(fd, b"%d" % os.getpid())
        os.close(fd)
        os.listdir(directory)  # noqa: PTH208 - nothing lists a directory faster
        return lambda: os.unlink(path)  # noqa: PTH108 - nor removes a file

    return {OURS: ours, VT: vt, SOFT: soft, FLOOR: floor}


def take_turns(contenders: dict, rounds: int, times: dict, stale: str = "") -> None:
    """Take and release each lock once a round, after a round that does not count.

    :param stale: the directory, if a process shall have left a lock there before
    """
    for number in range(rounds + 1):
        for name in random.sample(list(contenders), len(contenders)):
            if stale and name != FLOOR:
                if not (pid := os.fork()):
                    try:
                        # What releases it must not go before the process does.
                        _release = contenders[name]()
                    finally:
                        os._exit(0)
                os.waitpid(pid, 0)
                assert any(Path(stale).iterdir()), f"{name} has left no stale lock"
            started = time.perf_counter()
            contenders[name]()()
            if number:
                times.setdefault(name, []).append(time.perf_counter() - started)


def waiting(acquire) -> float:
    """Wait in vain; return the CPU time of this process meanwhile, as a part of a core."""
    release = acquire()
    started, used = time.monotonic(), time.process_time()
    with suppress(JobError, filelock.Timeout):
        acquire(WAIT)
    used, waited = time.process_time() - used, time.monotonic() - started
    assert waited >= WAIT, "it did not wait"
    release()
    return used / waited


def measure(directory: str) -> tuple:
    """Times by whether there is a stale lock, by more processes, and by other entries."""
    contenders = locks(directory)
    times = {(stale, more, 0): {} for stale in (False, True) for more in (0, MORE)}
    for more in (0, MORE) * TURNS:
        with ExitStack() as stack:
            for _ in range(more):
                # It ends with this process, however that ends.
                stack.callback(stack.enter_context(Popen(SLEEP)).kill)
            take_turns(contenders, LOCK_ROUNDS, times[False, more, 0])
            take_turns(contenders, STALE_ROUNDS, times[True, more, 0], stale=directory)
        assert not any(Path(directory).iterdir()), "a lock file was left"
    waits = {name: f"{waiting(contenders[name]):.2%}" for name in (OURS, SOFT)}
    for entries, rounds in ROUNDS.items():
        for number in range(entries):
            Path(directory, f"tmp{number:08}").touch()
        take_turns(contenders, rounds, times.setdefault((False, 0, entries), {}))
    return dict(sorted(times.items())), waits


def table(times: dict, waits: dict) -> str:
    rows = [["what", *STYLES, "to floor", "to avocado-vt"]]
    for (stale, more, entries), row in times.items():
        what = "a stale lock" if stale else f"{entries:,} entries"
        what += f", {more:,} more processes" if more else ""
        medians = [median(row[name]) * 1e3 for name in STYLES]
        ratios = [median(map(truediv, row[OURS], row[to])) for to in (FLOOR, VT)]
        rows.append([what, *map(shown, medians + ratios)])
    rows.append(["waiting, CPU time", *(waits.get(name, "") for name in STYLES), "", ""])
    widths = [max(map(len, column)) for column in zip(*rows)]
    rule = "  ".join("=" * width for width in widths)
    head, *body = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join([rule, head, rule, *body, rule])


def shown(number: float) -> str:
    return f"{number:.3g}" if number < 1000 else f"{number:,.0f}"


def draw(times: dict) -> None:
    from matplotlib import pyplot as plt

    plt.rc("svg", hashsalt="figures", fonttype="none")
    _, ax = plt.subplots(figsize=(5, 3.6), layout="constrained")
    numbers = [0, *ROUNDS]
    for name, style in STYLES.items():
        medians = [median(times[False, 0, number][name]) * 1e3 for number in numbers]
        ax.plot(numbers, medians, style, label=name)
    ax.set_xscale("symlog", linthresh=1_000)
    ax.set_yscale("log")
    ax.set_xticks(numbers, [f"{number:,}" for number in numbers])
    ax.yaxis.set_major_formatter("{x:g}")
    ax.set(xlabel="other entries in the lock directory", ylabel="milliseconds")
    ax.legend()
    plt.savefig(DOCS / "figures.svg", metadata={"Date": None})


def main() -> None:
    # Without it avocado-vt tells what programs are not installed.
    logging.getLogger().addHandler(logging.NullHandler())
    place = tempfile.gettempdir()
    before, processes = os.getloadavg()[0], len(list(Path("/proc").glob("[0-9]*")))
    with tempfile.TemporaryDirectory() as home, tempfile.TemporaryDirectory() as directory:
        # Avocado, avocado-vt and matplotlib keep files in the home.
        os.environ["HOME"] = home
        times, waits = measure(directory)
        after = os.getloadavg()[0]
        draw(times)
    kernel = getoutput("uname -sr")
    cpu = getoutput("lscpu | sed -n 's/^Model name: *//p'")
    system = getoutput(f"findmnt --noheadings --output=FSTYPE --target={place}")
    packages = ("avocado-framework", "avocado-framework-plugin-vt", "filelock")
    versions = [f"{name} {metadata.version(name)}" for name in packages]
    versions = ", ".join([f"Python {python_version()}", *versions])
    page = f"""\
.. Generated by "make bench": do not edit.

Figures
=======

How much time does a job need to take the lock and to release it? ``make bench`` compares:

* *this plugin*: its ``pre()`` and ``post()``, for a job whose tests have all ended.
* *avocado-vt*: the same for avocado-vt's own plugin. It works with old versions of Avocado only.
* *SoftFileLock*: a lock of the package ``filelock``. It need not list the directory.
* *floor*: no lock. Create a file, write the PID, close it, list the directory, remove the file.

| {os.cpu_count()} x {cpu}, {kernel}, {system} at ``{place}``, {processes} processes.
| {versions}.
| The load (average of one minute) was {before:.1f} before and {after:.1f} after.

Times are in milliseconds, each the median of many rounds. In a round all four take turns, each time
in another order. The last two columns are ratios: the time of this plugin divided by the time of
the other in the same round. They are medians, too.

{table(times, waits)}

* *Entries* are other files in the lock directory.
* *More processes* do nothing: they sleep.
* *A stale lock* is one whose process has ended. This plugin then looks at all processes once,
  because tests and guests of that job may still run. SoftFileLock looks at all of them, too.
* *Waiting* is for {WAIT} seconds for a lock that is held. The figure is the CPU time in percent of
  one core. avocado-vt's plugin cannot wait.

.. figure:: figures.svg
   :alt: The times of the table, by the number of other entries in the lock directory.

   Time to take and release a lock, by the number of other entries in the lock directory.
"""
    (DOCS / "figures.rst").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
