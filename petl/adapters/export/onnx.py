"""Write an adapted model as ONNX: the adapter merged, one file, which ONNX runtime computes.

For models that read a row and give one answer: classifiers, taggers, regression, extractive
question answering, and embedders, with their pooling. The folder has the layout of Hugging Face
Optimum: model.onnx, config.json, the files of the processor.
"""

import logging
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from petl.adapters.export.card import whole_processor
from petl.adapters.export.checked_folder import (
    OutputFolder,
    Outputs,
)
from petl.adapters.export.conversion import merged_model
from petl.adapters.export.saved_adapter import SavedAdapter
from petl.data.models.loading import save_processor
from petl.errors import UnsupportedError
from petl.system.files.outputs import check_output, new_folder
from petl.system.imports.extras import need_extra, optional
from petl.system.progress import Pass

FILE = "model.onnx"
LARGE = 1 << 30  # bytes; above, weights are in a file of their own: protobuf ends at 2 GiB
OPSET = 20  # GELU is one operator from here on
TOKENS = ("input_ids", "attention_mask", "token_type_ids")  # inputs with a length


def export_onnx(saved: SavedAdapter, out: Path, tolerance: float | None) -> OutputFolder:
    """Write the base model with the adapter merged into it as ONNX, in float32.

    The number of rows and of tokens is free. ONNX runtime computes the outputs that are compared.

    Args:
        tolerance: the largest `Difference.relative`; None: that of float32.

    Raises:
        InputError: `out` is taken, a package is not installed, the model generates, the method
            cannot merge, or the base is another one.
        RunStopped: the outputs differ by more than `tolerance`.
    """
    check_output(out)
    for package in ("onnx", "onnxscript", "onnxruntime"):
        # before the model is loaded; onnxscript is needed by torch's exporter
        need_extra("onnx", package, "petl export --onnx")
    saved = saved.in_dtype("float32")  # runtimes on a CPU have no bfloat16
    task = saved.task
    if task.writes:
        raise UnsupportedError(
            f"a model for {task.name} generates, which `petl export --onnx` does not write; "
            "`petl merge` writes the model for other exporters"
            + (", --gguf an adapter for llama.cpp" if task.name == "causal_lm" else "")
        )
    if task.tasks:
        raise UnsupportedError(
            f"a model for the tasks {', '.join(task.tasks)} is not written as ONNX: its outputs "
            "depend on the task of a row; `petl merge` writes the model for other exporters"
        )
    # ONNX has no adapters
    merged, adapted = merged_model(saved, lossy=tolerance is not None)
    with new_folder(out) as draft:
        with Pass("writing the ONNX graph", None):
            write_graph(merged, adapted.batches[0], draft / FILE)
        merged.config.save_pretrained(draft)
        save_processor(saved.settings["model"], task, draft, whole_processor(saved))
        difference = adapted.compare(Session(draft / FILE), tolerance, "ONNX model")
    return OutputFolder(out, difference)


class OnnxGraph(nn.Module):
    """A model whose inputs and outputs are tensors by position, as in a graph."""

    def __init__(self, model: nn.Module, inputs: list[str]) -> None:
        super().__init__()
        self.model, self.inputs = model, inputs

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs that `output_names` lists."""
        batch = dict(zip(self.inputs, tensors, strict=True))
        output = self.model(**batch)
        if "sentence_embedding" in output:
            return output.last_hidden_state, output.sentence_embedding
        return tuple(output[name] for name in output_names(output))


def output_names(output: Outputs) -> list[str]:
    """Return the names of a graph's outputs, from those of the model."""
    if "sentence_embedding" in output:
        return ["token_embeddings", "sentence_embedding"]
    return ["start_logits", "end_logits"] if "start_logits" in output else ["logits"]


@torch.no_grad()
def write_graph(model: nn.Module, batch: dict[str, Tensor], file: Path) -> None:
    """Export a model, traced on rows of `batch`."""
    model = model.cpu()
    # a row twice: the exporter takes a size of 1 as a constant
    batch = {name: tensor[:1].cpu().expand(2, *tensor.shape[1:]) for name, tensor in batch.items()}
    rows, length = torch.export.Dim("rows"), torch.export.Dim("length")
    sizes = [{0: rows, 1: length} if name in TOKENS else {0: rows} for name in batch]
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    with _without_messages():
        torch.onnx.export(
            OnnxGraph(model, list(batch)).eval(),
            tuple(batch.values()),
            file,
            input_names=list(batch),
            # only a forward pass tells which outputs the model has
            output_names=output_names(model(**batch)),
            # by the name of `forward`'s argument, which is variadic
            dynamic_shapes={"tensors": tuple(sizes)},
            opset_version=OPSET,
            external_data=weights > LARGE,
            dynamo=True,
            verbose=False,
        )


@contextmanager
def _without_messages() -> Generator[None]:
    """Inside the block, hide the exporter's warnings: outputs are compared afterwards."""
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        exporter.setLevel(level)


class Session:
    """An ONNX model that is called as the model that it was exported from."""

    def __init__(self, file: Path) -> None:
        runtime = optional("onnxruntime", "onnx")
        self.session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])

    def __call__(self, **batch: Tensor) -> dict[str, Tensor]:
        """Return the outputs by name, on the device of the batch."""
        device = next(iter(batch.values())).device
        values = self.session.run(None, {name: t.cpu().numpy() for name, t in batch.items()})
        names = [output.name for output in self.session.get_outputs()]
        return {n: torch.from_numpy(v).to(device) for n, v in zip(names, values, strict=True)}
