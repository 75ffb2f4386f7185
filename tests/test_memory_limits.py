"""OpenBLAS is loaded first if memory is limited, or one line says that the limit is too low."""

import subprocess
import sys

import pytest

from jaxvid.errors import InputError


@pytest.mark.parametrize(
    ("option", "megabytes", "works"),
    [("v", 140, False), ("v", 400, True), ("d", 140, False), ("d", 400, True)],
)
def test_openblas_is_loaded_or_the_limit_refused(option, megabytes, works):
    """With an address space of 140 MB, `import scipy.special` does not end."""
    done = subprocess.run(
        ["bash", "-c", f'ulimit -{option} {megabytes * 1000}; exec "$@"', "bash", sys.executable]
        + [
            "-c",
            "from jaxvid import memory_limits; memory_limits.load_openblas(); print('loaded')",
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    if works:
        assert (done.returncode, done.stdout) == (0, "loaded\n"), done.stderr
        return
    error = f"out of memory (ulimit -{option} is {megabytes * 1.024:.0f} MB); raise the limit"
    assert done.stderr.endswith(f"{InputError.__name__}: {error}\n")
