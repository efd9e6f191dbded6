"""A job lock for Avocado: no two jobs with VT tests at once in one lock directory.

Its rooms, each of which imports only from those below it:

``command``    the command ``avocado vt-joblock``, and the options of ``avocado run``
``showing``    ``avocado vt-joblock show``: who holds the lock, and who waits
``holding``    ``avocado vt-joblock run``: hold the lock while a command runs
``plugin``     what Avocado calls before and after a job
``refusal``    a stopped job: it undoes nothing, and is red in every result
``waiting``    a job's turn: attempts, and what is told meanwhile
``ending``     the end of a job: wait for the rest of it, release the lock or leave it
``messages``   every word that users read
``formats``    how times, users and anybody's words are written
``settings``   the options: registered, and found in config files
``options``    the options: parsed and checked
``lock``       the protocol: how a lock is acquired, released and left
``lockdir``    the lock directory: its guard, its files, who waits in it
``lockfile``   a lock file, and the one verdict on it
``card``       a job's card: its host, its boot, its process
``leftovers``  which processes are of a job: marks, tests, helpers
``procfs``     what /proc tells of processes

Avocado loads ``settings`` and ``command`` at every start, and ``plugin`` for every job.
"""

from __future__ import annotations

import os

#: The options, as Avocado names them.
SECTION = "plugins.vtjoblock"
DIR = f"{SECTION}.dir"
TIMEOUT = f"{SECTION}.timeout"


def data_file(path: str) -> str | None:
    """Return where a file lies that was installed beside the package, if it is there.

    pip puts it below DIR with ``--target DIR``, where the package is too; else below
    the prefix of Python, for /usr/lib/python3/dist-packages/avocado_vt_joblock below
    /usr.

    :param path: where it lies below that, for example "share/doc/README.rst"
    """
    beside = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    places = [beside]
    if beside.endswith(("/site-packages", "/dist-packages")):
        places.append(os.path.abspath(f"{beside}/../../.."))
    for place in places:
        file = os.path.join(place, path)
        if os.path.isfile(file):
            return file
    return None
