"""What is measured: each method of petl's own, and PEFT's beside it, at comparable sizes.

All adapt every linear layer of the blocks, LoRA and its kin at rank 8; IA3 and tuned norms what is
theirs. A method that is registered and has no line here is measured with its default fields.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft import PeftModel, XLoraConfig, get_peft_model

import petl
from bench.shapes import Bench
from petl.core.registry import build_config, needs_calibration
from petl.errors import UnknownNameError, did_you_mean

RANK = 8
DROPOUT = 0.05
LORA = "PEFT's lora"  # what the others are measured against
STEPS = 1000  # of the run that methods with a schedule are told of
EXPERTS = 4  # X-LoRA's adapters
NOISE = 0.02  # standard deviation of what is added to trainable tensors, so that none is zero
TARGETS = {"target_modules": "block-linear"}
ON_LORA: dict[str, Any] = {"inner": "lora", "r": RANK, "lora_alpha": 16, **TARGETS}
INCRE = {"init_r": RANK - 1, "rank_step": 1, "target_r": RANK, "total_step": STEPS}
SPARSE = {"density": 0.01, "total_step": STEPS}


@dataclass(frozen=True)
class Contender:
    """A row of the table.

    Attributes:
        name: of the row.
        method: one of `petl.list_methods()` or of `petl.list_losses()`, or "xlora", which is only
            PEFT's.
        fields: of its config.
        bits: of a saved weight.
        tolerance: how far its step may be off its reference; above `reference.TOLERANCE` where the
            method itself magnifies rounding.
        goal: by shape, and "bf16" behind it for that section, the step time over the floor that
            performance.md asks for.
        kernels: the calls for each adapted linear layer that it asks for.
        theirs: LoRA layers compute as PEFT has them.
        recomputes: MLPs make again what they would keep.
    """

    name: str
    method: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    bits: int = 32
    tolerance: float = 1e-5
    goal: Mapping[str, float] = field(default_factory=dict)
    kernels: int | None = None
    theirs: bool = False
    recomputes: bool = False

    @property
    def is_own(self) -> bool:
        """Whether the method is petl's, so that its steps are checked before they are timed."""
        if self.method in (*petl.list_losses(), "lora"):
            return not self.theirs
        return self.method != "xlora" and petl.method(self.method).by == "petl"

    def fitting(self, layers: int) -> "Contender":
        """The row for a model of so few layers: MoS with the budget that its rank needs there."""
        if self.method != "mos":
            return self
        budget = max(2, -(-self.fields["r"] // layers))
        return replace(self, fields={**self.fields, "equivalent_rank": budget})

    def wrap(self, bench: Bench) -> PeftModel:
        """A model of the bench with this adapter, the same each time, none of its tensors zero."""
        torch.manual_seed(1)
        model = stirred(self.put(bench, bench.twin(shared=not self._rewrites_base())))
        if not self.theirs:
            petl.fuse_lora(model)  # as train.py does
        if self.recomputes:
            petl.recompute_mlp(model)
        return model.train()

    def put(self, bench: Bench, base: Any) -> PeftModel:
        """`base`, a model of the bench, with this adapter as a user gets it."""
        if self.method == "xlora":
            return _xlora(bench, base)
        fields: dict[str, Any] = {**self.fields, "task_type": bench.shape.task_type}
        if self.method in petl.list_losses():
            return petl.wrap(base, self.method, method_config=fields)
        needs_data = needs_calibration(build_config(self.method, **fields))
        calibration = [bench.batch] if needs_data else None
        return petl.wrap(base, self.method, calibration=calibration, **fields)

    @property
    def draws(self) -> bool:
        """Whether it differs from another row in what only training does."""
        return "dropout" in self.name or self.recomputes

    @property
    def merges(self) -> bool:
        """Whether the adapter can be merged into the base weights."""
        if self.method == "xlora":
            return False
        known = "lora" if self.method in petl.list_losses() else self.method
        return petl.method(known).given(self.fields).merges

    def _rewrites_base(self) -> bool:
        if self.method == "xlora" or self.method in petl.list_losses():
            return False
        return not petl.method(self.method).keeps_base(build_config(self.method, **self.fields))


@torch.no_grad()
def stirred(model: PeftModel) -> PeftModel:
    """`model` with noise in every tensor that trains."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter), alpha=NOISE)
    return model


def _xlora(bench: Bench, base: Any) -> PeftModel:
    """PEFT's X-LoRA over saved adapters: its nearest to a routed mixture."""
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


NORMS = ".*([lL]ayer_?[nN]orm|layernorm_before|layernorm_after|\\.norm|ln_\\d|ln_f)"  # as its YAML
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
        "mos",
        "mos",
        {"r": RANK, "equivalent_rank": 2, "shards_per_vector": 2, "private_rank": 0},
        goal={"llama": 1.08, "minilm": 1.11},
        kernels=10,
    ),
    Contender("adapter 48", "adapter", {"r": 48}),
    Contender(
        "compacter 48",
        "compacter",
        {"r": 48, "phm_dim": 4},
        goal={"llama": 1.02, "minilm": 1.03},
        kernels=20,
    ),
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
    Contender(
        "density on lora",
        "density",
        _lora(),
        tolerance=1e-3,  # the slope near 0 is 1 / eps times steeper than elsewhere
        goal={"llama": 1.10, "minilm": 1.14},
        kernels=13,
    ),
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
    """The rows, or those of the methods, or of the names, that are given; LoRA is always there.

    Raises:
        UnknownNameError: a word that is neither.
    """
    listed = {row.method for row in CONTENDERS}
    others = [name for name in petl.list_methods() if name not in listed]
    rows = [*CONTENDERS, *(Contender(name, name) for name in others)]
    known = {row.name for row in rows} | {row.method for row in rows}
    for word in words:
        if word not in known:
            raise UnknownNameError(
                f"no row or method {word!r} in the bench" + did_you_mean(word, known)
            )
    return [r for r in rows if not words or r.name in (LORA, *words) or r.method in words]
