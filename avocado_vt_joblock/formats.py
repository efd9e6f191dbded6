"""How times, users and untrusted text are written."""

from __future__ import annotations

import datetime
import functools
import pwd
import time

#: In seconds, about 30 years: an older time is wrong.
_LONGEST_AGE = 1e9
#: How much of a command line or of another untrusted text is shown, in characters.
LIMIT = 160


def duration(seconds: float) -> str:
    """Return how long something takes, for example 0:07:12."""
    return str(datetime.timedelta(seconds=round(seconds)))


def local_time(seconds: float) -> str:
    """Return a time, given in seconds since the Epoch: 2026-11-20 22:15:04.

    :param seconds: 0 where it is unknown
    """
    if not seconds:
        return "unknown"
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
    except (ValueError, OverflowError, OSError):
        return "unknown"


def since(seconds: float) -> str:
    """Return a time with its age: 2026-11-20 22:15:04 (2:03:11 ago)."""
    age = time.time() - seconds
    # Clocks differ, and anybody can set the time of a file of their own.
    if not 0 <= age < _LONGEST_AGE:
        return local_time(seconds)
    return f"{local_time(seconds)} ({duration(age)} ago)"


def iso_time(seconds: float) -> str | None:
    """Return a time by ISO 8601 with its zone: 2026-11-20T22:15:04+01:00.

    :param seconds: 0 where it is unknown
    :return: None where it is unknown
    """
    if not seconds:
        return None
    try:
        when = datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc)
        return when.astimezone().isoformat("T", "seconds")
    except (ValueError, OverflowError, OSError):
        return None


# A name service may take seconds to answer.
@functools.cache
def user(uid: int) -> str:
    """Return the name of a user, or the number where there is no name."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def tamed(text: str) -> str:
    r"""Return untrusted text as one line that is harmless in a terminal and in XML.

    What would turn a terminal red for example is shown as "\x1b[31m".
    """
    # repr() puts the text in quotes. Avocado's results.xml breaks at "]]>".
    line = repr(text[:LIMIT])[1:-1].replace("]]>", "]] >")
    return f"{line}..." if len(text) > LIMIT else line


def count(number: int, singular: str, plural: str) -> str:
    """Return a number with its noun: "1 process", "2 processes"."""
    return f"{number} {singular if number == 1 else plural}"
