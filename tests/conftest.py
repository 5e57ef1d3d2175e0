"""Fixtures of all tests: one thread, no network, fixed seeds, restored signal handlers and log."""

import atexit
import gc
import logging
import os
import random
import signal
import sys
from collections import defaultdict
from collections.abc import Generator, Iterator, Sequence
from functools import cache
from tempfile import TemporaryDirectory

os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # else threads spin while they wait for each other
# also of the processes that tests start; those of `warm_python` are for this number only
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# tests compare numbers, which are to be the same on any processor: train.precision=auto is float32
os.environ.setdefault("ACCELERATE_MIXED_PRECISION", "no")

import pytest
import warm_python
from hypothesis import HealthCheck, settings

# PyTorch and the like are imported by the fixtures: the process that hands the tests to workers
# needs none of them, and starts the workers seconds earlier

# The default suite draws the same few examples each time; `--hypothesis-profile long` searches on.
COMMON = {"deadline": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("quick", derandomize=True, database=None, max_examples=25, **COMMON)
settings.register_profile("long", max_examples=10_000, **COMMON)
settings.load_profile("quick")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="for the contract: cpu, cuda or standin")


def pytest_configure(config: pytest.Config) -> None:
    # tests start hundreds of processes: petl is compiled by the first of them, not by each
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False
    gc.disable()  # until the tests are collected: little of what is imported becomes garbage
    # read when Trackio is imported, which any test may do
    store = TemporaryDirectory(prefix="trackio-")
    config.add_cleanup(store.cleanup)
    os.environ["TRACKIO_DIR"] = store.name
    # the files of this process need not survive a power failure, and the disk is slow
    os.fsync = lambda handle: None
    warm_python.begin()
    if config.option.device == "standin":
        import standin

        standin.register()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Leave modules and tests out of later collections, which would visit millions of objects.

    Collections are rare, too: they would be a twentieth of the time of small models.
    """
    try:
        return (yield)
    finally:
        gc.freeze()
        atexit.register(gc.unfreeze)  # triton prints what the last collection does not find
        gc.set_threshold(20_000, 10, 5)
        gc.enable()


Place = tuple[int, ...]  # the values of one `parametrize`, by identity


def arguments_of(mark: pytest.Mark) -> Sequence[str]:
    """The names in the first argument of a `parametrize`."""
    names = mark.args[0] if mark.args else mark.kwargs["argnames"]
    return [n.strip() for n in names.split(",")] if isinstance(names, str) else names


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """Leave the default run the diagonal of each product of parameters, unless marked `every_cell`.

    A product is made by several `parametrize` above one another; all of its cells are `thorough`.
    Of a test that is marked `cells(n)` n of these cells stay, evenly spaced.
    """
    products: dict[object, list[tuple[pytest.Item, tuple[Place, ...]]]] = defaultdict(list)
    costly: dict[object, list[pytest.Item]] = defaultdict(list)
    later = ("thorough", "slow", "hub", "every_cell")
    for item in items:
        if item.get_closest_marker("cells"):
            costly[item.function].append(item)  # ty: ignore[unresolved-attribute]
        marks = [*item.iter_markers("parametrize")]
        if len(marks) > 1 and not any(map(item.get_closest_marker, later)):
            given = item.callspec.params  # ty: ignore[unresolved-attribute]
            place = tuple(tuple(id(given[name]) for name in arguments_of(mark)) for mark in marks)
            products[item.function].append((item, place))  # ty: ignore[unresolved-attribute]
    for cells in products.values():
        axes = [[*dict.fromkeys(place[i] for _, place in cells)] for i in range(len(cells[0][1]))]
        longest = max(map(len, axes))
        diagonal = {tuple(axis[m % len(axis)] for axis in axes) for m in range(longest)}
        for item, place in cells:
            if place not in diagonal:
                item.add_marker(pytest.mark.thorough)
    for cells in costly.values():
        (count,) = cells[0].get_closest_marker("cells").args  # ty: ignore[unresolved-attribute]
        left = [item for item in cells if not any(map(item.get_closest_marker, later[:3]))]
        kept = {len(left) * number // count for number in range(count)}
        for number, item in enumerate(left):
            if number not in kept:
                item.add_marker(pytest.mark.thorough)


def pytest_unconfigure() -> None:
    warm_python.end()


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    """The device of the models in contract tests: `pytest --device`."""
    return request.config.option.device


@pytest.fixture(autouse=True, scope="session")
def _once_per_process() -> Iterator[None]:
    """Use one thread, compose each choice of configurations once, compile each template once.

    PEFT compiles that of its model card whenever it saves. One pair of processes serves all checks.
    """
    import torch
    from composed_once import composed_once
    from jinja2 import Environment
    from kept_processes import in_processes

    torch.set_num_threads(1)
    with composed_once(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Environment, "compile", cache(Environment.compile))
        patch.setattr("petl.testing.parallel.in_processes", in_processes)
        for device in (torch.cuda, torch.xpu):
            if not device.is_available():  # each seed is kept for it, with the stack as text
                patch.setattr(device, "manual_seed_all", lambda seed: None)
        yield


@pytest.fixture(autouse=True)
def _seeded() -> None:
    import numpy as np
    import torch

    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)


@pytest.fixture(autouse=True)
def _restore_sigterm() -> Iterator[None]:
    """Restore the handler of SIGTERM, which a run in this process replaces."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(autouse=True)
def _no_hydra_job() -> Iterator[None]:
    """Forget the Hydra job of another test, and what a sweep would report at its end."""
    _forget_sweep()
    yield
    _forget_sweep()


def _forget_sweep() -> None:
    from hydra.core.hydra_config import HydraConfig

    HydraConfig.instance().cfg = None
    if "petl.training.program" in sys.modules:
        sys.modules["petl.training.program"].closing.clear()


@pytest.fixture(autouse=True)
def _restore_log() -> Iterator[None]:
    """Restore the logger `petl`, which a run in this process redirects to standard error."""
    log = logging.getLogger("petl")
    before = log.handlers[:], log.propagate, log.level
    yield
    log.handlers, log.propagate = before[:2]
    log.setLevel(before[2])
