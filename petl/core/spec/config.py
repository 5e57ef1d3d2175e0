"""Fields that every method's config shares, and checks of their values."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, ClassVar

from peft import PeftConfig
from peft.utils import CONFIG_NAME, PeftType

from petl.core.compat import saved_type
from petl.core.spec import blocks
from petl.core.spec.checks import BLOCKS, check_rank, config_hints, rank_of
from petl.core.spec.facts import facts_of
from petl.core.types import Fields, Record
from petl.errors import InputError, shown
from petl.system.files.disk import as_json, write_atomic
from petl.system.files.paths import method_preset, recipes_of
from petl.system.files.read import read_json
from petl.system.values import (
    FREE,
    Rule,
    bounded,
    check_rules,
    field,
    is_finite,
    one_of,
    type_name,
    type_problem,
)

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# other values beside which a field acts, in words and as a test of the config
Acts = tuple[str, Callable[[Any], bool]]
NONE: Mapping[str, Acts] = {}


def config_field(
    text: str,
    default: object,
    *,
    choices: Iterable[object] = (),
    acts: Acts | None = None,
    **bounds: Any,
) -> Any:
    """A config field with its meaning, as `petl show` prints it, its default and its bounds.

    >>> r: int = config_field("rank of the update", 8, ge=1)
    >>> start: str = config_field("zero or normal", "zero", choices=("zero", "normal"))

    Args:
        choices: the allowed values; of a list, of its entries.
        acts: what else has to be set for it to act; None: nothing.
        bounds: of a number: `ge` at least, `gt` above, `le` at most, `lt` below; `pattern`: a
            regular expression of what a text may be instead.
    """
    options = tuple(choices)
    rule = one_of(*options) if options else bounded(**bounds) if bounds else FREE
    return field(default, rule, text, **({"acts": acts} if acts else {}))


def idle_fields(
    config: "DataclassInstance", method: str, others: Mapping[str, Acts] = NONE
) -> dict[str, str]:
    """Return the fields of a config that were set and do nothing, with what each acts beside.

    Args:
        method: its name; the values of its YAML file, and of recipes, do not count as set.
        others: by name, what fields without metadata act beside, those of PEFT.
    """
    found = {}
    for each in dataclasses.fields(config):
        acts = others.get(each.name) or each.metadata.get("acts")
        if acts and getattr(config, each.name) not in (None, each.default) and not acts[1](config):
            found[each.name] = acts[0]
    presets = [method_preset(method), *recipes_of(method)] if found else []
    return {
        k: words
        for k, words in found.items()
        if getattr(config, k) not in [preset.get(k) for preset in presets]
    }


def require_effect(
    config: "DataclassInstance", method: str, others: Mapping[str, Acts] = NONE
) -> None:
    """Raise InputError for a field that was set and does nothing beside the others."""
    for name, words in idle_fields(config, method, others).items():
        raise InputError(
            f"{name}={shown(getattr(config, name))} has no effect: it acts with {words} only; set "
            f"that too, or leave {name} out"
        )


@dataclass
class MethodConfig(PeftConfig):
    """Base of the configs of petl's methods: which modules to adapt. A method adds its own fields.

    Values are normalized so that the config survives JSON: lists of targets become sets, tuples
    become lists. Then the bounds of the fields are checked, and `check` is called.

    Raises:
        InputError: a value that the method cannot use.
    """

    method: ClassVar[str]  # set by `register`
    # True: it takes the place of the model's head, and trains no module completely
    replaces_head: ClassVar[bool] = False
    # True: calibration adds over processes, so that each gets its part of the rows
    divides_calibration: ClassVar[bool] = False

    target_modules: set[str] | list[str] | str | None = config_field(
        "names, suffixes, a regular expression, or a preset such as all-linear; null: all-linear",
        "all-linear",
    )
    exclude_modules: set[str] | list[str] | str | None = config_field(
        "names, suffixes or a regular expression to leave out", None
    )
    modules_to_save: list[str] | None = config_field(
        "modules trained in full and saved, such as a head", None
    )
    layers_to_transform: list[int] | int | str | None = config_field(blocks.MEANING, None)
    layers_pattern: list[str] | str | None = config_field(
        "name of the module list that layers_to_transform counts", None
    )
    target_parameters: list[str] | None = config_field(
        "stacked parameters of experts, added to target_modules; refused if the method adapts none",
        None,
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = config_field(
        "tokens whose rows of the embedding train; by module: those of each", None
    )

    def __post_init__(self) -> None:
        is_saved = self.peft_type is not None  # only a file names the type
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, list | tuple):
                setattr(self, name, set(value))
        for name in ("modules_to_save", "layers_to_transform", "layers_pattern"):
            value = getattr(self, name)
            if isinstance(value, tuple | set | range):
                setattr(self, name, list(value))
        if self.layers_pattern and self.layers_to_transform is None:
            raise InputError(
                f"layers_pattern={self.layers_pattern} names the list whose blocks "
                "layers_to_transform counts, which is null; set it too"
            )
        check_values(type(self), {f.name: getattr(self, f.name) for f in dataclasses.fields(self)})
        self._take_parameters()
        super().__post_init__()
        # PEFT's `__post_init__` does not set it
        self.peft_type = PeftType[f"PETL_{self.method.upper()}"]
        check_rules(self)
        self.check()
        if not is_saved:
            require_effect(self, self.method)

    def _take_parameters(self) -> None:
        """Add `target_parameters` to the targets, where stacks are named as modules are."""
        names, targets = self.target_parameters, self.target_modules
        if not names:
            return
        if isinstance(targets, str):
            raise InputError(
                f"target_parameters={names} stands beside a list of target_modules, and "
                f"target_modules={targets!r} is one word; list all names in target_modules"
            )
        self.target_modules, self.target_parameters = {*(targets or ()), *names}, None

    def check(self) -> None:
        """Raise InputError for values that are wrong together; bounds are checked before."""

    def check_shapes(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Raise InputError, or warn, for values that do not fit both widths of each target."""
        check_rank(self, "r", shapes)

    def rank_and_scaling(self, key: str, shape: tuple[int, int]) -> tuple[int, float]:
        """Return the rank of the module at path `key`, and the factor of its update.

        The rank is that of the first pattern in `rank_pattern` that matches the path, as PEFT
        matches patterns, else `r`. The factor is lora_alpha / r, or lora_alpha / sqrt(r) with
        `use_rslora`, with the `r` of the config: it is equal for all ranks. Without lora_alpha: 1.

        Args:
            key: path of the module in the base model.
            shape: both widths of the module, for methods whose rank depends on them.
        """
        config: Any = self
        facts, r = facts_of(config), config.r
        alpha, root = facts.lora_alpha, math.sqrt(r) if facts.use_rslora else r
        return rank_of(config, key, r), 1.0 if alpha is None else alpha / root

    def sized(self, size: int) -> Fields:
        """Return the fields that give the method this size, from 1; `train.budget` chooses it.

        Modules that `rank_pattern` matches keep the rank that it gives them.
        """
        return in_proportion(self, size)

    def bounded(self, budget: int) -> Fields:
        """Return the fields that limit growth in training to `budget` parameters."""
        return {}

    def save_pretrained(self, save_directory: str, **kwargs: object) -> None:
        """Write adapter_config.json as PEFT does, with what its type needs in words."""
        super().save_pretrained(save_directory, **kwargs)
        file = Path(save_directory) / CONFIG_NAME
        content = read_json(file, dict[str, Any])
        write_atomic(
            file, as_json({**content, "peft_type": saved_type(f"PETL_{self.method.upper()}")})
        )

    def to_dict(self) -> Record:
        """Return the fields as JSON types; sets sorted, so that equal configs give equal files."""
        fields = dataclasses.asdict(self)
        return {k: sorted(v) if isinstance(v, set) else v for k, v in fields.items()}


def in_proportion(config: PeftConfig, r: int) -> Fields:
    """Return this `r`, and the `lora_alpha` with which the scaling lora_alpha / r is unchanged.

    The field of PEFT's LoHa and LoKr is `alpha`.
    """
    facts = facts_of(config)
    name, alpha = "lora_alpha", facts.lora_alpha
    if alpha is None:
        name, alpha = "alpha", facts.alpha
    if alpha is None or facts.r is None:
        return {"r": r}
    # an integer where possible, as PEFT annotates it
    scaled = alpha * r / facts.r
    return {"r": r, name: int(scaled) if scaled == int(scaled) else scaled}


def blocks_field(null: str = "the list of blocks with attention") -> Any:
    """The field of a method that needs one list of blocks; `structure.blocks` reads it."""
    return config_field(f"path of the list of blocks, such as model.layers; null: {null}", None)


def require(condition: bool, message: str) -> None:
    """Raise InputError with `message` unless `condition` holds, for checks across fields.

    The bounds of a single field belong into its `config_field`.
    """
    if not condition:
        raise InputError(message)


DROPOUT = bounded(ge=0, lt=1)
ALPHA = bounded(gt=0, reason="it scales the update")
RANK = bounded(ge=1)
RANK_OR_NONE = bounded(ge=0)  # PEFT's OFT has r=0 and takes a block size instead


def usual_rule(name: str, default: object) -> Rule:
    """Return the rule of a field of this name in any method, of PEFT's too, if there is one."""
    if name == "r":
        return RANK if default else RANK_OR_NONE
    return DROPOUT if name.endswith("dropout") else ALPHA if name.endswith("alpha") else FREE


def check_values(config_cls: "type[DataclassInstance]", fields: Mapping[str, object]) -> None:
    """Check the types of values, and ranks, dropouts and alphas, which PEFT itself does not.

    Raises:
        InputError: a value is of the wrong type, not finite or out of bounds; the message has the
            field, its value and what is allowed.
    """
    known = {field.name: field for field in dataclasses.fields(config_cls)}
    hints = config_hints(config_cls)
    for name, value in fields.items():
        if name == "r" and isinstance(value, float | int) and not isinstance(value, bool):
            usual_rule(name, known[name].default).check(name, value, int)
        hint = hints[name]
        if not is_finite(value):
            raise InputError(f"{name}={shown(value)} is not a finite number")
        # a field of type None is not supported, for which its config gives the reason
        if hint is not NoneType and type_problem(value, hint):
            raise InputError(f"{name}={shown(value)} is not of type {type_name(hint)}")
        if value is None:
            continue
        if name == BLOCKS and isinstance(value, str):
            blocks.parse(value)
        rule = usual_rule(name, known[name].default)
        if name != "r" and rule is not FREE:
            rule.check(name, value, float)
        _check_pattern(name, value)


def _check_pattern(name: str, value: Any) -> None:
    """Check ranks or alphas by module name. AdaLoRA's ranks are masks, lists of bools."""
    if name not in ("rank_pattern", "alpha_pattern") or not value:
        return
    for key, number in value.items():
        is_mask = isinstance(number, list) and all(isinstance(kept, bool) for kept in number)
        if not is_mask:
            rule, hint = (RANK, int) if name == "rank_pattern" else (ALPHA, float)
            rule.check(f"{name}[{key!r}]", number, hint)
