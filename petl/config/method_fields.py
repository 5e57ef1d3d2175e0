"""From the settings of a method, as a YAML has them, to the fields of its config."""

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig

from petl.config.compose import preset_of
from petl.config.schema import plain
from petl.core.registry import build_config, method
from petl.errors import InputError


def method_fields(
    cfg: DictConfig | Mapping[str, Any], task_type: str | None, total_steps: int
) -> dict[str, Any]:
    """The method's name and fields: those of the YAML, and what only the run knows.

    Raises:
        InputError: a field that the method does not have, or a value that it cannot use.
    """
    fields: dict[str, Any] = {"task_type": task_type, **with_inner(plain(cfg))}
    if "total_step" in fields and fields["total_step"] is None:
        fields["total_step"] = total_steps  # of methods that change on a schedule
        check_schedule(fields)
    build_config(**fields)
    return fields


def check_schedule(fields: Mapping[str, Any]) -> None:
    """Refuse a schedule of AdaLoRA's kind that leaves no step of the run to prune in.

    Raises:
        InputError: it does.
    """
    first, last, total = (fields.get(name) for name in ("tinit", "tfinal", "total_step"))
    if first is None or last is None or first + last < total:
        return
    raise InputError(
        f"method.tinit={first} steps before pruning and method.tfinal={last} after it leave none "
        f"of the run's {total}: lower them, or give it more (train.steps, train.epochs)"
    )


def with_inner(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` of a method; of one over another, also those of the inner method.

    An inner field that is not set has the value that the outer method gives it, or else that of the
    inner method's YAML, as if the inner method were trained alone.

    Raises:
        InputError: there is no such method or inner method.
    """
    entry = method(settings["name"]).given(settings)
    inner = {**preset_of(entry.inner), **entry.inner_defaults}
    return {**inner, **settings}
