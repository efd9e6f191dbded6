"""Helpers: programs that Avocado and avocado-vt start, and that touch no guest image.

They may outlive the guest for which they were started, some of them for ever. If they
kept the lock, it would never be free again.
"""

from __future__ import annotations

import os
import re

from avocado_vt_joblock import procfs

#: Their names, without a directory.
HELPERS = frozenset(
    [
        "aexpect_helper",  # runs each command of avocado-vt, guests too
        "dnsmasq",
        "dumpcap",  # started by tshark
        "journalctl",  # this and vmstat are profilers of Avocado
        "ovs-vswitchd",
        "ovsdb-server",
        "passt",
        "qemu-pr-helper",
        "tcpdump",
        "tshark",
        "vmstat",
    ]
)
#: Up to this age, in seconds, an ``aexpect_helper`` is no helper: it may be about to
#: start a guest.
HELPER_AGE = 10.0

#: For example "python3.11", "bash".
_INTERPRETER = re.compile(r"python[0-9.]*|(?:ba|da|k)?sh")
#: What aexpect adds to a command: "tcpdump -i any && echo Xs3fGh2k > /dev/null".
_AEXPECT_ECHO = re.compile(r"&& echo \w+ > /dev/null\Z")
#: What shows that a shell line runs more than one command: "tcpdump; qemu", "$(qemu)".
_MORE_COMMANDS = re.compile(r"[;&|`$\n]")


def is_helper(words: list[str], started: int) -> bool:
    """Tell whether a process is one of the ``HELPERS``, also by way of a shell.

    :param words: its command line
    :param started: when it started, in ticks since boot
    """
    name = os.path.basename(program(words))
    if name == "aexpect_helper" and procfs.age(started) <= HELPER_AGE:
        return False
    return name in HELPERS


def program(words: list[str]) -> str:
    """Return the program that a command line runs, or "" where that is not one.

    ["/usr/sbin/dnsmasq", "-k"] runs "/usr/sbin/dnsmasq",
    ["bash", "-c", "tcpdump -i any && echo Xs3fGh2k > /dev/null"] runs "tcpdump", and
    ["/usr/bin/python3", "/usr/bin/aexpect_helper"] runs "/usr/bin/aexpect_helper".
    """
    first, *arguments = words or [""]
    if not _INTERPRETER.fullmatch(os.path.basename(first)):
        return first
    line = next((word for word in arguments if not word.startswith("-")), "")
    line = _AEXPECT_ECHO.sub("", line)
    if _MORE_COMMANDS.search(line):
        return ""
    return next(iter(line.split()), "")
