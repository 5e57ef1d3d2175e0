"""The wrapped model of a run without weights, and how a run would store them."""

import warnings
from collections.abc import Callable, Iterable

from peft import PeftModel
from transformers import PreTrainedModel

from petl.core.parameters import trainable
from petl.core.registry import on_shapes, without_data
from petl.data.models.loading import dense_modules, load_base
from petl.data.models.quantization import quantized_layers
from petl.data.tasks.base import Task
from petl.efficiency.rewrite import apply_rewrites, rewrites_of
from petl.experiments.planning.memory import Storage
from petl.methods import losses
from petl.training.distributed.launch import FSDP, number_of_processes
from petl.training.features import Fields
from petl.training.runs.config import RunConfig
from petl.training.wrapping import train_new_modules


def model_on_shapes(
    run: RunConfig,
    task: Task,
    fields: Fields,
    when_wrapped: Iterable[Callable[[PeftModel], None]] = (),
) -> tuple[PeftModel, list[str]]:
    """Return the wrapped model of a run without weights, and notes about it.

    Args:
        fields: those of the method, from `Setup.fields`.
        when_wrapped: of the same setup.
    """
    planned, notes = without_data(fields)  # an initialization from data needs the data

    def build() -> PreTrainedModel:
        return load_base(run.model, task, meta=True)

    with warnings.catch_warnings(record=True) as caught:
        model = on_shapes(build, train_new_modules(planned, build()))
    for finish_wrapping in when_wrapped:
        finish_wrapping(model)
    losses.attach(model, run.loss)
    apply_rewrites(model, rewrites_of(run.train))
    for _, parameter in trainable(model):
        parameter.data = parameter.data.float()  # as `make_optimizer` does
    # deprecation warnings are for developers of petl
    notes += dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, UserWarning))
    return model, notes


def storage_of(run: RunConfig, task: Task) -> Storage:
    """Return how the weights of a run are stored; the number of processes is WORLD_SIZE.

    FSDP2 is planned for at least two processes.
    """
    kind, launch = run.model.quantization, run.launch
    processes, paths = number_of_processes(), []
    if kind is not None:
        base = load_base(run.model, task, meta=True)
        paths = quantized_layers(base, kind, dense_modules(base, task))
    quantized = {path: str(kind) for path in paths}
    if isinstance(launch, FSDP):
        return Storage(quantized, max(2, processes), True, launch.reshard_after_forward)
    return Storage(quantized, processes)
