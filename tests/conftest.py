"""One thread for every test."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """The work is small pieces, and sums come out the same on every machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
