"""The rows of the benchmark: methods of petl and of PEFT, at comparable sizes.

They adapt all linear layers of the blocks, low-rank methods at rank 8; IA3 and tuned norms adapt
the modules of their papers. A registered method without an entry here is measured with its default
fields, so a new method needs no change of this file.
"""

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any

import torch
from peft import PeftModel, XLoraConfig, get_peft_model

import petl
from bench.shapes import Bench
from petl.core.registry import build_config, needs_calibration
from petl.errors import UnknownNameError, did_you_mean

IMPORTS = "PETL_BENCH_IMPORTS"  # environment variable: modules that register further methods
RANK = 8
DROPOUT = 0.05
LORA = "PEFT's lora"  # the row that others are compared with
STEPS = 1000  # length of the run, for methods with a schedule
EXPERTS = 4  # number of X-LoRA's adapters
NOISE = 0.02  # standard deviation of the noise added to trainable tensors, so that none is zero
TARGETS = {"target_modules": "block-linear"}
ON_LORA: dict[str, Any] = {"inner": "lora", "r": RANK, "lora_alpha": 16, **TARGETS}
BOTH = ["attn", "ffn"]  # locations, as of adapters
INCRE = {"init_r": RANK - 1, "rank_step": 1, "target_r": RANK, "total_step": STEPS}
SPARSE = {"density": 0.01, "total_step": STEPS}
# nine tenths of the weights are pruned from the first step on
PST = {"r": RANK, "mask_r": RANK, "initial_sparsity": 0.9, "total_step": STEPS}
# the same targets and rank as LoRA's row
DSEE = {"r": RANK, "lora_alpha": 16, "sparse_init": "magnitude", **TARGETS}


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
        petl.wrap(bench.twin(), "lora", **_lora(init_lora_weights=False)).save_pretrained(folder)
        config = XLoraConfig(
            task_type=bench.shape.task_type,
            hidden_size=bench.shape.hidden,
            adapters=dict.fromkeys(map(str, range(EXPERTS)), folder),
        )
        return get_peft_model(base, config)


def _lora(**fields: Any) -> dict[str, Any]:
    return {"r": RANK, "lora_alpha": 16, **TARGETS, **fields}


# as in configs/method/ln_tuning.yaml
NORMS = ".*([lL]ayer_?[nN]orm|layernorm_before|layernorm_after|\\.norm|ln_\\d|ln_f)"
# measured: the goals are times of the fastest known implementation, see docs/performance.md
PLAIN: dict[str, Any] = {
    "goal": {"llama": 1.08, "minilm": 1.11, "llama bf16": 1.12, "minilm bf16": 1.15},
    "kernels": 10,
}
DROPPED: dict[str, Any] = {
    "goal": {"llama": 1.12, "minilm": 1.25, "llama bf16": 1.25, "minilm bf16": 1.35},
    "kernels": 18,
}
CONTENDERS = (
    Contender(LORA, "lora", _lora(), theirs=True),
    Contender("PEFT's lora, dropout", "lora", _lora(lora_dropout=DROPOUT), theirs=True),
    Contender("lora", "lora", _lora(), **PLAIN),
    Contender("lora, dropout", "lora", _lora(lora_dropout=DROPOUT), **DROPPED),
    Contender("lora, mlp recomputed", "lora", _lora(), recomputes=True),
    Contender(
        "corda",
        "corda",
        _lora(lora_alpha=RANK),
        tolerance=1e-4,  # few tokens make large factors, whose products cancel in the weight
        **PLAIN,
    ),
    Contender(
        "increlora",
        "increlora",
        {**INCRE, "score_window": 1},
        goal={"llama": 1.08, "minilm": 1.12},
        kernels=17,
    ),
    Contender(
        "increlora, scored",
        "increlora",
        INCRE,
        goal={"llama": 1.48, "minilm": 1.55},
        kernels=25,
    ),
    Contender(
        "mola 8/2",
        "mola",
        {"r": RANK, "num_experts": 8, "top_k": 2},
        goal={"llama": 1.28, "minilm": 1.48},
        kernels=38,
    ),
    Contender(
        "mola 8/2, pregated",
        "mola",
        {
            "r": RANK,
            "num_experts": 8,
            "top_k": 2,
            "router_type": "pregated",
            "router_hidden_size": 64,
        },
        goal={"llama": 1.15},
    ),
    Contender(
        "mos",
        "mos",
        {"r": RANK, "equivalent_rank": 2, "shards_per_vector": 2, "private_rank": 0},
        goal={"llama": 1.08, "minilm": 1.11},
        kernels=10,
    ),
    Contender("adapter 48", "adapter", {"r": 48}),
    # goals: at most 1.15 and 1.05 of the row before; these are the adapters of vl_pet
    Contender("adapter 48, gate large", "adapter", {"r": 48, "gate": "large"}),
    Contender("adapter 48, gate middle_x", "adapter", {"r": 48, "gate": "middle_x"}),
    Contender("vl_pet", "vl_pet", elsewhere=True),
    Contender(
        "adapter 48, blocks",
        "adapter",
        {"r": 48, "locations": ["block"], "placement": "parallel"},
    ),
    Contender(
        "compacter 48",
        "compacter",
        {"r": 48, "phm_dim": 4},
        goal={"llama": 1.02, "minilm": 1.03},
        kernels=20,
    ),
    Contender("icv, trained", "icv", {"train": True}),
    Contender("dkvb", "dkvb", elsewhere=True),
    Contender("sherl", "sherl", beside_lora={"time / LoRA": 0.6, "kept / LoRA": 0.2}),
    # the reference for polyhistor's goal: at most 1.10 of this row
    Contender("adapter 48, norm after", "adapter", {"r": 48, "ln_after": True}),
    Contender("polyhistor 48", "polyhistor", {"r": 48, "tasks": ["only"], "locations": BOTH}),
    Contender(
        "binary on lora",
        "binary",
        ON_LORA,
        bits=1,
        goal={"llama": 1.08, "minilm": 1.11},
        kernels=13,
    ),
    Contender(
        "sparse 1 %",
        "sparse",
        {**SPARSE, "selection_algorithm": "none"},
        goal={"llama": 1.08, "minilm": 1.11},
        kernels=4,
    ),
    Contender("sparse, watched", "sparse", SPARSE),
    Contender("pst", "pst", PST, goal={"llama": 1.7, "minilm": 1.7}, done=1),
    Contender(
        "pst, new masks", "pst", PST, goal={"llama": 2.0, "minilm": 2.0}, done=1, updates=True
    ),
    Contender("dsee", "dsee", DSEE, goal={"llama": 1.06, "minilm": 1.08}),
    Contender(
        "dsee, pruned",
        "dsee",
        {**DSEE, "target_prune_ratio": 0.5, "prune_mode": "weight", "prune_step": 1},
        goal={"llama": 1.08, "minilm": 1.10},
        done=1,
    ),
    Contender("pyra", "pyra", elsewhere=True),
    Contender("scedit", "scedit", elsewhere=True),
    Contender(
        "density on lora",
        "density",
        _lora(),
        tolerance=1e-3,  # the slope near 0 is 1 / eps times steeper than elsewhere
        goal={"llama": 1.10, "minilm": 1.14},
        kernels=13,
    ),
    # c = 2: half of the forward pass and of the gradients of activations, and those of the factors
    Contender("pela, c = 2", "pela", TARGETS, goal={"llama": 0.9, "minilm": 0.9}),
    Contender("distill on lora", "distill", _lora(), goal={"llama": 1.45, "minilm": 1.45}),
    Contender(
        "adalora",
        "adalora",
        _lora(init_r=RANK, target_r=RANK // 2, tinit=10, tfinal=10, total_step=STEPS),
    ),
    Contender("vera 256", "vera", {"r": 256, **TARGETS}),
    Contender("shira", "shira", {"r": RANK, **TARGETS}),
    Contender("xlora 4", "xlora"),
    Contender("rslora", "rslora", _lora()),
    Contender("dora", "dora", _lora()),
    Contender("delora", "delora", {"r": RANK, **TARGETS}),
    Contender("loha", "loha", {"r": RANK, **TARGETS}),
    Contender("lokr", "lokr", {"r": RANK, **TARGETS}),
    Contender("miss 32", "miss", {"r": 32, **TARGETS}),
    Contender("hra", "hra", {"r": RANK, **TARGETS}),
    Contender("oft 32", "oft", {"oft_block_size": 32, **TARGETS}),
    Contender("boft 8", "boft", {"boft_block_size": 8, "boft_n_butterfly_factor": 1, **TARGETS}),
    Contender("c3a 32", "c3a", {"block_size": 32, **TARGETS}),
    Contender("fourierft 1000", "fourierft", {"n_frequency": 1000, **TARGETS}),
    Contender("randlora 32", "randlora", {"r": 32, **TARGETS}),
    Contender(
        "vblora", "vblora", {"r": 4, "num_vectors": 256, "vector_length": 32, "topk": 2, **TARGETS}
    ),
    Contender("ia3", "ia3"),
    Contender("ln_tuning", "ln_tuning", {"target_modules": NORMS}),
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
