"""What a process holds: processes that work for another one end with it, however it died."""

import ast
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOM = Path(__file__).resolve().parent.parent / "freqseg"
LOADER = """
import os, time
import numpy as np
from torch.utils.data import DataLoader, Dataset
from freqseg.memory import leave_with_parent

class Pictures(Dataset):
    def __len__(self): return 100
    def __getitem__(self, index): return os.getpid(), np.zeros(1_000_000, np.uint8)  # more than a pipe holds; as an array: tensors go another way

for pid, _ in DataLoader(Pictures(), batch_size=None, num_workers=1, multiprocessing_context="fork", collate_fn=list,
                           worker_init_fn=leave_with_parent):
    print(pid, flush=True)
    time.sleep(100)
"""
POOL = """
import os, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from freqseg.memory import leave_with_parent

with ProcessPoolExecutor(1, mp_context=get_context("fork"), initializer=leave_with_parent) as pool:
    print(pool.submit(os.getpid).result(), flush=True)
    time.sleep(100)
"""


def gone(pid: int, seconds: float) -> bool:
    "Does a process end within so many seconds? One that has ended may still be listed, as a zombie."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try: state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError: return True
        if state == "Z": return True
        time.sleep(0.1)
    return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="there is no /proc to look for processes in")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("program", [LOADER, POOL], ids=["loader", "pool"])
def test_processes_end_with_a_parent_that_is_killed(program: str, number: int) -> None:
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=ROOM.parent)
    child = int(parent.stdout.readline())
    try:
        assert not gone(child, 1.5)
        parent.send_signal(number)
        parent.wait()
        assert gone(child, 20)
    finally:
        parent.kill()
        if not gone(child, 0.2): os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize(("call", "option"), [("DataLoader", "worker_init_fn"), ("ProcessPoolExecutor", "initializer")])
def test_every_loader_and_pool_of_the_package_is_told_so(call: str, option: str) -> None:
    found = [(path, node) for path in ROOM.rglob("*.py") for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
             if isinstance(node, ast.Call) and getattr(node.func, "id", "") == call]
    assert len(found) >= 3
    for path, node in found:
        assert {word.arg: getattr(word.value, "id", None) for word in node.keywords}.get(option) == "leave_with_parent", f"{path.name}, line {node.lineno}"
