"""What several benchmarks share when pytest runs them."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    "One thread for the benchmarks of a file, so that other work on the machine disturbs little."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
