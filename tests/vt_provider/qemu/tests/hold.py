"""A VT test without a virtual machine: it runs until it is told to end, and records when it ran."""

import time
from pathlib import Path


def run(test, params, env):
    """Write ``begin`` and ``end`` with a time stamp into ``record``, and in between wait.

    :param params: ``record``, a file to append to; ``until``, a file whose appearance ends the
                   test; ``outcome``, ``pass`` or ``fail``
    """
    record, until = Path(params["record"]), Path(params["until"])
    note(record, "begin")
    deadline = time.monotonic() + 120
    while not until.exists():
        if time.monotonic() > deadline:
            test.error(f"{until} did not appear")
        time.sleep(0.02)
    note(record, "end")
    if params["outcome"] == "fail":
        test.fail("told to fail")


def note(record, what):
    with record.open("a") as file:
        file.write(f"{what} {time.clock_gettime(time.CLOCK_MONOTONIC)}\n")
