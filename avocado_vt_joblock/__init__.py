"""A job lock for Avocado: no two jobs with VT tests at once in one lock directory.

Avocado loads ``settings`` at every start, and ``plugin`` for every job. What ``plugin`` tells users
is worded in ``messages``. It takes the lock with ``lock``, which is the protocol. That judges other
locks with ``lockfile``, which looks with ``processes`` for what is left of their jobs.
Each imports only from those after it; ``settings`` is Avocado's alone.
"""

#: The options, as Avocado names them.
SECTION = "plugins.vtjoblock"
DIR = f"{SECTION}.dir"
TIMEOUT = f"{SECTION}.timeout"
