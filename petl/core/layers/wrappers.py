"""Parallel wrappers around a model with adapters: what is refused, and saving from inside of FSDP1.

FSDP1 (FullyShardedDataParallel) puts a module of its own around each block, and while the block
computes, plain tensors in place of its parameters. Otherwise a process has flat parts of them, so
that a method that reads whole tensors between two passes lacks `Capability.FSDP1`.
"""

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager

from peft import PeftConfig
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from petl.core.compat import ModulesToSaveWrapper, extend_method
from petl.core.spec.facts import facts_of
from petl.core.support import Capability, Part, conflicts
from petl.errors import InputError, UnsupportedError
from petl.system.collectives import REPLICA

FSDP1 = Part("FSDP1 (FullyShardedDataParallel)", (Capability.FSDP1,))
MANAGED = "_is_fsdp_managed_module"  # attribute of all modules in FSDP1 and FSDP2
FLATTENED = "_fsdp_flattened"  # attribute of the parameters that FSDP1 shards


def factors_of_experts(config: PeftConfig) -> str:
    """Return why FSDP1 must not shard an adapter: it has stacked experts; "": it may."""
    if not facts_of(config).target_parameters:
        return ""
    return (
        "factors of stacked experts are read outside of the modules that have them, each of which "
        "PEFT's policy wraps by itself"
    )


def refuse_replica(model: nn.Module, args: object) -> None:
    """Forward pre-hook of a base model: raise UnsupportedError in a copy of nn.DataParallel.

    There is one for each GPU, which would share the forward context and the adapters of the first
    GPU, and quantized weights would not be quantized.
    """
    if hasattr(model, REPLICA):
        raise UnsupportedError(
            "nn.DataParallel, which Trainer uses if it was started as one process and sees "
            "several GPUs, cannot run methods of petl: its copies would share the adapters of "
            "the first GPU; start one process per GPU with torchrun or accelerate launch, or "
            "set CUDA_VISIBLE_DEVICES to one GPU"
        )


def in_fsdp1(model: nn.Module) -> bool:
    """Return True if FSDP1 shards a model, or modules of it."""
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        return True
    # wrapped as a whole
    return any(not isinstance(p, nn.Parameter) or hasattr(p, FLATTENED) for p in model.parameters())


class Fsdp1Check:
    """Forward pre-hook of a model: raise UnsupportedError in FSDP1 if a part of it lacks that.

    Attributes:
        parts: called with the model, returns what is chosen for it.
        is_done: True once the model was sharded, and is supported.
    """

    def __init__(self, parts: Callable[[nn.Module], Iterable[Part]]) -> None:
        self.parts, self.is_done = parts, False

    def __call__(self, model: nn.Module, args: object) -> None:
        # `vars`, since a PeftModel would ask its base model
        if self.is_done or MANAGED not in vars(model):
            return
        found = conflicts([FSDP1, *self.parts(model)]) if in_fsdp1(model) else []
        if found:
            raise UnsupportedError(
                f"{found[0]}; use FSDP2, by fsdp_version: 2 in Accelerate's config or "
                "torch.distributed.fsdp.fully_shard in a loop of your own, or DDP"
            )
        self.is_done = True


@contextmanager
def without_fsdp1(model: nn.Module, state_dict: object) -> Generator[None]:
    """Give the modules of a model in FSDP1 the names in the block that they have without it.

    For saving: PEFT and methods select tensors of the whole state dict by them.

    Raises:
        InputError: there is no state dict, and the tensors of the model are parts.
    """
    if in_fsdp1(model) and state_dict is None:
        raise InputError(
            "FSDP1 has sharded the model, whose own tensors are parts: pass the whole ones, "
            "save_pretrained(folder, state_dict=accelerator.get_state_dict(sharded)), as Trainer "
            "does, or sharded.state_dict() in FullyShardedDataParallel.state_dict_type(sharded, "
            "StateDictType.FULL_STATE_DICT), in all processes"
        )
    places = [
        (parent, name, wrapper)
        for parent in model.modules()
        for name, wrapper in parent.named_children()
        if isinstance(wrapper, FullyShardedDataParallel)
    ]
    for parent, name, wrapper in places:
        parent._modules[name] = wrapper.module
    try:
        yield
    finally:
        for parent, name, wrapper in places:
            parent._modules[name] = wrapper


def _tensors_to_save(
    original: Callable[..., dict[str, Tensor]],
    module: ModulesToSaveWrapper,
    adapter_name: str,
    state_dict: dict[str, Tensor],
) -> dict[str, Tensor]:
    """Return the tensors of a trained head in a state dict; in FSDP1 its own names are others."""
    if not in_fsdp1(module):
        return original(module, adapter_name, state_dict)
    prefix = f"modules_to_save.{adapter_name}."
    return {k.removeprefix(prefix): t for k, t in state_dict.items() if k.startswith(prefix)}


extend_method(ModulesToSaveWrapper, "adapter_state_dict", _tensors_to_save)
