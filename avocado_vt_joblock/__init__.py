"""A job lock for Avocado: no two jobs with VT tests at once in one lock directory.

Its modules. Each one imports only from those below it, and from this file:

``command``     the command ``avocado vt-joblock``, and the options of ``avocado run``
``showing``     ``avocado vt-joblock show``: who holds the lock, and who waits
``holding``     ``avocado vt-joblock run``: hold the lock while a command runs
``plugin``      what Avocado calls before and after a job
``refusal``     a stopped job: its clean-up does not run, all results show an error
``waiting``     a job that waits: attempts, and what is told meanwhile
``ending``      the end of a job: wait for its leftovers, then give the lock back
``telling``     how a job tells its user and its log
``messages``    the texts that it tells
``advice``      what is said of a lock that is in the way, and what to do about it
``formats``     how times, users and untrusted text are written
``settings``    the options: registered, and found in config files
``options``     the options: parsed and checked
``lock``        the protocol: how a job takes the lock and gives it back
``ownfile``     the job's own lock file
``lockdir``     the lock directory: its guard, its files, who waits in it
``lockfile``    the lock file of any job, and the verdict on it
``kernellock``  the lock of the kernel on such a file
``card``        a job's card: its host, its boot, its process
``leftovers``   what still runs of a job that has ended
``helpers``     programs that run beside the guests, and are no leftovers
``marks``       what all processes of a job have in their environment
``scan``        a look at all processes of the host
``procfs``      what /proc tells of one process

Avocado loads ``settings`` and ``command`` at every start, and ``plugin`` for every job.

Its words:

VT test      a test of avocado-vt; it runs guests, which are QEMU processes
contender    a job that tries to take the lock; one try is an attempt
holder       the job that has the lock
lock file    one job's file in the lock directory; "a lock" is short for it
in the way   said of a lock that keeps a contender from taking its own
stopped      said of a job that does not run, for whatever reason
refused      stopped because the lock of another job is in the way
stale lock   a lock of a job of which no process is seen to run; it stops nobody
kernel lock  a lock of the kernel on a lock file; it tells whether the holder lives
card         a symbolic link beside the lock file; it names the process of the job
ticket       the card of a job that waits: between its attempts it has no lock file
guard        a flock on the directory; contenders of one host take turns with it
mark         a variable in the environment of all that a holder starts
leftovers    processes of a job that still run when it has ended
to withdraw  to remove what a failed attempt has made
to give back to release or hand over the lock, at the end of the job
to release   to remove the lock file
to hand over to keep the lock file, for as long as there are leftovers
"""

from __future__ import annotations

import os

#: The options, as Avocado names them.
SECTION = "plugins.vtjoblock"
DIR = f"{SECTION}.dir"
TIMEOUT = f"{SECTION}.timeout"


def installed_file(path: str) -> str | None:
    """Return the path of a file that pip has installed with this package, or None.

    The config file and the manual are such files. ``pip install --target DIR`` puts
    them below DIR, beside the package. Otherwise they are below the prefix of Python,
    which is /usr for a package in /usr/lib/python3/dist-packages.

    :param path: the path below DIR or the prefix, for example
        "etc/avocado/conf.d/x.conf"
    """
    parent = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    places = [parent]
    if parent.endswith(("/site-packages", "/dist-packages")):
        places.append(os.path.abspath(f"{parent}/../../.."))
    for place in places:
        file = os.path.join(place, path)
        if os.path.isfile(file):
            return file
    return None
