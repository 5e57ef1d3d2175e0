"""Load a saved adapter strictly: raise on missing or unexpected tensors."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from torch import nn

from petl.core.adapter_file import type_of
from petl.core.adapter_folder import CONFIG, ON_THE_HUB, Folder, read_weights
from petl.core.adapter_widths import record
from petl.core.compat import tuner_of, without_noise
from petl.core.experts.earlier import in_todays_layout
from petl.core.fingerprint import (
    FILE,
    check_base,
    check_meaning,
    known_fingerprint,
    remember_base,
)
from petl.core.model.targets import check_tokens
from petl.core.parameters import check_module, refuse_adapted
from petl.core.registry import equip, refusal, refuse_other_kinds, refuse_quantized
from petl.core.skeleton import SkeletonShapes, check_tables, expected_tensors
from petl.core.spec.checks import check_adapter_name
from petl.core.spec.facts import modifies_base_weights
from petl.core.support import Capability
from petl.core.tuners.switching import apply_peft_fixes, only_visible
from petl.core.types import Arguments
from petl.errors import InputError, first_line
from petl.system.files import hub
from petl.system.files.tensor_file import Shapes, check_shapes, read_shapes
from petl.system.patterns import check_patterns


def load(
    base: nn.Module,
    path: str | Path,
    *,
    adapter_name: str = "default",
    is_trainable: bool = False,
    other_base: bool = False,
    **kwargs: Any,
) -> PeftModel:
    """Load the adapter saved in `path` onto `base`, as `PeftModel.from_pretrained` but strict.

    Given a `PeftModel`, it adds the adapter to those present, as `PeftModel.load_adapter` does; the
    active adapter stays active. For petl's own methods, and for LoRA after `petl.fuse_lora`, the
    time does not grow with the number of adapters.

    Args:
        base: the model that the adapter was trained on; changed in place.
        path: folder of the adapter, or the name of a hub repository.
        adapter_name: its name in the model, independent of its name when saved.
        is_trainable: leave its parameters trainable.
        other_base: load it even if the weights of `base` differ from those that it was trained on,
            with a warning; told by the fingerprint that petl saves with adapters.
        kwargs: further arguments of `PeftModel.from_pretrained`, or of `load_adapter`. With
            `low_cpu_mem_usage=True`, tensors of a base on the CPU stay memory-mapped from the file
            until they are written: no memory of the process's own, and the file must not be
            overwritten in place meanwhile.

    Raises:
        InputError: there is no adapter, its method is unknown, the base contains adapters but is
            no PeftModel, the PeftModel has an adapter of that name or of another method, its
            adapters or the new one change the base weights (PiSSA that was not converted), tensors
            are missing, unexpected or of another shape, a file could contain code, or `other_base`
            refuses the base. A PeftModel is unchanged then.
    """
    # all checks come before PEFT's load, which changes the base in place and cannot be undone
    check_module(base, "petl.load")
    is_peft_model = isinstance(base, PeftModel)
    if not is_peft_model:
        refuse_adapted(base)
    # once for all files: each of PEFT's own look-ups of a missing file would wait for the Hub
    saved, kwargs = _located(path, kwargs)
    config = saved.config
    if is_peft_model:
        _check_addable(base, config, adapter_name)
    else:
        check_adapter_name(adapter_name, base, tuner_of(config.peft_type))
    refuse_quantized(base, config)
    # before wrapping: of a wrapped model only a remembered fingerprint is known
    present, trained_on = known_fingerprint(base), saved.base
    insist = "--other-base (petl.load: other_base=True)"
    check_patterns(config, (name for name, _ in base.named_modules()))  # which it matches
    check_meaning(saved.file(FILE), config, path)
    nested = record.read(saved.file(record.FILE))
    plain_base = base.get_base_model() if isinstance(base, PeftModel) else base
    check_tokens(config, plain_base)
    fits = partial(check_header, base, config)
    with saved.plain(fits) as plain, in_todays_layout(plain, plain_base, config) as source:
        found = check_file(base, config, source.weights)
        refuse_other_kinds(plain_base, config)
        action = f"loading {path}"
        check_base(trained_on, present, found, other_base=other_base, action=action, insist=insist)
        # last: of a file that lacks tensors, the messages above say more
        saved.check_sealed()
        # one that trains here is saved with the fingerprint of this base, others keep theirs
        others = {} if is_trainable else {adapter_name: trained_on}
        try:
            if is_peft_model:
                model = _add(base, source, adapter_name, is_trainable, kwargs)
                remember_base(model, present, others)
                record.remember(model, adapter_name, nested)
                return model
            with without_noise():
                model = PeftModel.from_pretrained(
                    base,
                    str(source.path),
                    adapter_name,
                    is_trainable,
                    config=config,
                    **source.where,
                    **kwargs,
                )
        # what PEFT and torch raise for a config that does not suit the modules
        except (RuntimeError, KeyError, TypeError, NotImplementedError) as error:
            # an InputError may also be one of these types, and has its own message
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"the adapter in {str(path)!r} does not fit the model: {first_line(error)}"
            ) from error
    equip(model, model.peft_config[adapter_name])
    remember_base(model, present, others)
    record.remember(model, adapter_name, nested)
    return model


def _located(path: object, kwargs: Mapping[str, object]) -> tuple[Folder, Arguments]:
    """Return the adapter, whose files are found or missed without a delay, and other `kwargs`."""
    if not isinstance(path, str | Path):
        raise InputError(
            "petl.load needs the folder of an adapter, or the name of a repository on the Hub, and "
            f"got {type(path).__name__}"
        )
    others = hub.arguments_of(str(path), CONFIG, kwargs)
    where = {key: others.pop(key) for key in ON_THE_HUB if key in others}
    return Folder(path, **where), others


def _check_addable(model: PeftModel, config: PeftConfig, adapter_name: str) -> None:
    if adapter_name in model.peft_config:
        raise InputError(
            f"the model has an adapter {adapter_name!r} already; choose another adapter_name"
        )
    if config.peft_type != model.peft_type:
        raise InputError(
            f"an adapter of type {type_of(config)} cannot be added to a model with adapters of "
            f"type {type_of(model)}; load it onto another copy of the model"
        )
    # whose base weights are not those that the other adapters were trained on
    given = {**model.peft_config, adapter_name: config}
    changing = next((name for name, each in given.items() if modifies_base_weights(each)), None)
    if changing is not None:
        start = getattr(given[changing], "init_lora_weights", None)
        raise InputError(
            f"the adapter {changing!r} has init_lora_weights={start!r}, which changes the base "
            "weights, so that no other adapter fits beside it: load each onto a copy of the model "
            "of its own, or save it with path_initial_model_for_weight_conversion"
        )


def _add(
    model: PeftModel,
    source: Folder,
    adapter_name: str,
    is_trainable: bool,
    kwargs: Mapping[str, Any],
) -> PeftModel:
    """Add an adapter to `model`; if that fails, remove it again and raise."""
    was_training = model.training
    try:
        # PEFT's load walks over all adapters: hidden ones keep the time of a load constant
        with only_visible(model, {adapter_name}), without_noise():
            where = {**source.where, **kwargs}
            model.load_adapter(str(source.path), adapter_name, is_trainable=is_trainable, **where)
    except Exception:
        if adapter_name in model.peft_config:
            model.delete_adapter(adapter_name)
        model.train(was_training)  # `load_adapter` sets evaluation mode
        raise
    apply_peft_fixes(model, refusal(model.peft_config[adapter_name], Capability.MIXED_BATCH))
    return model


def check_file(
    model: nn.Module, config: PeftConfig, file: Path, left_out: tuple[str, ...] = ()
) -> Shapes:
    """Check an adapter file before it is loaded onto a model; the model is not changed.

    The header is compared with what model and config require before any tensor is read.

    Args:
        left_out: prefixes of names of tensors that are not compared.

    Returns:
        Dtype and shape of its tensors, by name.

    Raises:
        InputError: the file is damaged, or does not fit; the config has a pattern that is invalid
            or takes too long to match.
    """
    found = read_shapes(file)
    expected = check_header(model, config, found, str(file), left_out)
    # index tensors: their values, not only their shapes, must fit, so they are read
    check_tables(expected, config, read_weights(file))
    return found


def check_header(
    model: nn.Module,
    config: PeftConfig,
    found: Shapes,
    what: str,
    left_out: tuple[str, ...] = (),
) -> SkeletonShapes:
    """Compare names and shapes of an adapter file with what model and config require.

    Args:
        found: dtype and shape of the tensors in the file, by name.
        what: the file, for the message.
        left_out: as of `check_file`.

    Returns:
        What they require.

    Raises:
        InputError: as of `check_file`.
    """
    # before `expected_tensors`, which matches them against every module name
    check_patterns(config, (name for name, _ in model.named_modules()))
    expected = expected_tensors(model, config)
    compared, required = without(found, left_out), without(expected.required, left_out)
    check_shapes(compared, required, expected.optional, expected.free_dims, what)
    return expected


def without(shapes: Shapes, prefixes: tuple[str, ...]) -> Shapes:
    """Return those tensors whose names do not begin with any of the prefixes."""
    return {name: entry for name, entry in shapes.items() if not name.startswith(prefixes)}
