"""The rows of the benchmark: methods of petl and of PEFT, at comparable sizes, in contenders.yaml.

A registered method without an entry there is measured with its default fields, so a new method
needs no change of that file.
"""

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, XLoraConfig, get_peft_model

import petl
from bench.records import Record
from bench.shapes import Bench
from petl.core.registry import build_config, needs_calibration
from petl.errors import UnknownNameError, did_you_mean
from petl.system.files.read import read_yaml

IMPORTS = "PETL_BENCH_IMPORTS"  # environment variable: modules that register further methods
RANK = 8
LORA = "PEFT's lora"  # the row that others are compared with
EXPERTS = 4  # number of X-LoRA's adapters
NOISE = 0.02  # standard deviation of the noise added to trainable tensors, so that none is zero


@dataclass(frozen=True)
class Contender:
    """A row of the table.

    Attributes:
        method: a name in `petl.list_methods()` or `petl.list_losses()`, or "xlora" (PEFT only).
        fields: of its config.
        bits: bits per saved weight.
        tolerance: relative difference of a step to its dense reference; larger where the method
            amplifies rounding errors.
        goal: the goal for the step time relative to the lower bound, by shape; section `bf16` has
            the keys "SHAPE bf16".
        beside_lora: goals relative to PEFT's LoRA: of "time / LoRA" and "kept / LoRA".
        kernels: the goal for the kernel launches per adapted layer.
        theirs: True if LoRA layers compute with PEFT's code, not with petl's fused layers.
        recomputes: True if MLPs recompute activations in backward.
        done: optimizer steps after which the row is measured; 0: before the first.
        updates: True if each measured step has the method's update for such a step.
        elsewhere: True if it adapts none of the models here: models of images or U-Nets, which
            sections `merge` and `unet` measure, encoder-decoders, whose adapters other rows have in
            an encoder, or classification heads.
    """

    name: str
    method: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    bits: int = 32
    tolerance: float = 1e-5
    goal: Mapping[str, float] = field(default_factory=dict)
    beside_lora: Mapping[str, float] = field(default_factory=dict)
    kernels: int | None = None
    theirs: bool = False
    recomputes: bool = False
    done: int = 0
    updates: bool = False
    elsewhere: bool = False

    @property
    def is_own(self) -> bool:
        """True if the method is part of petl: an error in its row is a bug of petl."""
        if self.method in (*petl.list_losses(), "lora"):
            return not self.theirs
        return self.is_checked and petl.get(self.method).__module__.startswith("petl.")

    @property
    def is_checked(self) -> bool:
        """True if steps are compared with a dense reference, where there is one."""
        if self.method in (*petl.list_losses(), "lora"):
            return not self.theirs
        return self.method != "xlora" and petl.method(self.method).own

    def fitting(self, layers: int) -> "Contender":
        """Return the row for this number of layers: MoS needs a budget for its rank."""
        if self.method != "mos":
            return self
        budget = max(2, -(-self.fields["r"] // layers))
        return replace(self, fields={**self.fields, "equivalent_rank": budget})

    def wrap(self, bench: Bench) -> PeftModel:
        """Return a model of the bench with this adapter, always the same, with noise added."""
        torch.manual_seed(1)
        model = add_noise(self.put(bench, bench.twin(shared=not self._modifies_base())))
        if not self.theirs:
            petl.fuse_lora(model)  # as train.py does
        if self.recomputes:
            petl.recompute_mlp(model)
        if self.done:
            hooks = petl.lifecycle(model)
            hooks.after_step(self.done)
            if self.updates:
                model.register_forward_pre_hook(lambda *_: hooks.after_step(self.done))
        return model.train()

    def put(self, bench: Bench, base: Any) -> PeftModel:
        """Wrap `base`, a model of the bench, as a user would."""
        if self.method == "xlora":
            return _xlora(bench, base)
        fields: dict[str, Any] = {**self.fields, "task_type": bench.shape.task_type}
        if self.method in petl.list_losses():
            return petl.wrap(base, self.method, method_config=fields)
        needs_data = needs_calibration(build_config(self.method, **fields))
        batch = _pairs(bench.batch) if self.method == "icv" else bench.batch
        calibration = [batch] if needs_data else None
        return petl.wrap(base, self.method, calibration=calibration, **fields)

    @property
    def draws(self) -> bool:
        """True if the row differs from another one in training only."""
        return "dropout" in self.name or self.recomputes

    @property
    def merges(self) -> bool:
        """True if the adapter can be merged into the base weights."""
        if self.method == "xlora":
            return False
        known = "lora" if self.method in petl.list_losses() else self.method
        return petl.method(known).variant(self.fields).merges

    def record(self, section: str, shape: object, more: str = "", **values: Any) -> Record:
        """Return a record of this row, whose name `more` is added to."""
        return Record(section, str(shape), self.name + more, is_own=self.is_own, **values)

    def _modifies_base(self) -> bool:
        if self.method == "xlora" or self.method in petl.list_losses():
            return False
        return not petl.method(self.method).keeps_base(build_config(self.method, **self.fields))


@torch.no_grad()
def add_noise(model: PeftModel) -> PeftModel:
    """Add noise to every trainable tensor of `model`; return it."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter), alpha=NOISE)
    return model


def _pairs(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return demonstrations: the rows of a batch, and the same in reversed order of tokens."""
    mask = torch.ones_like(batch["input_ids"])
    ids = {"source": batch["input_ids"], "target": batch["input_ids"].flip(1)}
    names = {f"{side}_input_ids": tokens for side, tokens in ids.items()}
    return names | {f"{side}_attention_mask": mask for side in ids}


def _xlora(bench: Bench, base: Any) -> PeftModel:
    """PEFT's X-LoRA over saved adapters, its closest equivalent of a routed mixture."""
    with tempfile.TemporaryDirectory() as folder:
        fields = {"r": RANK, "lora_alpha": 16, "target_modules": "block-linear"}
        one: Any = petl.wrap(bench.twin(), "lora", init_lora_weights=False, **fields)
        one.save_pretrained(folder)
        config = XLoraConfig(
            task_type=bench.shape.task_type,
            hidden_size=bench.shape.hidden,
            adapters=dict.fromkeys(map(str, range(EXPERTS)), folder),
        )
        return get_peft_model(base, config)


CONTENDERS = tuple(
    Contender(**{"method": row["name"], **row})
    for row in read_yaml(Path(__file__).with_suffix(".yaml"), list[dict[str, Any]])
)


def contenders(words: Sequence[str] = ()) -> list[Contender]:
    """Return the rows with these names or methods, all without words; PEFT's LoRA is always first.

    Raises:
        UnknownNameError: there is no such row or method.
    """
    listed = {row.method for row in CONTENDERS}
    others = [name for name in petl.list_methods() if name not in listed]
    rows = [*CONTENDERS, *(Contender(name, name) for name in others)]
    known = {row.name for row in rows} | {row.method for row in rows}
    for word in words:
        if word not in known:
            raise UnknownNameError(
                f"no row or method {word!r} in the benchmark" + did_you_mean(word, known)
            )
    return [r for r in rows if not words or r.name in (LORA, *words) or r.method in words]


def import_methods() -> None:
    """Import the modules that the environment variable `IMPORTS` lists, separated by commas."""
    for module in filter(None, os.environ.get(IMPORTS, "").split(",")):
        import_module(module)


import_methods()  # here, so that the fresh processes of `isolated` know the methods as well
