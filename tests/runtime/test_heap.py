"""On a CPU freed memory is kept for the next step."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

ROUNDS = """
import resource, torch
from shallowflow.runtime.heap import keeping_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.zeros(2**24).fill_(1.0) for _ in range(4)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
given_back = faults()
with keeping_freed_memory():
    for _ in range(6):
        kept = faults()
    print(given_back, kept)
"""
"""Fills four tensors of 64 MiB again and again, in a process whose heap nothing else has shaped."""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator has the two options")
def test_what_was_freed_needs_no_new_pages() -> None:
    """By default every round faults in all its pages again; kept, none once the heap has found its shape."""
    done = subprocess.run([sys.executable, "-c", ROUNDS], capture_output=True, check=True, text=True)

    given_back, kept = map(int, done.stdout.split())

    assert given_back > 1000
    assert kept < given_back / 20
