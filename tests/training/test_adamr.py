"""AdamR against its equation, its state, and runs that use it."""

import copy
import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel
from training_fixtures import assert_same_course, stopped_before, train

import petl
from petl.errors import InputError
from petl.experiments.planning.plan import plan_run
from petl.testing.processes import in_processes
from petl.training import adamr
from petl.training.compose import compose
from petl.training.distributed.launch import gathered
from petl.training.optimizer import make_optimizer
from petl.training.runs.settings import TrainConfig

pytest_plugins = ["training_fixtures"]

BETAS, EPS = (0.9, 0.95), 1e-8
SHAPES = [(3, 4), (5,), (2, 3)]
RATES = [0.1, 0.1, 0.02]  # of three tensors in two groups
STEPS = 6


def drawn():
    """Three tensors, and gradients for six steps, in some of which one tensor has none."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator) for shape in SHAPES]
    gradients = [
        [torch.randn(shape, generator=generator) * 10**-i for i, shape in enumerate(SHAPES)]
        for _ in range(STEPS)
    ]
    gradients[1][2] = gradients[4][2] = None
    return tensors, gradients


def by_the_equation(tensors, gradients, decay, norm, reference):
    """The paper's update in float64, one tensor after the other."""
    theta = [t.double() for t in tensors]
    start = [torch.zeros_like(t) if reference == "zero" else t.clone() for t in theta]
    m, v = [torch.zeros_like(t) for t in theta], [torch.zeros_like(t) for t in theta]
    t = [0] * len(theta)
    for step in gradients:
        total = count = 0
        for i, g in enumerate(step):
            if g is None:
                continue
            t[i] += 1
            m[i] = BETAS[0] * m[i] + (1 - BETAS[0]) * g.double()
            v[i] = BETAS[1] * v[i] + (1 - BETAS[1]) * g.double() ** 2
            total += (v[i] / (1 - BETAS[1] ** t[i])).sum().item()
            count += g.numel()
        root = math.sqrt(total / count) or 1.0
        for i, g in enumerate(step):
            if g is None:
                continue
            change = theta[i] - start[i]
            theta[i] = theta[i] - RATES[i] * decay / root * (
                change.sign() if norm == "l1" else change
            )
            m_hat, v_hat = m[i] / (1 - BETAS[0] ** t[i]), v[i] / (1 - BETAS[1] ** t[i])
            theta[i] = theta[i] - RATES[i] * m_hat / (v_hat.sqrt() + EPS)
    return theta


def made(tensors, **options):
    """An optimizer of two groups over copies of the tensors, and these."""
    parameters = [nn.Parameter(t.clone()) for t in tensors]
    parts = [{"params": parameters[:2]}, {"params": parameters[2:], "lr": RATES[2]}]
    return petl.AdamR(parts, lr=RATES[0], betas=BETAS, eps=EPS, **options), parameters


def run(optimizer, parameters, gradients):
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = None if gradient is None else gradient.to(parameter.dtype)
        optimizer.step()


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize(
    ("norm", "reference"), [("l2", "start"), ("l1", "start"), ("l2", "zero"), ("l1", "zero")]
)
def test_six_steps_are_those_of_the_equation(norm, reference, decay):
    tensors, gradients = drawn()
    # l1 of an element that has just returned to 0 would turn on rounding; none here does
    expected = by_the_equation(tensors, gradients, decay, norm, reference)
    optimizer, parameters = made(tensors, delta_decay=decay, delta_norm=norm, reference=reference)
    run(optimizer, parameters, gradients)
    for parameter, wanted in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.double(), wanted, atol=1e-6, rtol=0)


def test_without_decay_it_is_torchs_adam():
    tensors, gradients = drawn()
    optimizer, parameters = made(tensors)
    others = [nn.Parameter(t.clone()) for t in tensors]
    parts = [{"params": others[:2]}, {"params": others[2:], "lr": RATES[2]}]
    adam = torch.optim.Adam(parts, lr=RATES[0], betas=BETAS, eps=EPS)
    run(optimizer, parameters, gradients)
    run(adam, others, gradients)
    for one, other in zip(parameters, others, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


def test_without_a_gradient_that_differs_from_zero_the_root_is_one():
    tensors, _ = drawn()
    optimizer, parameters = made(tensors, delta_decay=0.5)
    with torch.no_grad():
        for parameter in parameters:
            parameter += 1
    run(optimizer, parameters, [[torch.zeros_like(t) for t in tensors]])
    for parameter, tensor, lr in zip(parameters, tensors, RATES, strict=True):
        torch.testing.assert_close(parameter.detach(), tensor + (1 - lr * 0.5))


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_large_tensors_take_the_same_step_as_small_ones(norm, monkeypatch):
    tensors, gradients = drawn()
    runs = []
    for block in (1, 2**20):
        monkeypatch.setattr(adamr, "BLOCK", block)
        optimizer, parameters = made(tensors, delta_decay=0.3, delta_norm=norm)
        run(optimizer, parameters, gradients)
        runs.append(parameters)
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


@pytest.mark.parametrize("reference", ["start", "zero"])
@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_no_operation_needs_a_value_of_a_device(norm, reference):
    # tensors without values: reading one, for which a device would have to be waited for, raises
    parameter = nn.Parameter(torch.empty(3, 4, device="meta"))
    parameter.grad = torch.empty_like(parameter)
    petl.AdamR([parameter], delta_decay=0.3, delta_norm=norm, reference=reference).step()


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_a_rate_on_the_device_decays_as_a_number_does(norm):
    tensors, _ = drawn()
    runs = []
    for rate in (0.25, torch.tensor(0.25)):
        params = [t.clone() for t in tensors]
        adamr._decay(params, [t + 1 for t in tensors], rate, norm)
        runs.append(params)
    for one, other, tensor in zip(*runs, tensors, strict=True):
        torch.testing.assert_close(one, other)
        torch.testing.assert_close(one, tensor + 0.25)


# State


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference_travels_with_the_state(dtype):
    tensors, gradients = drawn()
    tensors = [t.to(dtype) for t in tensors]
    straight, parameters = made(tensors, delta_decay=0.3)
    run(straight, parameters, gradients[:3])
    state = copy.deepcopy(straight.state_dict())
    resumed, others = made(parameters, delta_decay=0.3)  # made of values that are not the first
    resumed.load_state_dict(state)
    for parameter, tensor in zip(others, tensors, strict=True):
        start = resumed.state[parameter]["start"]
        assert start.dtype == torch.float32
        assert torch.equal(start, tensor.float())
    run(straight, parameters, gradients[3:])
    run(resumed, others, gradients[3:])
    assert all(torch.equal(one, other) for one, other in zip(parameters, others, strict=True))


def test_a_state_of_another_optimizer_is_refused():
    tensors, gradients = drawn()
    optimizer, parameters = made(tensors)
    adam = torch.optim.Adam(parameters)
    run(adam, parameters, gradients[:1])
    zero, _ = made(tensors, reference="zero")
    state = zero.state_dict()
    for group in state["param_groups"]:
        group["reference"] = "start"
    for other, lacking in ((adam.state_dict(), "'sum'"), (state, "'start'")):
        with pytest.raises(InputError, match=lacking):
            optimizer.load_state_dict(other)


def test_a_sparse_gradient_is_refused():
    sparse = nn.Parameter(torch.ones(2, 2))
    sparse.grad = torch.ones(2, 2).to_sparse()
    with pytest.raises(InputError):
        petl.AdamR([sparse]).step()


# Several processes


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def steps(model, optimizer, rank=None, count=4):
    """Train on a batch, of which a process has every second row; return the all-reduces a step."""
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    x = x if rank is None else x[rank::2]
    reductions = 0
    for _ in range(count):
        model(x).square().mean().backward()
        with CommDebugMode() as mode:
            optimizer.step()
        reductions = mode.get_total_counts()
        optimizer.zero_grad()
    return reductions


def adamr_of(model):
    return petl.AdamR(model.parameters(), lr=0.05, delta_decay=0.3)


def in_a_process():
    rank = torch.distributed.get_rank()
    copied = network()
    steps(DistributedDataParallel(copied), adamr_of(copied), rank)
    mesh = init_device_mesh("cpu", (2,))
    sharded = fully_shard(network(), mesh=mesh)
    optimizer = adamr_of(sharded)
    reductions = steps(sharded, optimizer, rank, count=2)
    with gathered(sharded, optimizer):  # as for a checkpoint
        kept = copy.deepcopy(optimizer.state_dict())
        start = [entry["start"] for entry in kept["state"].values()]
        optimizer.load_state_dict(kept)
    steps(sharded, optimizer, rank, count=2)
    full = [p.full_tensor().detach() for p in sharded.parameters()]
    return reductions, start, [p.detach() for p in copied.parameters()], full


@pytest.mark.thorough
def test_two_processes_train_as_one_does():
    alone = network()
    begun = [p.detach().clone() for p in alone.parameters()]
    steps(alone, adamr_of(alone))
    for reductions, start, copied, sharded in in_processes(2, in_a_process):
        assert reductions == 1
        assert all(torch.equal(a, b) for a, b in zip(start, begun, strict=True))
        for parameter, one, other in zip(alone.parameters(), copied, sharded, strict=True):
            torch.testing.assert_close(one, parameter.detach(), atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(other, parameter.detach(), atol=1e-6, rtol=1e-5)


# Runs


DECAYING = ["+method=lora", "train.optimizer=adamr", "train.delta_decay=0.5", "train.steps=8"]


@pytest.mark.thorough
def test_a_run_decays_towards_its_start_and_resumes_bit_exactly(tiny, tmp_path):
    common = [*tiny.classify, "train.log_steps=1", "train.save_steps=4"]
    free = train([*common, *DECAYING, "train.delta_decay=0"], tmp_path / "free")
    whole = train([*common, *DECAYING], tmp_path / "whole")
    saved = load_file(whole.path / "checkpoints" / "step-000008" / "optimizer.safetensors")
    first = load_file(whole.path / "checkpoints" / "step-000004" / "optimizer.safetensors")
    starts = [name for name in saved if name.endswith(".start")]
    assert len(starts) == len(whole.adapter)
    assert all(torch.equal(saved[name], first[name]) for name in starts)
    # LoRA's B starts at 0
    size = {r: sum(t.norm() for n, t in r.adapter.items() if "lora_B" in n) for r in (free, whole)}
    assert size[whole] < 0.9 * size[free]
    page = (whole.path / "report.html").read_text()
    assert "AdamR, decay 0.5 (l2) towards the start" in page

    stopped = stopped_before(whole, tmp_path / "stopped", "step-000008")
    resumed = train([*common, *DECAYING, "train.resume=auto"], stopped.path)
    assert_same_course(resumed, whole, atol=0)


@pytest.mark.thorough
def test_a_plan_counts_the_reference(tiny):
    plain = plan_run(compose([*tiny.steady, "+method=lora"])).memory
    ours = plan_run(compose([*tiny.steady, *DECAYING])).memory
    assert ours.optimizer == 1.5 * plain.optimizer
    assert ours.optimizer_state == "AdamR's two moments and reference"


@pytest.mark.thorough
def test_adalora_trains_with_it(tiny, tmp_path):
    schedule = ["method.tinit=1", "method.tfinal=1", "train.log_steps=1"]
    run = train([*tiny.steady, "+method=adalora", *schedule, *DECAYING[1:]], tmp_path / "run")
    assert len({line["loss"] for line in run.metrics}) == 8


def test_a_method_with_an_optimizer_of_its_own_is_refused():
    class Insists:
        def make_optimizer(self, groups):
            return torch.optim.SGD(groups)

    settings = TrainConfig(optimizer="adamr", delta_decay=0.1)
    with pytest.raises(InputError):
        make_optimizer(nn.Linear(2, 2), settings, Insists())
    optimizer = make_optimizer(nn.Linear(2, 2), settings)
    assert isinstance(optimizer, petl.AdamR)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0}
