"""The precision of matrix products: what a device has, and what `train.precision=auto` chooses."""

import os
from pkgutil import resolve_name

import torch
from accelerate.utils import is_bf16_available, parse_flag_from_env

from petl.data.models.sources import ModelSource
from petl.errors import InputError

ASKED = "ACCELERATE_MIXED_PRECISION"  # environment variable of `accelerate launch`
CHOICES = ("no", "bf16")
NARROW = 128  # below it casts take longer than products save: 1.04 to 1.7 of float32's time
NO_TRIAL = f"which pays for states of {NARROW} numbers or more"
PAYS = 0.9  # of float32's time; what saves less is not worth other rounding


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


def automatic(source: ModelSource, float32: str = "") -> str:
    """Return the autocast precision of `train.precision=auto`, "no" or "bf16".

    It is what `accelerate launch` was told; else bf16 if this machine has units for such products
    and blocks of the model's width take less time with them, as a trial of a second finds.

    Args:
        float32: as of `RunConfig`.

    Raises:
        InputError: Accelerate was told another one; the model is not available.
    """
    asked = os.environ.get(ASKED)
    if asked is not None and asked not in CHOICES:
        raise InputError(
            f"{ASKED}={asked}, as accelerate launch --mixed_precision sets it: allowed are "
            f"{' and '.join(CHOICES)}; or set train.precision of the run"
        )
    share = None if asked or float32 else _share(source)
    return asked or ("bf16" if share is not None and share <= PAYS else "no")


def width_to_try(source: ModelSource) -> int | None:
    """Return the width of a model for which a trial decides what auto is; None if none does.

    Raises:
        InputError: the model is not available.
    """
    if ASKED in os.environ or not bf16_units(device_of_run()):
        return None
    with resolve_name("petl.data.models.loading:loading")(source):
        width = getattr(source.config().get_text_config(), "hidden_size", None)
    return width if isinstance(width, int) and width >= NARROW else None


def _share(source: ModelSource) -> float | None:
    """Return the time of bfloat16 for a model, float32's as unit; None where it is not tried."""
    width = width_to_try(source)
    if width is None:
        return None
    measure = resolve_name("petl.training.distributed.trial:share_of_float32")
    return measure(width, device_of_run())


def described(precision: str, source: ModelSource, float32: str = "") -> str:
    """Describe an autocast precision that `auto` stands for, with the reason for it."""
    if source.dtype == "bfloat16":
        return "bf16 (model.dtype=bfloat16, with an adapter in float32)"
    device = device_of_run()
    units = bf16_units(device)
    why = [f"{device.type} has {units or 'no products in bfloat16'}"]
    if ASKED in os.environ:
        why = [f"{ASKED} is set to {os.environ[ASKED]}"]
    elif float32 and precision == "no":
        why = [float32]
    elif units:
        share = _share(source)
        why.append(NO_TRIAL if share is None else f"a step takes {share:.2f} of float32's time")
    elif precision == "bf16":
        why.append("and emulates them, which is slow")
    return f"{'float32' if precision == 'no' else precision} ({', '.join(why)})"


def check_bf16() -> None:
    """Raise InputError if the device of this machine cannot compute in bfloat16."""
    if not is_bf16_available(ignore_tpu=True):
        raise InputError(
            f"train.precision=bf16 is not possible on {device_of_run().type}, whose torch has no "
            "bfloat16: use another machine, or start a run with train.precision=no"
        )
