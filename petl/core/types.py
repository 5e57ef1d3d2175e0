"""Types for annotations: what models and batches have, and plain values by what they are."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, cast, runtime_checkable

from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel

Batch = Mapping[str, Tensor]  # inputs of a model by name
Settings = Mapping[str, Any]  # a group of settings by name, or all of them by group, as in YAML
Groups = dict[str, Any]  # the settings of a run by group
Fields = dict[str, Any]  # of a method, its name included
Record = dict[str, Any]  # an object of a JSON file; its reader has checked the form
Arguments = dict[str, Any]  # of a function of another library, by name
Group = dict[str, Any]  # of an optimizer: its parameters and their options
# of a metric in a run's log: its key, a title, a label of the vertical axis; "", "": not drawn
Chart = tuple[str, str, str]
# batches of model inputs, or a function that runs the model on some
Calibration = Iterable[Any] | Callable[[], Any]
Processor = Any  # tokenizer, image processor or feature extractor: transformers has no class of all


class CausalModel(PreTrainedModel, GenerationMixin):
    """A model of transformers that writes text; for annotations, as no model has this class."""


def base_of(model: nn.Module) -> CausalModel:
    """Return the model of transformers in a PeftModel; another one is returned as it is."""
    get_base_model = getattr(model, "get_base_model", None)
    return cast(CausalModel, model if get_base_model is None else get_base_model())


@runtime_checkable
class StackLayer(Protocol):
    """A layer whose adapters change the weights of experts, which are one parameter."""

    parameter_name: str

    def get_param(self) -> Tensor:
        """Return the parameter, of three dimensions."""
        ...

    def merged_experts(self, names: Sequence[str]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the weight of each expert without and with the updates of these adapters."""
        ...
