"""The adapter that a run starts from (`train.init_from`): where it is, its method and fields.

Its tensors and its task head are those of `petl.training.wrapping`.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftConfig

from petl.core.adapter_folder import CONFIG as ADAPTER_CONFIG
from petl.core.adapter_folder import read_config
from petl.core.compat import SEQ_CLS_HEAD_NAMES
from petl.core.registry import method_of
from petl.core.spec.method import modifies_base_weights
from petl.errors import InputError
from petl.system.files import hub
from petl.system.files.disk import check_links
from petl.system.files.paths import method_preset
from petl.training.runs.records import ADAPTER, CONFIG, read_stored
from petl.training.runs.settings import with_inner

# fields that are no settings of a method, or that a run sets itself
NOT_CHOSEN = {field.name for field in dataclasses.fields(PeftConfig)} | {
    "runtime_config",
}
# fields of the schedule of a training, which a new one may choose, as well as dropout
SCHEDULE = ("total_step", "tinit", "tfinal", "deltaT")
HEADS = (*SEQ_CLS_HEAD_NAMES, "qa_outputs")  # modules that PEFT trains by the type of the task


@dataclasses.dataclass(frozen=True)
class Start:
    """A saved adapter.

    Attributes:
        given: the value of `train.init_from`.
        place: the adapter's folder, or its name on the hub.
        run: the folder of its run; None without one.
        where: arguments of `petl.core.adapter_folder.ON_THE_HUB`.
    """

    given: str
    place: str
    run: Path | None
    where: Mapping[str, Any]

    def config(self) -> PeftConfig:
        """Read the adapter's config.

        Raises:
            InputError: there is no adapter, its method is unknown, or its tensors belong to base
                weights that its initialization changed.
        """
        config: Any = read_config(self.place, **self.where)
        if modifies_base_weights(config):
            raise InputError(
                f"train.init_from={self.given}: init_lora_weights={config.init_lora_weights!r} "
                "changed the base weights, and this file is relative to them; name the finished "
                f"run, whose {ADAPTER}/ fits the original base model"
            )
        return config


def find_start(given: str) -> Start:
    """Find the adapter of `train.init_from`: in the folder of a run, in its own, or on the hub.

    Raises:
        InputError: there is none, or a link in the folder leads out of it.
    """
    folder = Path(given)
    if not folder.is_dir():
        return Start(given, given, None, hub.arguments_of(given, ADAPTER_CONFIG, {}))
    inside = folder / ADAPTER
    adapter = inside if inside.is_dir() else folder
    if not (adapter / ADAPTER_CONFIG).is_file():
        is_run = (folder / CONFIG).is_file()
        raise InputError(
            f"train.init_from={given} "
            + (
                "is a run that has saved no adapter yet: finish it with train.resume, or name the "
                "folder adapter/ of one of its checkpoints"
                if is_run
                else "contains no adapter: name the folder of a run, or of an adapter"
            )
        )
    check_links(adapter)
    run = adapter.absolute().parent  # also of a path to RUN/adapter
    return Start(given, str(adapter), run if (run / CONFIG).is_file() else None, {})


def method_settings(start: Start, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the settings under `method` of a run that starts from an adapter.

    Args:
        given: those that +method and further words give, which must not contradict the adapter; a
            value as in the method's file of configs/method is no choice of the user.

    Raises:
        InputError: they contradict it, no method has such an adapter, or it has a field that no
            setting can hold.
    """
    config = start.config()
    entry = method_of(config)
    if entry is None:
        raise InputError(
            f"train.init_from={start.given} is an adapter of type {config.peft_type}, with which "
            "petl does not train"
        )
    saved = {"name": entry.name, **_fields(config, start.given)}
    chosen = dict(given or {"name": entry.name})
    if chosen.get("name") != entry.name:
        raise InputError(
            f"train.init_from={start.given} is an adapter of method {entry.name}, and method "
            f"{chosen.get('name')} is given: leave out +method, or train.init_from"
        )
    preset = {**with_inner(saved), **method_preset(entry.name)}
    changed = {k: v for k, v in chosen.items() if v is not None and v != preset.get(k)}
    for name, value in changed.items():
        is_free = name in SCHEDULE or name.endswith("dropout")
        # a field that is not known is refused as always
        if name not in saved or is_free or _plain(value) == saved[name]:
            continue
        raise InputError(
            f"train.init_from={start.given} has {name}={saved[name]!r}, and method.{name}="
            f"{value!r} is given: an adapter keeps its fields; leave that out"
        )
    return {**{k: v for k, v in saved.items() if k in preset or v is not None}, **changed}


def _fields(config: PeftConfig, given: str) -> dict[str, Any]:
    """Return the fields of a saved config that are settings of its method, as plain values."""
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        if not field.init or field.name in NOT_CHOSEN:
            continue
        value = _plain(getattr(config, field.name))
        if field.name == "modules_to_save":  # heads depend on the task of the new run
            value = [name for name in value or () if name not in HEADS] or None
        if dataclasses.is_dataclass(value):
            raise InputError(
                f"train.init_from={given} has {field.name}, which cannot be set for a new run"
            )
        # an initialization from data or weights: the tensors come from the file
        is_start = field.name == "init_lora_weights" and isinstance(value, str)
        fields[field.name] = True if is_start else value
    if "total_step" in fields:
        fields["total_step"] = None  # that of the new run
    return fields


def _plain(value: Any) -> Any:
    """Return a value as YAML has it."""
    return sorted(value) if isinstance(value, set | tuple) else value


def check_model(start: Start, model: Mapping[str, Any], *, other_base: bool) -> None:
    """Raise InputError if the adapter's run had another model, unless `other_base` allows it."""
    if start.run is None or other_base:
        return
    then = read_stored(start.run / CONFIG)["model"]["name"]
    if then != model["name"]:
        raise InputError(
            f"train.init_from={start.given} was trained on model {then}, and this run has model "
            f"{model['name']}: choose model={then}, or insist with train.other_base=true"
        )
