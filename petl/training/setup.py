"""Start a run: seed and Accelerator."""

from accelerate import Accelerator
from accelerate.utils import set_seed

from petl.distributed.launch import Launch, make_accelerator
from petl.runs.settings import TrainConfig


def start(settings: TrainConfig, dtype: str, launch: Launch | None = None) -> Accelerator:
    """The Accelerator of a run whose model has this dtype; from here on draws follow the seed."""
    set_seed(settings.seed)
    return make_accelerator(launch or Launch(), settings.computes_in(dtype))
