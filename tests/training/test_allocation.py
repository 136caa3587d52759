import platform
import subprocess
import sys

import pytest

from lata_lightning.training import allocation

GLIBC = platform.libc_ver()[0] == "glibc"
FREED_BETWEEN_SMALL_ONES = """
import sys
from pathlib import Path
import torch
from lata_lightning.training.allocation import return_large_buffers

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

if sys.argv[1] == "returned":
    return_large_buffers()
torch.ones(7 << 20)  # freed at once: from now on glibc maps only larger ones by themselves
large, small = [], []
for _ in range(100):
    large.append(torch.ones(1 << 19))
    small.append(torch.ones(64))
full = resident()
large.clear()
print((full - resident()) >> 20)
"""


def mebibytes_returned(setting: str) -> int:
    done = subprocess.run([sys.executable, "-c", FREED_BETWEEN_SMALL_ONES, setting], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(not GLIBC, reason="another C library")
def test_freed_buffers_between_small_ones_go_back_to_the_system():
    assert mebibytes_returned("returned") > 190 > 100 > mebibytes_returned("default")


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(allocation.platform, "libc_ver", lambda: ("musl", "1.2"))
    assert not allocation.return_large_buffers()
