"""What every test shares: one thread, fixed seeds, where real pictures are, and what happens to slow and CUDA tests.

`slow` tests run in `make test` and are left out by `make fast`; they get twenty minutes where others get five. `cuda`
tests are skipped without a device. A test that asks for the fixture `real_data` is marked `real_data` by that alone.
"""

import os
import random
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported: the tests share the machine, and small tensors gain nothing from more threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import hypothesis
import numpy
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SLOW_LIMIT = 1200  # seconds

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
# A loaded machine is slow now and then; that is no failure. Derandomised, a failing run can be repeated anywhere.
hypothesis.settings.register_profile("freqseg", deadline=None, derandomize=True)
hypothesis.settings.load_profile("freqseg")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    "Apply the policies for `slow`, `cuda` and `real_data`."
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_LIMIT))
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and there is none"))
        if "real_data" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.real_data)


def pytest_runtest_setup(item: pytest.Item) -> None:
    "The same random numbers in every test, whatever ran before it."
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def real_data() -> Path:
    "Folder of real pictures: FREQSEG_REAL_DATA, or ../shared/data beside the repository. Skips where it is absent."
    folder = Path(os.environ.get("FREQSEG_REAL_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real pictures: {os.path.relpath(folder, ROOT)} is absent and FREQSEG_REAL_DATA is not set")
    return folder.resolve()


@pytest.fixture(scope="session")
def pydensecrf():
    "The package behind the dense CRF; skips where it is not installed (it has no build for Python 3.13)."
    return pytest.importorskip("pydensecrf.densecrf", reason="pydensecrf2 is not installed (pip install 'freqseg[crf]')")


@pytest.fixture
def own_registry() -> Iterator[None]:
    "The systems and files that a test defines and loads are forgotten after it."
    from freqseg.plugins import PLUGINS
    from freqseg.systems.segmenter import SYSTEMS, known_systems
    known_systems()
    kept, loaded = dict(SYSTEMS), dict(PLUGINS)
    yield
    for registry, before in ((SYSTEMS, kept), (PLUGINS, loaded)):
        registry.clear()
        registry.update(before)
