"""Freed memory stays with the process where there is a glibc."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource
import sys
import numpy as np
from attnzoo.host_memory import keep_freed
kept = sys.argv[1] == "keep" and keep_freed()
for turn in range(6):
    if turn == 2:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(8 << 20)
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how):
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
    kept, count = done.stdout.split()
    return kept == "True", int(count)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_pages_are_mapped_once():
    kept, few = faults("keep")
    assert kept
    assert few < 100 < faults("leave")[1]


def test_what_the_environment_says_about_malloc_stands(monkeypatch):
    from attnzoo.host_memory import keep_freed

    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    assert not keep_freed()
