"""Two machines that train one adapter: on this one, and in two network namespaces of it."""

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import warm_python
from training_fixtures import OFFLINE, ROOT, Finished, train

pytest_plugins = ["training_fixtures"]
pytestmark = pytest.mark.slow
LR = 1e-2
TORCHRUN = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
ACCELERATE = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "2"]
ACCELERATE += ["--num_processes", "2", "--mixed_precision", "no", "--dynamo_backend", "no"]


def free_port() -> int:
    """A port below those that the system gives to connections, so none takes it meanwhile."""
    for port in range(
        10_000 + os.getpid() % 20_000, 32_768
    ):  # of another worker of pytest's, others
        with socket.socket() as opened, suppress(OSError):
            opened.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


def line(launcher: str, machine: int, address: str, port: int) -> list[str]:
    """What is typed on one machine, up to the name of the program."""
    if launcher == "accelerate":
        where = ["--machine_rank", str(machine), "--main_process_ip", address]
        words = [*ACCELERATE, *where, "--main_process_port", str(port), "--rdzv_backend", "c10d"]
    elif launcher == "c10d":
        words = [*TORCHRUN, "--rdzv_backend", "c10d", "--rdzv_endpoint", f"{address}:{port}"]
        words += ["--rdzv_id", "verbs"]
    else:
        words = [*TORCHRUN, "--node_rank", str(machine), "--master_addr", address]
        words += ["--master_port", str(port)]
    return [warm_python.python(), *words, str(ROOT / "train.py")]


def run_on_both(lines: list[list[str]], overrides: list[str], folder: Path, **variables: str):
    """Start a line for each machine, each in a folder of its own, and wait for both."""
    started = []
    for machine, words in enumerate(lines):
        home = folder / f"machine-{machine}"
        home.mkdir()
        mine = {name: value.format(machine) for name, value in variables.items()}
        environment = {**os.environ, **OFFLINE, **mine}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen([*words, *overrides], cwd=home, env=environment, **pipes))
    for process in started:
        said, _ = process.communicate(timeout=240)
        assert process.returncode == 0, said


def assert_equals_one_process(run: Path, one: Finished) -> None:
    two = Finished(run)
    assert json.loads((run / "environment.json").read_text())["processes"] == 2
    assert two.checkpoints == one.checkpoints
    assert two.adapter.keys() == one.adapter.keys()
    for name, tensor in one.adapter.items():
        torch.testing.assert_close(two.adapter[name], tensor, atol=LR / 10, rtol=0, msg=name)
    assert two.scores["after"] == pytest.approx(one.scores["after"], abs=1e-3)


@pytest.fixture
def common(tiny) -> list[str]:
    return [*tiny.steady, "+method=mos", "method.r=2", "method.equivalent_rank=2", f"train.lr={LR}"]


@pytest.mark.parametrize("launcher", ["static", "c10d", "accelerate"])
def test_two_machines_train_and_save_one_adapter(common, tmp_path, launcher):
    one = train(common, tmp_path / "one")
    port, run = free_port(), tmp_path / "two"
    lines = [line(launcher, machine, "127.0.0.1", port) for machine in (0, 1)]
    run_on_both(lines, [*common, f"train.run={run}"], tmp_path)
    assert_equals_one_process(run, one)


@pytest.fixture
def namespaces() -> Iterator[list[str]]:
    """Two network namespaces joined by a cable, as two machines are: 10.77.0.1 and 10.77.0.2."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need ip and root")
    names = [f"petl{os.getpid()}-{machine}" for machine in (0, 1)]
    cables = [f"pv{os.getpid()}-{machine}" for machine in (0, 1)]

    def ip(*words: str) -> None:
        made = subprocess.run(["ip", *words], capture_output=True, text=True)
        if made.returncode:
            pytest.skip(f"no network namespaces here: {made.stderr}")

    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", cables[0], "type", "veth", "peer", "name", cables[1])
        for machine, (name, cable) in enumerate(zip(names, cables, strict=True)):
            ip("link", "set", cable, "netns", name, "name", f"eth{machine}")
            ip("-n", name, "addr", "add", f"10.77.0.{machine + 1}/24", "dev", f"eth{machine}")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", f"eth{machine}", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_machines_with_networks_of_their_own(common, tmp_path, namespaces, kind):
    one = train(common, tmp_path / "one")
    run = tmp_path / "two"
    lines = [
        ["ip", "netns", "exec", name, *line("static", machine, "10.77.0.1", 29500)]
        for machine, name in enumerate(namespaces)
    ]
    overrides = [*common, f"+launch={kind}", f"train.run={run}"]
    run_on_both(lines, overrides, tmp_path, GLOO_SOCKET_IFNAME="eth{}")
    assert_equals_one_process(run, one)
