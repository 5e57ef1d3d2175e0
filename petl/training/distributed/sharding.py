"""Which methods and base models a run can shard over processes."""

from accelerate import Accelerator
from peft import PeftConfig

from petl.core.registry import refusal
from petl.core.support import Capability
from petl.errors import UnsupportedError
from petl.training.distributed.launch import is_zero


def refuse_sharding(config: PeftConfig, quantization: str | None, accelerator: Accelerator) -> None:
    """Raise UnsupportedError if the run would shard a method or a base that cannot be sharded."""
    reason = refusal(config, Capability.ZERO)
    if is_zero(accelerator) and reason:
        raise UnsupportedError(f"launch=deepspeed is not possible: {reason}")
    if accelerator.num_processes > 1 and (quantization or "").startswith("torchao"):
        raise UnsupportedError(
            f"weights in model.quantization={quantization} can neither be broadcast nor sharded; "
            "use bnb_8bit, or one process"
        )
    if not accelerator.is_fsdp2:
        return
    refuse_fsdp(config, quantization)


def refuse_fsdp(config: PeftConfig, quantization: str | None) -> None:
    """Raise UnsupportedError if FSDP2 cannot shard the method or its base."""
    # quantization is named first: it can be changed without changing the method
    reason = refusal(config, Capability.FSDP)
    if quantization is not None:
        reason = f"weights in model.quantization={quantization} cannot be sharded; use launch=ddp"
    if reason:
        raise UnsupportedError(f"launch=fsdp is not possible: {reason}")
