"""The exceptions that every part raises for what its user can put right."""


class UserError(Exception):
    """Bad input: a wrong recipe, data row or checkpoint. The command line prints it as it is, without a traceback."""


class RunStopped(UserError):
    """A run has ended early. All ranks raise it together; the message says why, and what was saved."""


class ServiceFailed(UserError):
    """A part of the run that lives elsewhere (rollout servers, a teacher's server) is gone for good.

    All ranks raise it together, in a step that has not changed the student yet.
    """
