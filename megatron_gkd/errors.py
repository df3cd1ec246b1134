"""The failures that a run expects: each has a message for its user and an exit code, and needs no traceback."""


class GkdError(Exception):
    """An expected failure. The command line prints its message without a traceback.

    Attributes:
        exit_code: the exit code of a process that it ends.
        is_shared: whether all ranks raise it together, so that one of them prints it.
    """

    exit_code = 1
    is_shared = False


def one_line(text: str) -> str:
    """Return `text`, which may hold what a user wrote, on one line: other characters than printable ones as escapes."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


class UserError(GkdError):
    """A mistake of the user: a wrong recipe, data row, checkpoint or option."""

    exit_code = 2


class CommandRefused(UserError):
    """A wrong command line or recipe, which all ranks find before they differ."""

    is_shared = True


class ServiceError(GkdError):
    """A part of the run that runs elsewhere, a rollout server or a teacher server, fails for good."""

    exit_code = 69
    """EX_UNAVAILABLE of sysexits.h."""


class RunStopped(GkdError):
    """A run ends early. The message says why, and what was saved.

    Args:
        message: the text for the user.
        exit_code: that of the cause; by default 2, as for a mistake of the user.
        is_shared: whether all ranks raise it.
    """

    exit_code = 2
    is_shared = True

    def __init__(self, message: str, *, exit_code: int | None = None, is_shared: bool = True) -> None:
        super().__init__(message)
        self.is_shared = is_shared
        if exit_code is not None:
            self.exit_code = exit_code


class Interrupted(RunStopped):
    """A signal or the time limit ends a run, which is saved: the same command continues it."""

    exit_code = 75
    """EX_TEMPFAIL of sysexits.h: a job script can start the job again."""
