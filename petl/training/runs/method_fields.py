"""The fields of a run's method: its settings, and what only the run determines."""

from omegaconf import DictConfig

from petl.core.registry import build_config, method
from petl.core.types import Fields, Settings
from petl.errors import InputError
from petl.system.settings.command_line import preset_of
from petl.system.settings.schema import plain


def method_fields(cfg: DictConfig | Settings, task_type: str | None, total_steps: int) -> Fields:
    """Return the method's name and fields: the settings, and what only the run determines.

    Raises:
        InputError: a field that the method does not have, or a value that it does not allow.
    """
    fields: Fields = {"task_type": task_type, **with_inner(plain(cfg))}
    if "total_step" in fields and fields["total_step"] is None:
        fields["total_step"] = total_steps  # for methods with a schedule, such as AdaLoRA
        check_schedule(fields)
    build_config(**fields)
    return fields


def check_schedule(fields: Fields) -> None:
    """Check that a pruning schedule such as AdaLoRA's leaves steps to prune in.

    Raises:
        InputError: `tinit` and `tfinal` take all steps of the run.
    """
    first, last, total = (fields.get(name) for name in ("tinit", "tfinal", "total_step"))
    # others are absent, or refused when the config is built
    if not (isinstance(first, int) and isinstance(last, int) and isinstance(total, int)):
        return
    if first + last < total:
        return
    raise InputError(
        f"method.tinit={first} steps before pruning and method.tfinal={last} after it leave none "
        f"of the run's {total}: lower them, or train longer (train.steps, train.epochs)"
    )


def with_inner(settings: Settings) -> Fields:
    """Return the settings of a method, completed by those of the method that it wraps, if any.

    A field of the inner method that is not set has the default of the outer method, or else that of
    the inner method's YAML file, as if the inner method were trained alone.

    Raises:
        InputError: an unknown method or inner method.
    """
    entry = method(settings["name"]).variant(settings)
    if not entry.inner:
        return {**entry.inner_defaults, **settings}
    return {**preset_of(entry.inner), **entry.inner_defaults, **settings}
