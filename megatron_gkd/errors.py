"""The exceptions that every part raises for what its user can put right."""


class UserError(Exception):
    """Bad input: a wrong recipe, data row or checkpoint. The command line prints it as it is, without a traceback."""

    exit_code = 2


class CommandRefused(UserError):
    """A wrong command line or recipe, known before the ranks differ: all raise it."""


class RunStopped(UserError):
    """A run has ended early. All ranks raise it together; the message says why, and what was saved."""


class Interrupted(RunStopped):
    """A signal or the time limit has ended a run, which is saved: the same command continues it."""

    exit_code = 75
    """EX_TEMPFAIL of sysexits.h: try again. A job script requeues the job on it."""


class ServiceFailed(UserError):
    """A part of the run that lives elsewhere (rollout servers, a teacher's server) is gone for good.

    All ranks raise it together, in a step that has not changed the student yet.
    """
