"""How a job tells its user and its log.

This is a module of its own, since Avocado drops every log record that comes from a
module called ``messages``.
"""

from __future__ import annotations

import logging

from avocado_vt_joblock import advice, messages
from avocado_vt_joblock.lockfile import LockFile

#: Avocado's loggers: of the file job.log, and of what users see at once.
JOB_LOG = "avocado.job"
USER_LOG = "avocado.app"


def tell(
    text: str,
    level: int = logging.WARNING,
    *,
    loggers: tuple[str, ...] = (JOB_LOG, USER_LOG),
    error: BaseException | None = None,
) -> None:
    """Tell job.log and the user; an error of a log handler is ignored.

    :param text: what to tell
    :param level: how much it matters, by the module logging
    :param loggers: whom to tell
    :param error: whose traceback is told, too
    """
    for logger in loggers:
        try:
            logging.getLogger(logger).log(level, text, exc_info=error)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:
            pass


def tell_of_stale(files: list[LockFile]) -> None:
    """Tell what has become of stale locks, and warn of guests that are not seen."""
    for file in files:
        if file.not_removed:
            tell(messages.not_removed(file))
        elif file.leftovers.obstacle:
            tell(advice.guests_of_others(file))
        else:
            tell(messages.removed(file), logging.INFO, loggers=(JOB_LOG,))
