"""The work of `petl shrink`: measure, cut, score, write; the recovery in between is a run.

OUT.train has `model`, the shrunk one with shrink.json, and `run`, its recovery: an interrupted
command goes on from there.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from petl.adapters.export.checked_folder import save_model
from petl.adapters.export.merge import merge, write_task_files
from petl.adapters.export.saved_adapter import find, scores_of
from petl.adapters.shrink.model import planned, shrink
from petl.adapters.shrink.source import ShrinkSource
from petl.core.model.modes import calibration_pass, forward
from petl.core.types import Record
from petl.data.models.loading import load_base, save_processor
from petl.data.tasks.base import write_task
from petl.errors import InputError, RunStopped
from petl.system.collectives import on_main
from petl.system.files.disk import as_json, copy_file, write_atomic
from petl.system.files.outputs import check_output, new_folder
from petl.system.files.read import parse_json, read_json
from petl.system.progress import Pass, ProgressItems
from petl.training.calibration import CalibrationData, calibration_batches
from petl.training.dataloader import Splits, digest, encode_splits
from petl.training.distributed.launch import start
from petl.training.evaluate import Evaluator

FILE, BASE, RUN = "shrink.json", "model", "run"
CALIBRATION = CalibrationData(num_samples=128, seq_len=1024)  # as of +ranks=cfsp
PLANNED = ("sparsity", "widths", "multiple", "heads", "metric")  # what decides how much stays
ROUNDS = 5  # in which forward passes are timed
Write = Callable[[Path], None]  # writes README and page into the folder of a model


class Work:
    """One `petl shrink`: its source, settings and folders.

    Attributes:
        source: the model with its rows.
        settings: the arguments of `petl.shrink`.
        out: the folder to write.
        accelerator: of this process.
        task: of the rows.
    """

    def __init__(self, source: ShrinkSource, settings: Mapping[str, Any], out: Path) -> None:
        self.source, self.settings, self.out = source, dict(settings), out
        config = source.saved.run_config
        self.accelerator: Accelerator = start(config.train.seed, config.precision)
        self.config, self.task = config, source.saved.data.task

    @property
    def base(self) -> Path:
        """The folder of the shrunk model before its recovery."""
        return self.out.with_name(f"{self.out.name}.train") / BASE

    @property
    def run(self) -> Path:
        """The folder of the recovery."""
        return self.base.with_name(RUN)

    @cached_property
    def splits(self) -> Splits:
        """The rows, as in a run, so that recovery and calibration see the same."""
        source, train = self.source, self.config.train
        return encode_splits(source.saved.data, source.processor, train, self.accelerator)

    @cached_property
    def inputs(self) -> Record:
        """What the shrunk model and its scores follow from, beside the arguments of `petl.shrink`.

        The recovery has settings of its own, which its run compares.
        """
        groups, config = self.source.saved.settings, self.config
        named = {f"{group}.{k}": v for group in ("model", "data") for k, v in groups[group].items()}
        named.pop("model.path", None)  # a folder is what its files are
        found = named | {
            "train.seed": config.train.seed,
            "train.precision": config.precision,
            "digest of the weights": self.source.digest(),
            "digest of the training rows": digest(self.splits.train),
            "digest of the test rows": digest(self.splits.test),
        }
        return parse_json(as_json(found))  # as it is read from a file

    def earlier(self) -> Record | None:
        """Return the record of a command with these settings and inputs; None: there is none.

        Raises:
            InputError: they are others, or the folder is something else.
        """
        check_output(self.base.parent, (BASE, RUN), (BASE,))
        if not self.base.exists():  # it appears when it is complete
            return None
        record = read_json(self.base / FILE, dict[str, Any])
        then = record["settings"] | record.get("inputs", {})
        now = self.settings | {"source": self.source.name} | self.inputs
        for name, value in now.items():
            if then.get(name) != value:
                raise InputError(
                    f"{self.base.parent} holds a model that was shrunk with {name}="
                    f"{then.get(name)}, not {value}; remove it, or choose another OUT"
                )
        return record

    def shrunk(self) -> tuple[PreTrainedModel, Record]:
        """Measure, cut and score; return the small model and the content of shrink.json."""
        own = {name: self.settings[name] for name in PLANNED}
        planned(self.source.unread(), **own)  # refuses what it can before weights are read
        train, splits = self.config.train, self.splits
        dense: PreTrainedModel = self.source.dense().to(self.accelerator.device).eval()

        def scores(model: PreTrainedModel, name: str) -> dict[str, float]:
            return Evaluator(model, splits, self.accelerator, train.eval_batch_size).test(
                when=f"with the {name} model"
            )

        plan, _ = planned(dense, **own)
        rows = calibration_batches(CALIBRATION, self.config.model, splits)
        before = scores(dense, "dense")
        found = shrink(dense, ProgressItems(rows, "measuring channels"), **self.settings)
        after = scores(found.model, "shrunk")
        blocks = [
            {
                "path": path,
                "importance": value,
                "width": plan.mlps[path].width,
                **({"query_heads": plan.heads[path].queries} if plan.heads else {}),
                **{name: entries.tolist() for name, entries in found.kept[path].items()},
            }
            for path, value in found.importance.items()
        ]
        record: Record = {
            "settings": self.settings | {"source": self.source.name},
            "inputs": self.inputs,
            "calibration": asdict(CALIBRATION),
            "seed": train.seed,
            "metric": self.task.metric,
            "blocks": blocks,
            "class": type(found.model).__name__,
            "parameters": [*found.parameters],
            "bytes": [_bytes(dense), _bytes(found.model)],
            "seconds": seconds_of(next(iter(rows)), dense, found.model),
            "scores": {"dense": before, "shrunk": after},
        }
        return found.model, record

    def write(self, small: PreTrainedModel, out: Path, record: Record, also: Write) -> None:
        """Write a model that was not recovered, which is loaded again and compared.

        Raises:
            RunStopped: a tensor is another one when it is read again.
        """
        on_main(self.accelerator, lambda: self._write(small, out, record, also))

    def _write(self, small: PreTrainedModel, out: Path, record: Record, also: Write) -> None:
        saved, task, processor = self.source.saved, self.task, self.source.processor
        if isinstance(processor, PreTrainedTokenizerBase):
            processor = task.saved_tokenizer(processor)
        with new_folder(out) as draft:
            with Pass("writing the model", None):
                save_model(small, draft)
            save_processor(saved.settings["model"], task, draft, processor)
            write_task_files(task, small, draft)
            self._describe(draft, record, also)
            # loading may apply conversions of its own
            reread = load_base(self.source.model_at(draft), task, processor=processor)
            state = reread.state_dict()
            for name, tensor in small.state_dict().items():
                if not torch.equal(tensor.cpu(), state[name].cpu()):
                    raise RunStopped(f"{name} is another tensor when it is read again: not written")

    def take(self, record: Record, also: Write) -> None:
        """Write the model in OUT.train, without a recovery."""

        def copied() -> None:
            with new_folder(self.out) as draft:
                for file in self.base.iterdir():  # a model is files of one folder
                    copy_file(file, draft / file.name)
                self._describe(draft, record, also)

        on_main(self.accelerator, copied)

    def _describe(self, draft: Path, record: Record, also: Write) -> None:
        write_task(draft, self.task)
        write_atomic(draft / FILE, as_json(record, in_order=True))
        also(draft)

    def recovery(self, record: Record, rank: int, steps: int | None) -> Record:
        """Return the settings of the run that recovers the shrunk model."""
        # for the paths of its blocks: no weights are read
        small = load_base(self.source.model_at(self.base), self.task, meta=True)
        importance = {block["path"]: block["importance"] for block in record["blocks"]}
        return self.source.recovery(small, self.base, importance, rank, steps)

    def finish(self, record: Record, also: Write) -> None:
        """Merge the recovery into the shrunk model, and write it."""
        saved, more = find(self.run), lambda draft: self._describe(draft, record, also)
        on_main(self.accelerator, lambda: merge(saved, self.out, None, more))

    def recovered(self, run: Path | None = None) -> dict[str, float]:
        """Return the test scores of the recovery, or of another run."""
        return scores_of(run or self.run)


def seconds_of(batch: Mapping[str, object], *models: nn.Module) -> list[float]:
    """Return the seconds of a forward pass of each model, the least of some rounds in turn."""
    least = [float("inf")] * len(models)
    for _ in range(ROUNDS):
        for i, model in enumerate(models):
            with calibration_pass(model):
                begin = time.perf_counter()
                forward(model, batch)
                if torch.accelerator.is_available():  # the call returns before the pass ends
                    torch.accelerator.synchronize()
                least[i] = min(least[i], time.perf_counter() - begin)
    return least


def _bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())
