"""The one exception that every part raises for what its user can put right."""


class UserError(Exception):
    """Bad input: a wrong recipe, data row or checkpoint. The command line prints it as it is, without a traceback."""
