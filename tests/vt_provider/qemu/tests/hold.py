"""A VT test without a virtual machine: it runs until it is told to end, and records
when it ran."""

import logging
import subprocess
import time
from pathlib import Path


def run(test, params, env):
    """Write ``begin`` and ``end`` with a time stamp into ``record``, and in between
    wait.

    :param params: ``record``, a file to append to; ``until``, a file whose appearance
        ends the test; ``outcome``, ``pass`` or a method of ``test``; ``guest``, a file
        for the PID of a process that is left behind in a session of its own, as guests
        are;
                   ``starts``, its command; ``runs``, a command that the test runs
                   before it waits
    """
    record, until = Path(params["record"]), Path(params["until"])
    if params["starts"]:
        # Nobody's child, as a guest that aexpect has started.
        command = ["sh", "-c", f"setsid {params['starts']} > /dev/null 2>&1 & echo $!"]
        Path(params["guest"]).write_text(subprocess.check_output(command, text=True))
    note(record, "begin")
    if params["runs"]:
        with Path(f"{record}.printed").open("w") as file:
            subprocess.run(
                params["runs"], check=False, shell=True, stdout=file, stderr=file
            )
    logging.info("%s is silent from now on", record)
    deadline = time.monotonic() + 120
    while not until.exists():
        if time.monotonic() > deadline:
            test.error(f"{until} did not appear")
        time.sleep(0.02)
    note(record, "end")
    if params["outcome"] != "pass":
        getattr(test, params["outcome"])("told to")


def note(record, what):
    with record.open("a") as file:
        file.write(f"{what} {time.clock_gettime(time.CLOCK_MONOTONIC)}\n")
