"""The precision of matrix products: what a device has, and what `train.precision=auto` chooses."""

import torch
from accelerate.utils import is_bf16_available, parse_flag_from_env

from petl.errors import InputError


def device_of_run() -> torch.device:
    """Return the kind of device on which Accelerate puts a run."""
    if parse_flag_from_env("ACCELERATE_USE_CPU"):
        return torch.device("cpu")
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def bf16_units(device: torch.device) -> str:
    """Return what computes products in bfloat16 on a device, in words; "" if nothing does.

    Emulated products, which are slower than those in float32, do not count.
    """
    if device.type == "cpu":
        found = {
            "AMX": torch.cpu._is_amx_tile_supported(),
            "AVX512_BF16": torch.cpu._is_avx512_bf16_supported(),
        }
        # autocast computes by oneDNN's kernels
        has_kernels = torch.backends.mkldnn.is_available()
        return next((name for name, there in found.items() if there and has_kernels), "")
    is_supported = getattr(getattr(torch, device.type, None), "is_bf16_supported", None)
    if is_supported is None:
        return ""
    # of these two torch counts emulation, unless it is told not to
    options = {"including_emulation": False} if device.type in ("cuda", "xpu") else {}
    return "bfloat16 units" if is_supported(**options) else ""


def automatic() -> str:
    """Return the autocast precision of `train.precision=auto` on this machine, "no" or "bf16"."""
    return "bf16" if bf16_units(device_of_run()) else "no"


def described(precision: str) -> str:
    """Describe an autocast precision that `auto` stands for, with what this machine has for it."""
    device = device_of_run()
    units = bf16_units(device)
    has = f"{device.type} has {units or 'no products in bfloat16'}"
    if precision == "no":
        return f"float32 ({has})"
    return f"bf16 ({has}{'' if units else ', and emulates them, which is slow'})"


def check_bf16() -> None:
    """Raise InputError if the device of this machine cannot compute in bfloat16."""
    if not is_bf16_available(ignore_tpu=True):
        raise InputError(
            f"train.precision=bf16 is not possible on {device_of_run().type}, whose torch has no "
            "bfloat16: use another machine, or start a run with train.precision=no"
        )
