"""A job lock for Avocado: no two jobs with VT tests at once in one lock directory.

``settings`` is what Avocado loads at every start: the option and the place of the config file.
``plugin`` is called before and after each job: it knows jobs and messages, and takes the lock
with ``lock``, which knows files and processes and nothing of Avocado.
"""
