"""Exit codes of the failures that a run expects."""

import pytest

from megatron_gkd.config.errors import RecipeError
from megatron_gkd.errors import CommandRefused, GkdError, Interrupted, RunStopped, ServiceError, UserError


@pytest.mark.parametrize(
    ("error", "exit_code", "is_shared"),
    [
        (UserError("x"), 2, False),
        (RecipeError(["x"]), 2, False),
        (CommandRefused("x"), 2, True),
        (ServiceError("x"), 69, False),
        (RunStopped("x"), 2, True),
        (RunStopped("x", exit_code=69, is_shared=False), 69, False),
        (Interrupted("x"), 75, True),
    ],
)
def test_exit_codes_and_who_raises(error, exit_code, is_shared):
    assert isinstance(error, GkdError) and str(error) == "x"
    assert (error.exit_code, error.is_shared) == (exit_code, is_shared)


def test_a_failed_service_is_not_a_mistake_of_the_user():
    assert not issubclass(ServiceError, UserError)
