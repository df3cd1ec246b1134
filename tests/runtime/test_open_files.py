"""The limit on open files of a process, in one of its own."""

import subprocess
import sys

import pytest

CODE = """
import resource
from megatron_gkd.runtime.open_files import raise_open_files_limit

resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
raise_open_files_limit()
print(*resource.getrlimit(resource.RLIMIT_NOFILE))
"""


@pytest.mark.parametrize(("soft", "hard", "after"), [(100, 1000, 1000), (1000, 1000, 1000)])
def test_the_soft_limit_is_raised_to_the_hard_one(soft, hard, after):
    ended = subprocess.run([sys.executable, "-c", CODE.format(soft=soft, hard=hard)], capture_output=True, text=True)
    assert ended.stdout.split() == [str(after), str(hard)], ended.stderr
