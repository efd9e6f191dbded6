"""A job lock for Avocado: no two jobs with VT tests at once in one lock directory.

Avocado loads ``settings`` at every start, with the options and the place of the config file, and
``plugin``, a shell that it calls before and after each job. Inside of that ``job`` knows jobs with
VT tests, and tells their users what happens. It takes the lock with ``lock``, the protocol. That
judges others' locks with ``lockfile``, which finds with ``processes`` what is left of a job.
"""
