"""What `petl shrink` makes smaller, a run or a model, and the run that recovers it."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from petl.adapters.export.conversion import merged_model
from petl.adapters.export.saved_adapter import SavedAdapter, find, model_in, without_run
from petl.core.registry import build_config
from petl.core.types import Groups
from petl.data.models.loading import load_base, load_processor
from petl.errors import InputError, UnsupportedError
from petl.system.files.disk import sha256
from petl.system.settings.command_line import preset_of
from petl.system.settings.schema import plain
from petl.training.compose import compose
from petl.training.ranks import allocate, with_ranks
from petl.training.runs.lookup import MODEL_CONFIG
from petl.training.runs.run_config import read_config

# settings of a run that are not those of its recovery
OWN = {"lr": None, "budget": None, "find_lr": False, "init_from": None, "init_head": None}
QUIET = {"linear_probe": False, "score_before": False, "together": 1, "resume": "auto"}


@dataclass(frozen=True)
class ShrinkSource:
    """The model to shrink, with rows and settings.

    Attributes:
        saved: the rows, processor and settings; of a model, those of a run on it.
        is_run: its adapter is merged into the model.
    """

    saved: SavedAdapter
    is_run: bool

    @classmethod
    def at(
        cls, path: str, data: Path | None, overrides: list[str], **trust: bool
    ) -> "ShrinkSource":
        """Return the run, or the model, in a folder.

        Args:
            data: the file of rows of a model.
            overrides: settings of `petl train` for a model.
            trust: arguments of `find`.

        Raises:
            InputError: data are missing, or given for a run; a setting is wrong.
            UnsupportedError: the base model of the run is quantized.
        """
        if (Path(path) / MODEL_CONFIG).is_file():  # a run and an adapter have none
            return cls(_of_model(Path(path), data, overrides), is_run=False)
        saved = find(path, **trust)
        if data is not None or overrides:
            raise InputError(
                f"{path} is a run, which has its rows and settings; leave out "
                f"{'--data' if data else overrides[0]}, which is for a model"
            )
        if saved.run is None:
            raise without_run(saved.adapter)
        if saved.is_quantized:
            raise UnsupportedError(
                f"{path} was trained on a quantized base: merge it first (petl merge {path} "
                "FOLDER), and shrink that folder with --data"
            )
        return cls(saved.in_dtype("float32"), is_run=True)  # bfloat16 would round the update

    @cached_property
    def name(self) -> str:
        """The name of the folder."""
        return (self.saved.run or self.saved.adapter).absolute().name

    @cached_property
    def processor(self) -> Any:
        """The tokenizer, image processor or feature extractor."""
        if self.is_run:
            return self.saved.processor
        return load_processor(self.saved.settings["model"], self.saved.data.task)

    def digest(self) -> str:
        """Return a digest of the weights and JSON files of the adapter, or of the model."""
        kinds = (".safetensors", ".bin", ".json")
        files = [file for file in sorted(self.saved.adapter.iterdir()) if file.suffix in kinds]
        content = "".join(f"{file.name} {sha256(file)}\n" for file in files)
        return hashlib.sha256(content.encode()).hexdigest()

    def unread(self) -> PreTrainedModel:
        """Return the model without its weights, on the meta device."""
        saved = self.saved
        return load_base(
            saved.settings["model"], saved.data.task, meta=True, processor=self.processor
        )

    def dense(self) -> PreTrainedModel:
        """Load the model, the adapter of a run merged into it; on the CPU.

        Raises:
            InputError: the adapter cannot be merged.
        """
        saved = self.saved
        if self.is_run:
            return merged_model(saved)[0]
        return load_base(saved.settings["model"], saved.data.task, processor=self.processor)

    def model_at(self, folder: Path) -> Groups:
        """Settings of `model` that load a shrunk one from a folder."""
        return {**self.saved.model_at(folder), "name": f"{self.name}-small", "adapter": None}

    def recovery(
        self,
        small: PreTrainedModel,
        base: Path,
        importance: Mapping[str, float],
        rank: int,
        steps: int | None,
    ) -> Groups:
        """Return the settings of the run that recovers a shrunk model: LoRA, ranks by importance.

        Args:
            small: the shrunk model, for its blocks.
            base: its folder.
            importance: of the blocks of the dense model.
            rank: the mean.
            steps: of the optimizer; None: as many as the settings say.
        """
        # what +method=lora sets
        fields = preset_of("lora")
        scaled = fields["lora_alpha"] * rank / fields["r"]  # the same scaling at any rank
        fields |= {"r": rank, "lora_alpha": int(scaled) if scaled.is_integer() else scaled}
        config: Any = with_ranks(build_config(**fields), small, allocate(importance, rank))
        fields |= {"rank_pattern": config.rank_pattern, "alpha_pattern": config.alpha_pattern}
        groups = self.saved.settings  # without its loss and ranks: the task's loss alone
        train = {**groups["train"], **OWN, **QUIET, "run": str(base.parent / "run")}
        return {
            "method": fields,
            "model": self.model_at(base),
            "data": groups["data"],
            "train": train | ({} if steps is None else {"steps": steps}),
            "tracker": {"name": "none"},
            "imports": groups.get("imports") or [],
        }


def _of_model(folder: Path, data: Path | None, overrides: list[str]) -> SavedAdapter:
    """Return the rows and settings of a run on a model in a folder."""
    if data is None:
        raise InputError(
            f"{folder} is a model without rows; give some with --data FILE, as data.train of "
            "petl train"
        )
    words = ["+method=lora", "model=path", "data=files", f"model.path={folder}"]
    settings = plain(compose([*words, *overrides]))
    settings["model"] |= model_in(folder)
    settings["data"]["train"] = str(data)
    # all fields, as a run stores them
    return SavedAdapter(folder, folder, read_config(settings).resolved)
