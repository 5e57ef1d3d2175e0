"""What every test wants: one thread, no network, a known seed, signals as they were."""

import os
import signal
from collections.abc import Iterator

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # else two busy cores wait for each other
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import standin
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="for the contract: cpu, cuda or standin")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    if config.option.device == standin.NAME:
        standin.register()


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    """Where the models of the contract are: `pytest --device`."""
    return request.config.option.device


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _same_sigterm() -> Iterator[None]:
    """A run as a program in this process sets it for a process that ends; ours goes on."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)
