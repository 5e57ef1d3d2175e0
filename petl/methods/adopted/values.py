"""Refuse values that PEFT 0.21.2 accepts although they fail, change, train nothing or give nan.

A `check_` function reads the config alone; a `fit_` function also the shapes [O, I] of the targets,
by name. All of them raise InputError.
"""

import math
import re
from collections.abc import Mapping

import peft
from peft import PeftConfig

from petl.core.compat import has_boft_kernel
from petl.core.spec.config import require
from petl.errors import InputError

Shapes = Mapping[str, tuple[int, int]]


def at_least(config: PeftConfig, minimum: int, *names: str) -> None:
    """Raise unless the fields `names` are integers of at least `minimum`."""
    for name in names:
        value = getattr(config, name)
        valid = value >= minimum and value % 1 == 0
        require(valid, f"{name}={value} is not an integer of at least {minimum}")


def above_zero(config: PeftConfig, name: str, reason: str) -> None:
    """Raise unless the field `name` is above 0."""
    value = getattr(config, name)
    require(value > 0, f"{name}={value} is not above 0: {reason}")


def one_of(config: PeftConfig, name: str, *choices: str) -> None:
    """Raise if the field `name` is a string that is not in `choices`."""
    value = getattr(config, name)
    known = not isinstance(value, str) or value in choices  # bools are always allowed
    require(known, f"{name}={value} is not one of true, false, {', '.join(choices)}")


def divides(config: PeftConfig, name: str, widths: Mapping[str, int], minimum: int = 1) -> None:
    """Raise unless the field `name` divides all `widths`; the message has the nearest valid value.

    Args:
        widths: by description, such as "input width of q_proj".
        minimum: smallest value that the field may take.
    """
    value = getattr(config, name)
    for description, width in widths.items():
        if width % value == 0:
            continue
        # valid values are the divisors of the greatest common divisor
        common = math.gcd(*widths.values())
        valid = [number for number in range(minimum, common + 1) if common % number == 0]
        hint = f"no number from {minimum} divides those of all targets; use fewer target_modules"
        if valid:
            nearest = min(valid, key=lambda number: abs(number - value))
            hint = f"use {nearest}, the nearest that divides those of all targets"
        raise InputError(f"{name}={value} does not divide {width}, the {description}; {hint}")


def input_widths(shapes: Shapes) -> dict[str, int]:
    """Input width of each target, by description."""
    return {f"input width of {name}": columns for name, (_, columns) in shapes.items()}


def output_widths(shapes: Shapes) -> dict[str, int]:
    """Output width of each target, by description."""
    return {f"output width of {name}": rows for name, (rows, _) in shapes.items()}


def of_target(config: PeftConfig, name: str, target: str) -> int:
    """Return the field `name` for one target: of `<name>_pattern`, as PEFT reads it, or its own."""
    patterns: dict[str, int] = getattr(config, f"{name}_pattern") or {}
    found = (value for key, value in patterns.items() if re.match(rf".*\.{key}$", target))
    return next(found, getattr(config, name))


def at_most(value: int, name: str, largest: Mapping[str, int], what: str, hint: str = "") -> None:
    """Raise if a value is above that of a target in `largest`; the message has the least of them.

    Args:
        what: the target's sizes are called, such as "number of weights".
        hint: what else can be done.
    """
    for target, limit in largest.items():
        if value > limit:
            raise InputError(
                f"{name}={value} is above {limit}, the {what} of {target}; use at most "
                f"{min(largest.values())} for these targets{hint}, or fewer target_modules"
            )


# One function for each method


def check_adalora(config: peft.AdaLoraConfig) -> None:
    """Check the schedule, the ranks and the smoothing factors."""
    at_least(config, 1, "target_r", "deltaT")
    at_least(config, 0, "tinit", "tfinal")
    target, init = config.target_r, config.init_r
    require(target <= init, f"target_r={target} is not in 1..init_r={init}: ranks only shrink")
    for name in ("beta1", "beta2"):
        value = getattr(config, name)
        require(0 < value < 1, f"{name}={value} is not between 0 and 1")


def check_vera(config: peft.VeraConfig) -> None:
    """Check the initial scale."""
    # lambda_b starts at 0; if lambda_d does too, neither has a gradient
    require(config.d_initial != 0, "d_initial=0 trains nothing: it blocks the gradients")


def check_lokr(config: peft.LoKrConfig) -> None:
    """Check the initialization and the factorization of widths."""
    one_of(config, "init_weights", "lycoris")
    factor = config.decompose_factor
    allowed = factor == -1 or (factor >= 1 and factor % 1 == 0)
    require(allowed, f"decompose_factor={factor} is not -1 (no limit) or an integer from 1")


def check_oft(config: peft.OFTConfig) -> None:
    """Check the block size and the Cayley transform."""
    at_least(config, 0, "oft_block_size")
    require(
        not config.module_dropout,
        f"module_dropout={config.module_dropout} would do nothing: PEFT's OFT creates its dropout "
        "and never applies it; leave it 0",
    )
    require(config.oft_block_size != 1, "oft_block_size=1 trains nothing: 1x1 blocks cannot rotate")
    minimum = 2 if config.use_cayley_neumann else 1  # the first term alone is constant
    at_least(config, minimum, "num_cayley_neumann_terms")
    require(config.eps > 0, f"eps={config.eps} is not above 0")


def fit_oft(config: peft.OFTConfig, shapes: Shapes) -> None:
    """Check that blocks divide the input widths and can rotate."""
    widths = input_widths(shapes)
    if config.oft_block_size:
        divides(config, "oft_block_size", widths, minimum=2)  # blocks of 1 cannot rotate
        return
    divides(config, "r", widths)  # here r is the number of blocks
    for description, width in widths.items():
        reason = "1x1 blocks cannot rotate, so they train nothing; use a smaller r"
        require(config.r < width, f"r={config.r} is the {description}: {reason}")


def check_boft(config: peft.BOFTConfig) -> None:
    """Check the block sizes, and that the CUDA kernel of butterfly factors exists."""
    at_least(config, 0, "boft_block_size", "boft_block_num")
    at_least(config, 1, "boft_n_butterfly_factor")
    factor = config.boft_n_butterfly_factor
    require(
        # PEFT silently falls back to 1 without its CUDA kernel
        factor == 1 or has_boft_kernel(),
        f"boft_n_butterfly_factor={factor} needs a GPU, nvcc and ninja to build PEFT's kernel; "
        "without it PEFT computes with 1: use boft_n_butterfly_factor=1",
    )


def fit_boft(config: peft.BOFTConfig, shapes: Shapes) -> None:
    """Check that blocks divide the input widths."""
    field = "boft_block_size" if config.boft_block_size else "boft_block_num"
    divides(config, field, input_widths(shapes))


def check_hra(config: peft.HRAConfig) -> None:
    """Check that reflections can cancel in pairs at the start."""
    if config.init_weights:
        require(
            config.r % 2 == 0,
            f"r={config.r} is odd: only pairs of reflections cancel, which init_weights=true needs "
            "to start at the base model's outputs; use an even r, or init_weights=false",
        )
        require(
            not config.apply_GS,
            "apply_GS=true gives nan for the pairs of equal reflections that init_weights=true "
            "starts with; use apply_GS=false or init_weights=false",
        )


def check_vblora(config: peft.VBLoRAConfig) -> None:
    """Check the vector bank and its logits."""
    at_least(config, 1, "num_vectors", "vector_length")
    top_k, num_vectors = config.topk, config.num_vectors
    require(0 < top_k <= num_vectors, f"topk={top_k} is not in 1..num_vectors={num_vectors}")
    above_zero(config, "init_vector_bank_bound", "a bank of zeros trains nothing")
    std = config.init_logits_std
    require(std >= 0, f"init_logits_std={std} is below 0")


def fit_vblora(config: peft.VBLoRAConfig, shapes: Shapes) -> None:
    """Check that vectors divide both widths."""
    divides(config, "vector_length", input_widths(shapes) | output_widths(shapes))


def check_fourierft(config: peft.FourierFTConfig) -> None:
    """Check the scaling."""
    at_least(config, 1, "n_frequency")
    require(config.scaling != 0, "scaling=0 trains nothing: it scales the update")


def fit_fourierft(config: peft.FourierFTConfig, shapes: Shapes) -> None:
    """Check that no target has more coefficients than weights."""
    default, hint = config.n_frequency, ", n_frequency_pattern for single ones"
    own = {target: of_target(config, "n_frequency", target) for target in shapes}
    shared = {t: math.prod(shape) for t, shape in shapes.items() if own[t] == default}
    at_most(default, "n_frequency", shared, "number of weights", hint)
    for target, value in own.items():
        size = {target: math.prod(shapes[target])}
        at_most(value, "n_frequency_pattern", size, "number of weights")


def fit_c3a(config: peft.C3AConfig, shapes: Shapes) -> None:
    """Check that blocks divide both widths."""
    at_least(config, 1, "block_size")
    own = {target: of_target(config, "block_size", target) for target in shapes}
    shared = {t: shape for t, shape in shapes.items() if own[t] == config.block_size}
    divides(config, "block_size", input_widths(shared) | output_widths(shared))
    for target, value in own.items():
        for width in shapes[target]:
            wrong = f"block_size_pattern: {value} does not divide {width}, a width of {target}"
            require(value > 0 and width % value == 0, wrong)


def check_shira(config: peft.ShiraConfig) -> None:
    """Check the mask type."""
    mask = config.mask_type  # PEFT has others only as Python functions
    require(mask == "random", f"mask_type={mask} is not random, the only mask that has a name")
    at_least(config, 1, "r")


def fit_shira(config: peft.ShiraConfig, shapes: Shapes) -> None:
    """Check that no target trains more weights than it has: r (I + O)."""
    largest = {target: math.prod(shape) // sum(shape) for target, shape in shapes.items()}
    at_most(config.r, "r", largest, "largest r, for all weights,")


def check_miss(config: peft.MissConfig) -> None:
    """Check the initialization and `mini_r`."""
    one_of(config, "init_weights", "bat", "mini")
    at_least(config, 1, "r", "mini_r")


def fit_miss(config: peft.MissConfig, shapes: Shapes) -> None:
    """Check that ranks fit into inputs, and divide the widths that the initialization splits."""
    if config.init_weights == "bat":
        divides(config, "r", input_widths(shapes) | output_widths(shapes))
    if config.init_weights == "mini":
        divides(config, "mini_r", output_widths(shapes))
    at_most(config.r, "r", {name: columns for name, (_, columns) in shapes.items()}, "input width")


def check_delora(config: peft.DeloraConfig) -> None:
    """Check the bounds on the norm of the update."""
    reason = "it bounds the norm of the update"
    above_zero(config, "delora_lambda", reason)
    for name, value in (config.lambda_pattern or {}).items():
        require(value > 0, f"lambda_pattern: {name}={value} is not above 0: {reason}")
