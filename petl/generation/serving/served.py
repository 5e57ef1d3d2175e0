"""What a request can choose."""

import time
from dataclasses import dataclass, field

from petl.generation.inference.language_model import LanguageModel
from petl.generation.serving.engine import Slot


@dataclass(frozen=True)
class ServedAdapter:
    """What a request chooses by `model`.

    Attributes:
        name: for requests.
        language: the model, which reads prompts as this adapter's run did.
        adapter: its name in the model; `BASE` for none.
        lane: the requests that it can share passes with.
        positions: tokens of prompt and answer at most; None: no limit.
        path: folder of the run or adapter; None: the base model.
    """

    name: str
    language: LanguageModel
    adapter: str
    lane: Slot
    positions: int | None
    path: str | None = None
    # seconds since 1970: `created` in /v1/models
    created: int = field(default_factory=lambda: int(time.time()))
