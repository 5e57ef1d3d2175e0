"""Values that PEFT 0.21.2 takes, and fails on later, replaces, or trains nothing or nan with.

A `check_` looks at a config alone; a `fit_` also at the targets, whose shapes [O, I] are by name.
"""

import math
from collections.abc import Mapping
from typing import Any

from petl.core.compat import has_boft_kernel
from petl.core.spec.config import require
from petl.errors import InputError

Shapes = Mapping[str, tuple[int, int]]


def at_least(config: Any, least: int, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        whole = value >= least and value % 1 == 0
        require(whole, f"{name}={value} is not a whole number from {least}")


def above_zero(config: Any, name: str, why: str) -> None:
    value = getattr(config, name)
    require(value > 0, f"{name}={value} is not above 0: {why}")


def one_of(config: Any, name: str, *words: str) -> None:
    value = getattr(config, name)
    known = not isinstance(value, str) or value in words
    require(known, f"{name}={value} is not true, false or {', '.join(words)}")


def divides(config: Any, field: str, widths: Mapping[str, int], least: int = 1) -> None:
    """Raise InputError, with the nearest number that does, if a field does not divide all `widths`.

    Args:
        widths: by what they are, in words.
        least: the least number that the field may be.
    """
    value = getattr(config, field)
    for what, width in widths.items():
        if width % value == 0:
            continue
        common = math.gcd(*widths.values())
        fitting = [number for number in range(least, common + 1) if common % number == 0]
        hint = f"no number from {least} divides those of all targets, so name fewer target_modules"
        if fitting:
            nearest = min(fitting, key=lambda number: abs(number - value))
            hint = f"take {nearest}, the nearest that divides those of all targets"
        raise InputError(f"{field}={value} does not divide {width}, the {what}; {hint}")


def inputs(shapes: Shapes) -> dict[str, int]:
    return {f"input width of {name}": columns for name, (_, columns) in shapes.items()}


def outputs(shapes: Shapes) -> dict[str, int]:
    return {f"output width of {name}": rows for name, (rows, _) in shapes.items()}


def check_adalora(config: Any) -> None:
    at_least(config, 1, "target_r", "deltaT")
    at_least(config, 0, "tinit", "tfinal")
    target, init = config.target_r, config.init_r
    require(target <= init, f"target_r={target} is not in 1..init_r={init}: ranks only shrink")
    for name in ("beta1", "beta2"):
        value = getattr(config, name)
        require(0 < value < 1, f"{name}={value} is not between 0 and 1")


def check_vera(config: Any) -> None:
    require(config.d_initial != 0, "d_initial=0 trains nothing: no gradient comes through it")


def check_lokr(config: Any) -> None:
    one_of(config, "init_weights", "lycoris")
    factor = config.decompose_factor
    allowed = factor == -1 or (factor >= 1 and factor % 1 == 0)
    require(allowed, f"decompose_factor={factor} is not -1 (no limit) or a whole number from 1")


def check_oft(config: Any) -> None:
    at_least(config, 0, "oft_block_size")
    require(config.oft_block_size != 1, "oft_block_size=1 trains nothing: a number has no rotation")
    least = 2 if config.use_cayley_neumann else 1  # the first term alone is constant
    at_least(config, least, "num_cayley_neumann_terms")
    require(config.eps > 0, f"eps={config.eps} is not above 0")


def fit_oft(config: Any, shapes: Shapes) -> None:
    widths = inputs(shapes)
    if config.oft_block_size:
        divides(config, "oft_block_size", widths, least=2)
        return
    divides(config, "r", widths)
    for what, width in widths.items():
        trains = config.r < width
        why = "blocks of one number have no rotation, so they train nothing; take a smaller r"
        require(trains, f"r={config.r} is the {what}: {why}")


def check_boft(config: Any) -> None:
    at_least(config, 0, "boft_block_size", "boft_block_num")
    at_least(config, 1, "boft_n_butterfly_factor")
    factor = config.boft_n_butterfly_factor
    require(
        factor == 1 or has_boft_kernel(),
        f"boft_n_butterfly_factor={factor} needs a GPU, nvcc and ninja, of which PEFT makes a "
        "kernel, and here it would compute with 1; take 1",
    )


def fit_boft(config: Any, shapes: Shapes) -> None:
    field = "boft_block_size" if config.boft_block_size else "boft_block_num"
    divides(config, field, inputs(shapes))


def check_hra(config: Any) -> None:
    if config.init_weights:
        require(
            config.r % 2 == 0,
            f"r={config.r} is odd: reflections that cancel in pairs start at the base model's "
            "outputs; take an even r, or init_weights=false, which starts elsewhere",
        )
        require(
            not config.apply_GS,
            "apply_GS=true makes nan of the pairs of equal reflections that init_weights=true "
            "starts with; take apply_GS=false, or init_weights=false, which starts elsewhere",
        )


def check_vblora(config: Any) -> None:
    at_least(config, 1, "num_vectors", "vector_length")
    top, num = config.topk, config.num_vectors
    require(0 < top <= num, f"topk={top} is not in 1..num_vectors={num}")
    above_zero(config, "init_vector_bank_bound", "a bank of zeros trains nothing")
    std = config.init_logits_std
    require(std >= 0, f"init_logits_std={std} is below 0")


def fit_vblora(config: Any, shapes: Shapes) -> None:
    divides(config, "vector_length", inputs(shapes) | outputs(shapes))


def check_fourierft(config: Any) -> None:
    require(config.scaling != 0, "scaling=0 trains nothing: it scales the update")


def check_shira(config: Any) -> None:
    only = "the one mask that can be named"
    require(config.mask_type == "random", f"mask_type={config.mask_type} is not random, {only}")


def check_miss(config: Any) -> None:
    one_of(config, "init_weights", "bat", "mini")
    at_least(config, 1, "mini_r")


def fit_miss(config: Any, shapes: Shapes) -> None:
    if config.init_weights == "bat":
        divides(config, "r", inputs(shapes) | outputs(shapes))
    if config.init_weights == "mini":
        divides(config, "mini_r", outputs(shapes))


def check_delora(config: Any) -> None:
    why = "it bounds the norm of the update"
    above_zero(config, "delora_lambda", why)
    for name, value in (config.lambda_pattern or {}).items():
        require(value > 0, f"lambda_pattern: {name}={value} is not above 0: {why}")
