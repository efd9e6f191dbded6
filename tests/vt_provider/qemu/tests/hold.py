"""A VT test without a virtual machine: it runs until it is told to end, and records when it ran."""

import logging
import subprocess
import time
from pathlib import Path


def run(test, params, env):
    """Write ``begin`` and ``end`` with a time stamp into ``record``, and in between wait.

    :param params: ``record``, a file to append to; ``until``, a file whose appearance ends the
                   test; ``outcome``, ``pass``, ``fail`` or ``error``; ``guest``, a file for the PID
                   of a process that is left behind in a session of its own, as guests are, if any
    """
    record, until = Path(params["record"]), Path(params["until"])
    if params["guest"]:
        # Nobody's child, as a guest that aexpect has started.
        command = ["sh", "-c", "setsid sleep 1000 > /dev/null 2>&1 & echo $!"]
        Path(params["guest"]).write_text(subprocess.check_output(command, text=True))
    note(record, "begin")
    logging.info("%s is silent from now on", record)
    deadline = time.monotonic() + 120
    while not until.exists():
        if time.monotonic() > deadline:
            test.error(f"{until} did not appear")
        time.sleep(0.02)
    note(record, "end")
    if params["outcome"] == "fail":
        test.fail("told to fail")
    if params["outcome"] == "error":
        test.error("told to")


def note(record, what):
    with record.open("a") as file:
        file.write(f"{what} {time.clock_gettime(time.CLOCK_MONOTONIC)}\n")
