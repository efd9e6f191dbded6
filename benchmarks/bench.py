"""What the lock costs beside avocado-vt's own plugin, in one interleaved run: ``make
bench``.

In a round both take and release a lock, in random order. A ratio is the median of the
ratios of all rounds, so what else the machine does meanwhile touches both sides of it.
"""

import logging
import os
import random
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from statistics import median, quantiles
from types import SimpleNamespace

from avocado.core.exceptions import JobError
from avocado_vt.plugins.vt_joblock import VTJobLock as TheirLock
from avocado_vt.test import VirtTest

from avocado_vt_joblock import DIR, TIMEOUT, card, procfs, showing
from avocado_vt_joblock.lock import JobLock
from avocado_vt_joblock.plugin import VTJobLock, VTJobUnlock

#: Other entries in the directory, whether a stale lock is there, rounds, and the ratio
#: at most.
CASES = (
    (0, False, 300, "1.6"),
    (1_000, False, 150, "1.1"),
    (100_000, False, 15, "<1"),
    (0, True, 15, ""),
)
#: How often to go from no more processes to so many.
TURNS = 3
MORE = 3_000
#: How long to wait, in seconds.
WAIT = 20
#: How often to import Avocado, and to look.
IMPORTS = 30
LOOKS = 15
SLEEP = ["setpriv", "--pdeathsig", "KILL", "sleep", "600"]
#: The PID of no process: Linux has none above 2**22.
NOBODY = 2**22 + 1


def take_ours(directory, timeout=0):
    """Take the lock, for a job whose only test will have passed.

    :return: what releases it
    """
    suite = SimpleNamespace(enabled=True, tests=[SimpleNamespace(kind="avocado-vt")])
    result = SimpleNamespace(tests=[{"status": "PASS"}])
    ended = {
        "exitcode": 0,
        "status": "PASS",
        "result": result,
        "logfile": "",
        "post_tests": None,
    }
    config = {DIR: directory, TIMEOUT: timeout}
    job = SimpleNamespace(
        unique_id="0" * 40, config=config, test_suites=[suite], **ended
    )
    VTJobLock().pre(job)
    return lambda: VTJobUnlock().post(job)


def take_theirs(directory):
    """The same with avocado-vt's plugin, which knows VT tests by what they were in the
    past."""
    suite = SimpleNamespace(tests=[(VirtTest, {})])
    job, plugin = SimpleNamespace(unique_id="0" * 40, test_suite=suite), TheirLock()
    plugin.lock_dir = directory
    plugin.pre_tests(job)
    return lambda: plugin.post_tests(job)


def measure(take, directory, stale):
    """How long it takes to take a lock and to release it, in ms."""
    if stale:
        Path(directory, f"avocado-vt-joblock-{'1' * 40}-0-aaaaaaaa.pid").write_text(
            f"{NOBODY}\n\n"
        )
    started = time.perf_counter()
    take(directory)()
    return (time.perf_counter() - started) * 1e3


def compare(directories):
    """Print the table of both plugins."""
    rounds = [case for case in CASES for _ in range(case[2])]
    pairs = {(more, case): [] for more in (0, MORE) for case in CASES}
    for more in (0, MORE) * TURNS:
        others = [subprocess.Popen(SLEEP) for _ in range(more)]
        for case in random.sample(rounds, len(rounds)):
            entries, stale, *_ = case
            takes = random.sample([take_ours, take_theirs], 2)
            took = {take: measure(take, directories[entries], stale) for take in takes}
            pairs[more, case].append((took[take_ours], took[take_theirs]))
        for process in others:
            process.kill()
            process.wait()
    columns = ("entries  lock stale", "more processes", "this plugin", " avocado-vt")
    print(*columns, "ratio", "at most", sep="  ")
    for (more, (entries, stale, _, limit)), row in pairs.items():
        ours, theirs = map(median, zip(*row))
        ratio = median(ours / theirs for ours, theirs in row)
        figures = f"{ours:10.3f} ms{theirs:10.3f} ms{ratio:7.2f}{limit:>9}"
        print(f"{entries:7,}{'yes' if stale else 'no':>12}{more:16,}{figures}")


def look(directory):
    """Print what it costs to judge a killed job beside many older processes."""
    others = [subprocess.Popen(SLEEP) for _ in range(MORE)]
    killed, lock = (JobLock(directory, digit * 40) for digit in "01")
    killed.acquire()
    path, text = Path(killed.path), os.readlink(card.path_of(killed.path))
    killed.release()
    # As of a process that started just now, and has ended.
    job = subprocess.Popen(SLEEP)
    started = procfs.read_stat(job.pid).started
    job.kill()
    job.wait()
    *place, _, _ = text.split()
    ratios = []
    for _ in range(LOOKS):
        path.write_text(f"{job.pid}\n\n")
        os.symlink(f"{' '.join(place)} {job.pid} {started}", card.path_of(killed.path))
        began = time.perf_counter()
        assert lock.acquire(), "the stale lock was not seen"
        took = time.perf_counter() - began
        lock.release()
        began = time.perf_counter()
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                (entry / "stat").read_bytes()
        ratios.append(took / (time.perf_counter() - began))
    for process in others:
        process.kill()
        process.wait()
    print(f"look beside {MORE:,} older processes: {median(ratios):.2f} times what")
    print("  reading /proc/PID/stat of each costs (at most 2)")


def show(directory):
    """Print the time of ``avocado vt-joblock show`` without that of Avocado's start."""
    times = []
    for _ in range(LOOKS):
        began = time.perf_counter()
        showing.show({DIR: directory, TIMEOUT: "0"}, None)
        times.append((time.perf_counter() - began) * 1e3)
    print(f"show at 1,000 entries: {median(times):.2f} ms (at most 50)")


def wait(directory):
    """Print the CPU time of waiting in vain."""
    release, used, started = take_ours(directory), time.process_time(), time.monotonic()
    with suppress(JobError):
        take_ours(directory, WAIT)
    used, waited = time.process_time() - used, time.monotonic() - started
    assert waited >= WAIT, "it did not wait"
    release()
    print(f"waiting: {used / waited:.2%} of a core")


def start_up():
    """Print what an import of Avocado, and the start of a command, take longer."""
    for what, limit in (("import avocado", "at most 1"), ("command", "")):
        script = Path(__file__).with_name("start_up.py")
        command = [sys.executable, "-W", "ignore", script, what]
        times = [float(subprocess.check_output(command)) for _ in range(IMPORTS)]
        low, middle, high = quantiles(times, n=4)
        half = f"half: {low:.2f} to {high:.2f}; {limit}"
        print(f"{what}: {middle:.2f} ms more ({half})")


def main():
    # The table tells enough.
    logging.getLogger().addHandler(logging.NullHandler())
    with tempfile.TemporaryDirectory() as root:
        # Avocado and avocado-vt keep files in the home.
        os.environ["HOME"] = root
        start_up()
        directories = {entries: f"{root}/{entries}" for entries, *_ in CASES}
        for entries, directory in directories.items():
            Path(directory).mkdir()
            for number in range(entries):
                Path(directory, f"tmp{number:08}").touch()
        compare(directories)
        look(directories[0])
        show(directories[1_000])
        wait(directories[0])
    load, cores = os.getloadavg()[0], os.cpu_count()
    print(f"The load of the last minute was {load:.1f} on {cores} cores.")


if __name__ == "__main__":
    main()
