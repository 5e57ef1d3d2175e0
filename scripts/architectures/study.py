"""What a method does on a small model: wrap, step, save, load, merge; and is anything silent."""

import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from omegaconf import OmegaConf
from peft import PeftModel, PeftType
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
)

import petl
from architectures.small import Type, logits_of, loss_of
from petl.core.compat import refused_names
from petl.core.masks import IGNORED
from petl.core.model.calls import uncalled
from petl.core.model.coverage import coverage_of
from petl.core.model.names import router_names
from petl.core.registry import keeps_base, needs_calibration
from petl.core.tuners.gradients import AbsentGradients, GradientCheck, kinds_of, watch_steps
from petl.efficiency.rewrite import apply_rewrites
from petl.errors import first_line
from petl.testing import stir
from petl.testing.case import difference

METHODS = Path(__file__).parents[2] / "configs" / "method"
WITH_LOSS = (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
)
STEPS = 2  # the zeros of B make the gradient of A zero in the first
ROUNDING = 1e-5  # of outputs, relative to the largest
CHANGED = 2e-5  # likewise, of a base whose weights a method takes apart and puts together again
REWRITES = {"fuse_lora": True, "loss_segment": "auto", "skip_unread": True}  # of `petl train`
REWRITTEN = (PeftType.LORA,)  # others differ in nothing that rewrites read
REWRITE_GAP = 1e-4  # of loss and gradients, relative to the largest
CODES = "binary"
REACHES = ("lora",)  # methods that are compared with the weights that merging changes
GAP = 0.02  # allowed between the two shares
PARAMETER = "parameters outside of linear layers and of experts in a known layout"
SEEN = 0.001  # a share of the block weights from which the page says what is not reached
MERGED = 1e-3  # allowed difference of a merged model, relative to the largest logit
# Fields that suit models of two layers and of width 64.
SMALLER: dict[str, dict[str, Any]] = {
    "adalora": {"total_step": 200},
    "dkvb": {"codebooks": 4, "pairs": 8, "key_dim": 4},
    "icv": {"train": True, "pairs": None, "scale": "plain", "keep_norm": False},
    "increlora": {"total_step": 200},
    "mos": {"r": 3, "equivalent_rank": 3},
    "polyhistor": {"tasks": ["only"], "r": 16, "rank": 8},
    "pyra": {"schedule": [2, 0]},
    "sparse": {"total_step": 200},
    "vblora": {"num_vectors": 16, "vector_length": 2},
    "vl_pet": {"r": 8},
}


@dataclass(frozen=True)
class Outcome:
    """What came of a method on a model.

    Attributes:
        verdict: "works"; "refused" by an error of petl before training; "broken": another error, or
            a difference that must not be.
        detail: the reason of a refusal or what is broken.
        coverage: share of block weights that the adapters reach; None if they adapt none.
        no_gradient: kinds of trained tensors without a gradient, which petl's log names.
        merges: True, or False if merging is refused.
        missed: why LoRA does not reach weights of the blocks, by kind of layer.
        changed: share of all block weights that merging LoRA changes.
        silent: what the log did not say, though it holds; "" if there is nothing.
    """

    verdict: str
    detail: str = ""
    coverage: float | None = None
    no_gradient: str = ""
    merges: bool = False
    missed: dict[str, str] = field(default_factory=dict)
    changed: float | None = None
    silent: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return the attributes that say something."""
        return {name: value for name, value in asdict(self).items() if value}


class BrokenError(Exception):
    """A method does something else than it promises."""


def fields_of(method: str) -> dict[str, Any]:
    """Return the fields of a method's YAML, which `petl train` uses, in small."""
    fields = OmegaConf.to_container(OmegaConf.load(METHODS / f"{method}.yaml"))
    assert isinstance(fields, dict)
    return {str(k): v for k, v in fields.items() if k != "name"} | SMALLER.get(method, {})


def study(each: Type, method: str) -> Outcome:
    """Wrap the small model of a type with a method, train, save, load and merge it."""
    found: dict[str, Any] = {}
    try:
        with quiet():
            _study(each, method, found)
    except (petl.InputError, NotImplementedError) as error:
        if not isinstance(error, petl.InputError):
            return Outcome("broken", f"{type(error).__name__}: {first_line(error)}", **found)
        where = "broken" if "trained" in found else "refused"
        found.pop("trained", None)
        return Outcome(where, first_line(error), **found)
    except BrokenError as error:
        found.pop("trained", None)
        return Outcome("broken", str(error), **found)
    except Exception as error:  # of any code: the table says it
        found.pop("trained", None)
        return Outcome("broken", f"{type(error).__name__}: {first_line(error)}", **found)
    found.pop("trained")
    return Outcome("works", **found)


def _study(each: Type, method: str, found: dict[str, Any]) -> None:
    base = each.build()
    inputs = each.inputs(base)
    before = _logits(base, inputs)
    with lines_of_petl() as said:
        model = wrapped(base, inputs, method)
    coverage = coverage_of(model)
    found["coverage"] = None if coverage is None else round(coverage.share, 3)
    found["trained"] = True
    absent, idle = train(model, inputs)
    found["no_gradient"] = absent
    idle = [name for name in idle if "expert" not in name]  # named once all had a chance
    if idle and not absent:
        found["silent"] = f"no gradient at {kinds_of(idle)}"
    if coverage is not None and method in REACHES:
        found["missed"] = {
            kind: why_missed(model, kind) for kind, share in coverage.missed.items() if share > SEEN
        }
        if str(coverage) not in " ".join(said):
            found["silent"] = "no line about what the adapters reach"
    stir(model)
    expected = _logits(model, inputs)
    if not expected.isfinite().all():
        raise BrokenError("the outputs are not finite")
    if torch.equal(expected, before):
        raise BrokenError("the adapters change no output")
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = petl.load(each.build(), folder, is_trainable=True).eval()
    gap = difference(_logits(loaded, inputs), expected)
    # rounding depends on where tensors lie, and a base that was changed and changed back is rounded
    keeps = keeps_base(model.active_peft_config)
    # a file of codes has the values that are computed with, and not those that are trained
    others = changed(model, loaded) if gap and keeps and method != CODES else []
    allowed = ROUNDING if keeps else CHANGED
    if others or gap > allowed * max(1.0, float(expected.abs().max())):
        where = f", and so do {kinds_of(others)}" if others else ""
        raise BrokenError(f"loaded again, the outputs differ by {gap:.1e}{where}")
    check_rewrites(loaded, inputs)
    found["merges"] = _merges(model, inputs, expected)
    if coverage is not None and method in REACHES and found["merges"]:
        # of merged weights, independent of what petl knows about its adapters
        share = changed_share(each.build(), model.get_base_model())
        told = coverage.share * (1 - sum(coverage.without.values()))
        found["changed"] = round(share, 3)
        if abs(share - told) > GAP:
            found["silent"] = f"merging changes {share:.3f} of the block weights, said: {told:.3f}"


def check_rewrites(model: PeftModel, inputs: Mapping[str, Tensor]) -> None:
    """Compare a step with one under the rewrites that `petl train` makes by default.

    Half of the tokens of a row, or more, have no label, so that there is something to leave out.

    Raises:
        BrokenError: loss or gradients differ.
    """
    if model.peft_type not in REWRITTEN or "input_ids" not in inputs or not has_loss(model):
        return
    labels = inputs.get("decoder_input_ids", inputs["input_ids"]).clone()
    for row, tokens in enumerate(labels):
        tokens[: max(1, len(tokens) * (row + 2) // (row + 3))] = IGNORED
    labelled = {**inputs, "labels": labels}
    without_dropout(model)
    computes = False
    with suppress(ValueError):  # of a loss that counts the tokens of images
        computes = model(**labelled).loss is not None
    if not computes:
        return
    loss, gradients = _step(model, labelled)
    apply_rewrites(model, REWRITES)
    other, others = _step(model, labelled)
    gap = abs(float(other - loss)) / max(1.0, abs(float(loss)))
    largest = max(float(tensor.abs().max()) for tensor in gradients.values())
    gaps = [difference(others[name], tensor) for name, tensor in gradients.items()]
    if max(gap, max(gaps) / largest) > REWRITE_GAP:
        raise BrokenError(
            f"rewritten, the loss differs by {gap:.1e} and gradients by {max(gaps) / largest:.1e}"
        )


def without_dropout(model: nn.Module) -> None:
    """Train without dropout, whose numbers are not drawn in one order."""
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and (name == "p" or "drop" in name):
                setattr(module, name, 0.0)


def has_loss(model: PeftModel) -> bool:
    """Return True if the base computes a loss of the labels of tokens, as language models do."""
    return any(type(model.get_base_model()) in mapping.values() for mapping in WITH_LOSS)


def _step(model: PeftModel, inputs: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    model.train()
    model.zero_grad()
    torch.manual_seed(3)
    loss = model(**inputs).loss
    loss.backward()
    named = model.named_parameters()
    return loss.detach(), {n: p.grad.clone() for n, p in named if p.grad is not None}


def changed(model: PeftModel, loaded: PeftModel) -> list[str]:
    """Return the names of the tensors that differ after loading."""
    state = model.state_dict()
    return [n for n, tensor in loaded.state_dict().items() if not torch.equal(tensor, state[n])]


def wrapped(base: PreTrainedModel, inputs: Mapping[str, Tensor], method: str) -> PeftModel:
    """Wrap a small model with the fields of a method's YAML."""
    torch.manual_seed(1)
    fields = fields_of(method)
    if not petl.method(method).own:
        fields.pop("modules_to_save", None)
    calibration = [inputs] if needs_calibration(petl.build_config(method, **fields)) else None
    return petl.wrap(base, method, calibration=calibration, **fields)


def changed_share(base: nn.Module, merged: nn.Module) -> float:
    """Return the share of the weights in lists of layers that merging changes.

    Counted are tensors of two dimensions or more, embeddings left out; of convolutions over several
    places, only those that change.
    """
    after, total, different = dict(merged.named_parameters()), 0, 0
    tables = {id(m.weight) for m in base.modules() if isinstance(m, nn.Embedding)}
    for name, before in base.named_parameters():
        if before.dim() < 2 or "bias" in name.rpartition(".")[2] or id(before) in tables:
            continue
        path = name.rpartition(".")[0]
        if not re.search(r"\.\d+\.", path):  # an entry of a list without a module is no block
            continue
        is_changed = name in after and not torch.equal(before, after[name])
        owner = base.get_submodule(path)
        if isinstance(owner, _ConvNd) and before[0, 0].numel() > 1 and not is_changed:
            continue
        total += before.numel()
        different += before.numel() * is_changed
    return different / max(total, 1)


def why_missed(model: PeftModel, kind: str) -> str:
    """Return why no LoRA is on the layers of a kind, which is a path with "*" for each index."""
    base = model.get_base_model()
    modules = dict(base.named_modules())
    ending = re.compile(r"(.*\.)?" + re.escape(kind).replace(r"\*", r"\d+"))
    path = next((name for name in modules if ending.fullmatch(name)), None)
    if path is None:
        return PARAMETER
    why = uncalled(base, [path]) | refused_names(model.active_peft_config, base, [path])
    if path in why:
        return why[path]
    if path in router_names(base):
        return "a router of experts"
    module = modules[path]
    if isinstance(module, _ConvNd):
        return "a convolution over one place"
    return PARAMETER if not isinstance(module, nn.Linear) else f"the class {type(module).__name__}"


@contextmanager
def lines_of_petl() -> Iterator[list[str]]:
    """Collect what petl logs."""
    said, logger, level = list[str](), logging.getLogger("petl"), logging.root.manager.disable
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    before = logger.level, logger.propagate
    logging.disable(logging.NOTSET)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]
        logging.disable(level)


def train(model: PeftModel, inputs: Mapping[str, Tensor]) -> tuple[str, list[str]]:
    """Take two steps as a training loop does.

    Returns:
        What petl says of tensors without a gradient, and their names by a count of our own.
    """
    hooks = petl.lifecycle(model)
    hooks.prepare([dict(inputs)])
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": parameters, "lr": 1e-3}]
    optimizer = hooks.make_optimizer(groups) or torch.optim.AdamW(groups)
    hooks.attach_optimizer(optimizer, 0, total_steps=STEPS)
    check, said = GradientCheck(), list[AbsentGradients]()

    def look(trained: Any, stepped: Any) -> bool:
        absent = check.after_step(trained, stepped)
        said.extend([] if absent is None else [absent])
        return check.is_over

    watch_steps(model, look)
    model.train()
    idle = {name for name, p in model.named_parameters() if p.requires_grad}
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        loss = loss_of(model, inputs)
        if not loss.isfinite():
            raise BrokenError(f"the loss of step {step} is {float(loss.detach())}")
        loss.backward()
        idle -= {name for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        hooks.after_step(step, optimizer)
    model.eval()
    return "; ".join(str(absent) for absent in said), sorted(idle)


def _merges(model: Any, inputs: Mapping[str, Tensor], expected: Tensor) -> bool:
    try:
        merged = model.merge_and_unload()
    except petl.InputError:
        return False
    except AttributeError:  # of PEFT, for methods without
        return False
    gap = difference(_logits(merged, inputs), expected)
    allowed = MERGED * max(1.0, float(expected.abs().max()))
    if not gap <= allowed:
        raise BrokenError(f"merged, the outputs differ by {gap:.1e}, above {allowed:.0e}")
    return True


@torch.no_grad()
def _logits(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    model.eval()
    torch.manual_seed(3)
    return logits_of(model(**inputs)).float()


@contextmanager
def quiet() -> Any:
    """Without warnings and logs of other packages."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(level)
