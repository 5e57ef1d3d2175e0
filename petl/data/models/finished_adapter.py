"""A finished adapter in the base model (`model.adapter`): merged, so that it is frozen.

What is trained on top then has a plain model below it, whatever its method. The adapter's own task
head comes with it if it is for the same labels.
"""

import logging
from collections.abc import Collection
from pathlib import Path

from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from transformers import PreTrainedModel

from petl.core.adapter_file import PREFIX, trained_modules
from petl.core.adapter_folder import CONFIG, Folder, read_weights
from petl.core.auto_classes import read_labels
from petl.core.fingerprint import check_base, known_fingerprint
from petl.core.loading import check_file, load
from petl.core.parameters import refuse_shared_targets
from petl.core.registry import require_capability
from petl.core.support import Capability
from petl.data.tasks.base import Task
from petl.errors import InputError
from petl.system.files.disk import check_links
from petl.system.files.paths import path_of

logger = logging.getLogger(__name__)
INSIDE = "adapter"  # the folder of the adapter in that of a run


def folder_of(given: str) -> Path:
    """Return the folder of the adapter that `model.adapter` names: a run, or the folder itself.

    Raises:
        InputError: there is no finished adapter, or a link in the folder leads out of it.
    """
    folder = path_of("model.adapter", given)
    found = folder / INSIDE if (folder / INSIDE).is_dir() else folder
    if not (found / CONFIG).is_file():
        raise InputError(
            f"model.adapter={given} contains no adapter: name the folder of a finished run, or of "
            "an adapter"
        )
    check_links(found)
    return found


def checked_config(given: str) -> PeftConfig:
    """Return the config of the adapter that `model.adapter` names.

    Raises:
        InputError: there is none.
        UnsupportedError: it cannot be merged.
    """
    config = Folder(folder_of(given)).config
    require_capability(config, Capability.MERGE, f"model.adapter={given} (merged into the base)")
    return config


def with_adapter(
    model: PreTrainedModel, given: str, task: Task, heads: Collection[str]
) -> PreTrainedModel:
    """Return the model with the adapter that `model.adapter` names merged into it.

    Args:
        model: from `load_base`, with the weights that the adapter was trained on; changed in place.
        given: the value of the setting.
        task: of the run, whose labels decide on the adapter's head.
        heads: modules of which the adapter's copies are left out if labels differ.

    Raises:
        InputError: the adapter is missing, damaged, or of another base model.
        UnsupportedError: it cannot be merged, or is on a weight that other modules share.
    """
    folder, config = folder_of(given), checked_config(given)
    extras = {name: value for name, value in vars(model).items() if name.startswith("petl_")}
    labels = read_labels(folder).get("id2label")
    own = task.model_kwargs().get("id2label")
    if labels == own:
        wrapped = load(model, folder)
        logger.info("model.adapter=%s: merged, with its task head", given)
    else:
        wrapped = without_head(model, folder, config, given, heads)
        logger.info(
            "model.adapter=%s: merged without its task head, whose labels are others", given
        )
    refuse_shared_targets(wrapped.get_base_model())
    merged = wrapped.merge_and_unload()
    vars(merged).update(extras)  # such as the modules without pretrained weights
    return merged


def without_head(
    model: PreTrainedModel, folder: Path, config: PeftConfig, given: str, heads: Collection[str]
) -> PeftModel:
    """Return the model with the adapter in a folder, but with its own task head."""
    config.inference_mode = True
    saved = Folder(folder)
    file = saved.weights
    places = tuple(f"{PREFIX}{name}." for name in heads)
    found = check_file(model, config, file, left_out=places)
    check_base(
        saved.base,
        known_fingerprint(model),
        found,
        other_base=False,
        action=f"model.adapter={given}",
        insist="a run with the same labels",
    )
    tensors = {k: v for k, v in read_weights(file).items() if not k.startswith(places)}
    wrapped = get_peft_model(model, config)
    assert isinstance(wrapped, PeftModel)
    # PEFT asks for all of `modules_to_save`: the copies of the model's own
    tensors |= {k: v for k, v in trained_modules(wrapped).items() if k.startswith(places)}
    set_peft_model_state_dict(wrapped, tensors)
    return wrapped
