"""How many rooms one evaluation goes through: whoever reads along has to follow."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

WALK = """
import sys, threading
from pathlib import Path
import freqseg
from freqseg.faces.cli import main
from freqseg.world.scenes import write_world
write_world("scenes", train=0, val=0, test=2, size=112, workers=1)
home, rooms = str(Path(freqseg.__file__).parent), set()
def importing(frame):
    while frame is not None and frame.f_code.co_name != "<module>": frame = frame.f_back
    return frame is not None and frame.f_code.co_filename.startswith(home)
def watch(frame, event, argument):
    if event == "call" and frame.f_code.co_filename.startswith(home) and frame.f_code.co_flags & 2 and not importing(frame):
        rooms.add(frame.f_code.co_filename[len(home) + 1:-3])
sys.setprofile(watch); threading.setprofile(watch)
status = main(["evaluate", "dfa", "--data", "scenes", "--split", "test", "--out", "out", "--workers", "0", "--device", "cpu"])
sys.setprofile(None)
print("ROOMS", *sorted(rooms)); sys.exit(status)
"""
NETWORK = {"affinity", "cam", "clip", "decoders", "dual_affinity", "maps", "ot_cam", "prompts", "refine", "sinkhorn", "spectra", "wavelet",
           "systems/dfa", "systems/segmenter"}   # what DFA is made of: no arrangement of the house shortens it


@pytest.mark.slow
def test_an_evaluation_crosses_few_rooms_besides_those_of_the_network(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", WALK], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    rooms = set(next(line for line in done.stdout.splitlines() if line.startswith("ROOMS")).split()[1:])
    assert rooms >= {"data", "systems/dfa", "work/evaluation"} and len(rooms - NETWORK) <= 21, sorted(rooms - NETWORK)
