"""What every test wants: one thread, no network, known seeds, signals and log as they were."""

import logging
import os
import random
import signal
from collections.abc import Iterator

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # else two busy cores wait for each other
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
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
    random.seed(0)
    np.random.seed(0)


@pytest.fixture(autouse=True)
def _same_sigterm() -> Iterator[None]:
    """A run as a program in this process sets it for a process that ends; ours goes on."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(autouse=True)
def _same_log() -> Iterator[None]:
    """A run as a program in this process sends it to standard error, from INFO on."""
    log = logging.getLogger("petl")
    before = log.handlers[:], log.propagate, log.level
    yield
    log.handlers, log.propagate = before[:2]
    log.setLevel(before[2])
