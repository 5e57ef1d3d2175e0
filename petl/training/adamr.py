"""AdamR: Adam with a decay towards the weights at the start of training instead of towards 0.

Deng, Zhao, Vakilian, Chen, Li, Thrampoulidis, "DARE the Extreme: Revisiting Delta-Parameter Pruning
For Fine-Tuned Models", ICLR 2025, arXiv 2410.09344. What was learned stays small, so that more of
it can be pruned (`petl prune`).

Symbols: theta a parameter, theta_0 its reference, lambda the decay; v_hat the second moment with
bias correction; N the number of tensors with a gradient.

Where this differs from the reference code: that copies a list of pretrained tensors in each step
and relies on its order; here the state of each parameter holds its own reference.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT, StateDict

from petl.core.types import Group
from petl.errors import InputError, shown
from petl.system.collectives import to_full, to_local

DELTA_NORMS, REFERENCES = ("l2", "l1"), ("start", "zero")
BLOCK = 2**16  # elements; measured: with L1 1.5 times faster on a CPU than all tensors at once
STATE = ("step", "sum", "exp_avg", "exp_avg_sq")  # and "start", unless the reference is 0


class ParameterBlock(NamedTuple):
    """Parameters of a group with a gradient, of one device and dtype, and their states."""

    group: Group
    params: list[Tensor]
    gradients: list[Tensor]
    states: list[dict[str, Tensor]]


class AdamR(Optimizer):
    """Adam with a decay towards the weights at the start of training (Deng et al. 2025).

    Before Adam's own update, `theta <- theta - lr * delta_decay / root * (theta - theta_0)`, with
    `sign(theta - theta_0)` for the L1 form; root is the square root of the mean of v_hat over all
    elements of all parameters with a gradient, 1 if that is 0. There is no other weight decay.

    `state[p]["start"]` holds the reference in float32, so checkpoints keep it. Create the optimizer
    when the parameters have their initial values and are on their device. FSDP2 is supported;
    optimizers that flatten the parameters (DeepSpeed's ZeRO) are not.

    Args:
        params: tensors or parameter groups, as for any optimizer; floating-point.
        lr: learning rate, from 0.
        betas: decay rates of the two moments, from 0 to below 1.
        eps: added to the denominator, for numerical stability.
        delta_decay: lambda, from 0.
        delta_norm: "l2", or "l1", which moves each element by the same distance.
        reference: theta_0: "start", a copy of each tensor when it is added, or "zero".

    Raises:
        InputError: an argument is out of range, or a group has a `weight_decay`.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        delta_decay: float = 0.0,
        delta_norm: str = "l2",
        reference: str = "start",
    ) -> None:
        options = {"lr": lr, "betas": betas, "eps": eps, "delta_decay": delta_decay}
        super().__init__(params, {**options, "delta_norm": delta_norm, "reference": reference})

    def add_param_group(self, param_group: Group) -> None:
        """Add a group; the reference of its tensors is their present value."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        _check(group)
        for parameter in group["params"]:
            self.state[parameter] = _initial_state(parameter, group["reference"])

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update every parameter that has a gradient; no operation waits for the device.

        Raises:
            InputError: a gradient is sparse.
        """
        with torch.enable_grad():
            loss = None if closure is None else closure()
        parts = [part for group in self.param_groups for part in _parts(group, self.state)]
        if parts:
            root = _root(parts)
            for part in parts:
                _update(part, root)
        return loss

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Restore a state, with the references that it holds.

        Raises:
            InputError: it is of another optimizer, or an option is out of range.
        """
        state, groups = state_dict["state"], state_dict["param_groups"]
        for group in groups:
            kept = {*STATE, *(["start"] if group.get("reference") == "start" else [])}
            entries = [state.get(number, {}).keys() for number in group["params"]]
            lacking = sorted({key for keys in entries for key in kept - keys})
            if lacking or "reference" not in group:
                raise InputError(
                    f"AdamR cannot load this state, which has no {(lacking or ['reference'])[0]!r} "
                    "of each parameter: it is of another optimizer"
                )
            _check(group)
        super().load_state_dict(state_dict)
        numbers = chain.from_iterable(group["params"] for group in groups)
        for number, parameter in zip(numbers, _parameters(self.param_groups), strict=True):
            # torch gives them the parameter's dtype, which may be bfloat16
            for key in {"step", "sum", "start"} & state[number].keys():
                value = state[number][key].to(parameter.device)
                self.state[parameter][key] = value.to(_wide(value.dtype))


def _check(group: Group) -> None:
    """Raise InputError for a parameter group that AdamR cannot train."""
    for key in ("lr", "eps", "delta_decay"):
        # not `< 0`, which is False of nan
        if not 0 <= group.get(key, -1) < math.inf:
            raise InputError(f"AdamR: {key}={shown(group.get(key))} is not a number from 0")
    betas = group.get("betas", ())
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise InputError(f"AdamR: betas={shown(betas)} are not two numbers from 0 to below 1")
    for key, options in (("delta_norm", DELTA_NORMS), ("reference", REFERENCES)):
        if group.get(key) not in options:
            raise InputError(f"AdamR: {key}={shown(group.get(key))} is not {' or '.join(options)}")
    if group.get("weight_decay"):
        raise InputError(
            f"AdamR: weight_decay={shown(group['weight_decay'])} is a decay towards 0, which it "
            "does not have; set delta_decay, and leave weight_decay out"
        )


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _parameters(groups: Sequence[Group]) -> Iterable[Tensor]:
    return chain.from_iterable(group["params"] for group in groups)


def _initial_state(parameter: Tensor, reference: str) -> dict[str, Tensor]:
    """Return the state before the first step: moments, counters, and the reference."""
    if not parameter.is_floating_point():
        raise InputError(
            f"AdamR: a parameter of shape {list(parameter.shape)} is of {parameter.dtype}, which "
            "is not real floating-point: leave it out of the parameter groups"
        )
    zero = torch.zeros((), dtype=torch.float32, device=parameter.device)
    state = {
        "step": zero,
        "sum": zero.clone(),  # of exp_avg_sq, over all elements on all processes
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }
    if reference == "start":
        state["start"] = parameter.detach().clone().to(_wide(parameter.dtype))
    return state


# One step


def _parts(group: Group, state: Mapping[Tensor, dict[str, Tensor]]) -> list[ParameterBlock]:
    """Divide the parameters of a group that have a gradient as multi-tensor kernels need them."""
    found: dict[tuple[torch.device, torch.dtype, bool], ParameterBlock] = {}
    for parameter in group["params"]:
        gradient = parameter.grad
        if gradient is None:
            continue
        if gradient.is_sparse:
            raise InputError(
                f"AdamR: the gradient of a parameter of shape {list(parameter.shape)} is sparse: "
                "create the embedding with sparse=False"
            )
        kind = parameter.device, parameter.dtype, isinstance(parameter, DTensor)
        part = found.get(kind)
        if part is None:
            part = found[kind] = ParameterBlock(group, [], [], [])
        part.params.append(parameter)
        part.gradients.append(gradient)
        part.states.append(state[parameter])
    return list(found.values())


def _root(parts: Sequence[ParameterBlock]) -> Tensor:
    """Count the step; return the root mean square that scales the decay, 0-d on the device."""
    device = parts[0].params[0].device
    total = torch.stack([_sum_of_v_hat(part).to(device) for part in parts]).sum()
    count = sum(parameter.numel() for part in parts for parameter in part.params)
    root = total.div_(count).sqrt_()
    return torch.where(root == 0, 1.0, root)


def _sum_of_v_hat(part: ParameterBlock) -> Tensor:
    """Count the step of each tensor; return the sum of v_hat over all elements, 0-d.

    v is not read: v = beta_2 v + (1 - beta_2) g^2 holds for sums over elements as well. Under FSDP2
    the norms of the gradients are summed over the shards by one all-reduce.
    """
    beta_2 = part.group["betas"][1]
    step_N, sum_N = _vector(part.states, "step"), _vector(part.states, "sum")
    step_N += 1
    norm_N = to_full(torch.stack(torch._foreach_norm(part.gradients, 2))).float()
    sum_N.mul_(beta_2).addcmul_(norm_N, norm_N, value=1 - beta_2)
    # 1 - beta_2^t; in float32 the difference itself would lose three digits at the first step
    correction_N = torch.expm1(step_N * (math.log(beta_2) if beta_2 else -math.inf))
    return sum_N.div(correction_N).sum().neg_()


def _vector(states: Sequence[dict[str, Tensor]], key: str) -> Tensor:
    """Return a 0-d entry of N states as one vector [N], of which the entries become views.

    One operation then updates all of them. A state that was loaded, or has other neighbours than in
    the last step, is packed again.
    """
    values = [state[key] for state in states]
    base = values[0]._base
    if (
        base is not None
        and base.shape == (len(values),)
        and all(v._base is base and v.storage_offset() == i for i, v in enumerate(values))
    ):
        return base
    vector = torch.stack(values)
    for state, view in zip(states, vector.unbind(), strict=True):
        state[key] = view
    return vector


def _update(part: ParameterBlock, root: Tensor) -> None:
    """Decay towards the reference, then make Adam's update."""
    group, states = part.group, part.states
    has_start = group["reference"] == "start"
    on_device = group["lr"] * group["delta_decay"] / root.to(part.params[0].device)
    # a CPU has no queue to wait for, and its kernels are faster with a number
    rate = float(on_device) if on_device.is_cpu else on_device
    keys = ("exp_avg", "exp_avg_sq", *(["start"] if has_start else []))
    lists = [part.params, part.gradients, *([s[key] for s in states] for key in keys)]
    if isinstance(part.params[0], DTensor):
        # shards, which share their memory with the parameters
        lists = [[to_local(tensor) for tensor in tensors] for tensors in lists]
    steps = [state["step"] for state in states]
    beta_1, beta_2 = group["betas"]
    for block in _blocks(lists[0]):
        params, gradients, exp_avgs, exp_avg_sqs, *starts = (tensors[block] for tensors in lists)
        _decay(params, starts[0] if has_start else None, rate, group["delta_norm"])
        torch._fused_adam_(
            params,
            gradients,
            exp_avgs,
            exp_avg_sqs,
            [],
            steps[block],
            lr=group["lr"],
            beta1=beta_1,
            beta2=beta_2,
            weight_decay=0.0,
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )


def _blocks(params: Sequence[Tensor]) -> Iterator[slice]:
    """Yield slices of a list: on a CPU of tensors that fit into its cache, else of all."""
    first = size = 0
    for i, parameter in enumerate(params if params[0].is_cpu else (), start=1):
        size += parameter.numel()
        if size >= BLOCK:
            yield slice(first, i)
            first, size = i, 0
    if first < len(params):
        yield slice(first, None)


def _decay(
    params: list[Tensor], starts: list[Tensor] | None, rate: Tensor | float, norm: str
) -> None:
    """Move tensors towards `starts`, or 0 for None: by the fraction `rate`, or by it for l1."""
    if starts is None and norm == "l2":
        torch._foreach_mul_(params, 1 - rate)
        return
    if starts is None:
        moves = list(torch._foreach_sign(params))
    elif norm == "l2" and isinstance(rate, float) and starts[0].dtype == params[0].dtype:
        torch._foreach_lerp_(params, starts, rate)  # one pass
        return
    else:
        # of parameters in bfloat16 in float32, rounded once
        moves = list(torch._foreach_sub(params, starts))
        if norm == "l1":
            torch._foreach_sign_(moves)
    if isinstance(rate, float):
        torch._foreach_add_(params, moves, alpha=-rate)
    else:
        torch._foreach_mul_(moves, rate)
        torch._foreach_sub_(params, moves)
