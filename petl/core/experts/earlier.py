"""Adapters of experts that earlier versions of PEFT and transformers have saved."""

import re
import tempfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from peft import PeftConfig, PeftType
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from petl.core.adapter_file import PREFIX, WEIGHTS
from petl.core.adapter_folder import CONFIG, Folder
from petl.core.experts.checkpoints import parts_of
from petl.core.experts.earlier_layers import to_stacks
from petl.core.experts.layout import experts_of
from petl.core.experts.stacks import Stack, saved_factors, stacked_factors, stacks_of
from petl.errors import InputError
from petl.system.files.read import read_json

SIDES = (0, 21)  # version of PEFT from which on inputs and outputs of a stack are told apart
OF_ONE = re.compile(r"\.\d+\.[^.]+\.lora_A\.")  # in the key of an expert that had a layer


@contextmanager
def in_todays_layout(folder: Folder, model: nn.Module, config: PeftConfig) -> Generator[Folder]:
    """Yield an adapter, or a temporary folder with its tensors as PEFT saves them now.

    Before transformers 5 each expert had layers of its own; and PEFT before 0.21 took the outputs
    of a stack for its inputs.

    Raises:
        InputError: nothing tells which of two versions the tensors are of.
    """
    found = None
    if config.peft_type == PeftType.LORA:
        if isinstance(model, PreTrainedModel) and _has_layers_of_experts(folder, model):
            found = to_stacks(config, model, folder.tensors, folder.weights)
        else:
            stacks = [*stacks_of(config, model)]
            if _is_earlier(folder, stacks):
                found = _with_sides_exchanged(folder.tensors, stacks)
    if found is None:
        yield folder
        return
    with tempfile.TemporaryDirectory() as place:
        config.save_pretrained(place)
        save_file({k: t.contiguous() for k, t in found.items()}, Path(place) / WEIGHTS)
        yield Folder(place)


def _has_layers_of_experts(folder: Folder, model: PreTrainedModel) -> bool:
    """Return True if the file has layers of single experts, which are stacks in `model`."""
    # most files have no layer with a number; those of LongCat's dense layers have one, too
    if not any(OF_ONE.search(key) for key in folder.shapes):
        return False
    owners = ((path, module, experts_of(module)) for path, module in model.named_modules())
    return any(
        f"{PREFIX}{part.path}.lora_A.weight" in folder.shapes
        for path, module, layout in owners
        for name in (layout.stacks if layout else ())
        for part in parts_of(model, path, module, name)
    )


def _is_earlier(folder: Folder, stacks: Sequence[Stack]) -> bool:
    """Return True for tensors of PEFT before 0.21: by their shapes, or else by its version."""
    shapes, ambiguous = folder.shapes, None
    for stack in stacks:
        key = f"{PREFIX}{stack.saved_path}.lora_A.weight"
        # those with the flag are the same in both
        if getattr(stack.module, "is_transposed", False) or key not in shapes:
            continue
        *_, first, second = stack.module.get_parameter(stack.name).shape
        if first != second:
            return shapes[key][1][-1] == first
        ambiguous = stack
    if ambiguous is None:
        return False
    file = folder.file(CONFIG)
    version = "" if file is None else str(read_json(file).get("peft_version"))
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None:
        raise InputError(
            f"{folder.path} adapts {ambiguous.path}.{ambiguous.name}, whose experts have as many "
            f"inputs as outputs, and {CONFIG} has no peft_version, which tells them apart: write "
            "the version of PEFT that saved it into that file, such as 0.20.0"
        )
    return (int(numbers[1]), int(numbers[2])) < SIDES


def _with_sides_exchanged(
    tensors: Mapping[str, Tensor], stacks: Sequence[Stack]
) -> dict[str, Tensor]:
    found = dict(tensors)
    for stack in stacks:
        a, b = (f"{PREFIX}{stack.saved_path}.lora_{side}.weight" for side in "AB")
        if a in found and not getattr(stack.module, "is_transposed", False):
            experts = len(stack.module.get_parameter(stack.name))
            A, B = stacked_factors(found[a], found[b], experts, swapped=True)
            found[a], found[b] = saved_factors(A, B, swapped=False)
    return found
