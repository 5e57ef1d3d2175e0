"""The choice of a request's next token.

Shapes: V tokens of the vocabulary, T tokens of prompt and answer so far.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from petl.core.types import Arguments, CausalModel
from petl.generation.inference.grammar import GrammarMask
from petl.generation.inference.sampling import Sampling

if TYPE_CHECKING:
    from llguidance import LLMatcher

# below it the most likely token is taken: the division by it would overflow, in float32
LOWEST_TEMPERATURE = 1e-5


class LogProb(NamedTuple):
    """A token with the logarithm of its probability before temperature, penalties and cuts."""

    token: int
    value: float


@dataclass(frozen=True)
class TokenChooser:
    """Arguments of a request beside those of `Sampling`.

    Attributes:
        seed: of its random numbers; None: other ones each time.
        presence_penalty: subtracted from the logits of tokens that the answer has.
        frequency_penalty: likewise, times the number of their occurrences.
        logit_bias: added to the logits of these tokens.
        top_logprobs: number of most likely tokens to report with each token; None: no
            probabilities at all.
        matcher: of the grammar that the answer follows; None: any text.
    """

    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    top_logprobs: int | None = None
    matcher: "LLMatcher | None" = None


class OccurrencePenalty(LogitsProcessor):
    """Makes tokens less likely that occur behind the first `start` ones."""

    def __init__(self, presence: float, frequency: float, start: int) -> None:
        self.presence, self.frequency, self.start = presence, frequency, start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the lowered scores, [1, V]."""
        # tokens of the answer only: those of the prompt are not penalized
        counts = torch.bincount(input_ids[0, self.start :], minlength=scores.shape[-1])
        # OpenAI's formula: logit - presence [count > 0] - frequency count
        return scores - self.presence * (counts > 0) - self.frequency * counts


class Chooser:
    """Chooses the tokens of one answer, independently of the other rows of a batch.

    Attributes:
        max_tokens: tokens of the answer at most.
        is_argmax: True if the next token is that of the highest logit, and nothing else is asked
            for, so that `choose` need not be called.
    """

    def __init__(
        self,
        sampling: Sampling,
        choosing: TokenChooser,
        model: CausalModel,
        prompt: Sequence[int],
    ) -> None:
        arguments = sampling.arguments(model.generation_config)
        self.max_tokens: int = arguments["max_new_tokens"]
        self.seed, self.top_logprobs = choosing.seed, choosing.top_logprobs
        self.ids = [*prompt]  # then of the answer too: the repetition penalty counts both
        temperature = arguments.get("temperature") or model.generation_config.temperature or 1.0
        self.samples = arguments["do_sample"] and temperature >= LOWEST_TEMPERATURE
        arguments |= {"do_sample": self.samples, "temperature": float(temperature)}
        self.processors = processors(model, arguments, choosing, prompt)
        self.is_argmax = not (self.processors or self.samples or self.top_logprobs is not None)
        # on the CPU, so that a seed gives the same numbers on every device
        self.random = torch.Generator()
        if choosing.seed is None:
            self.random.seed()  # from the system's entropy
        else:
            self.random.manual_seed(choosing.seed)

    def choose(self, logits: Tensor) -> tuple[int, list[LogProb]]:
        """Choose a token.

        Args:
            logits: of the next token, [V].

        Returns:
            The token; and, if asked for, its log probability, followed by those of the most likely
            tokens.
        """
        logits = logits.float().cpu()  # where the generator is
        ids: Any = torch.tensor([self.ids])
        (scores,) = self.processors(ids, logits[None])
        if self.samples:
            token = int(torch.multinomial(scores.softmax(-1), 1, generator=self.random))
        else:
            token = int(scores.argmax())
        self.ids.append(token)
        return token, self._logprobs(logits, token)

    def _logprobs(self, logits: Tensor, token: int) -> list[LogProb]:
        if self.top_logprobs is None:
            return []
        # without the processors, so that settings do not change what is reported
        values = logits.log_softmax(-1)
        best = values.topk(min(self.top_logprobs, len(values)))  # a vocabulary may be smaller
        likely = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [LogProb(token, values[token].item()), *(LogProb(*each) for each in likely)]


def processors(
    model: CausalModel,
    arguments: Arguments,
    choosing: TokenChooser,
    prompt: Sequence[int],
) -> LogitsProcessorList:
    """The changes to the logits of a request: those of `generate`, and penalties of OpenAI's API.

    Args:
        model: whose generation config has what requests cannot set.
        arguments: of `generate`.
    """
    config = copy.deepcopy(model.generation_config)
    for name, value in arguments.items():
        setattr(config, name, value)
    # guidance computes passes of its own, of which a batch knows nothing
    config.guidance_scale = None
    ends = config.eos_token_id  # one, several or none
    config._eos_token_tensor = None if ends is None else torch.tensor(ends).reshape(-1)
    if choosing.logit_bias:
        config.sequence_bias = [[[token], bias] for token, bias in choosing.logit_bias.items()]
    own = LogitsProcessorList()
    if choosing.presence_penalty or choosing.frequency_penalty:
        presence, frequency = choosing.presence_penalty, choosing.frequency_penalty
        own.append(OccurrencePenalty(presence, frequency, len(prompt)))
    if choosing.matcher is not None:
        # before the cuts to the likeliest tokens, which the grammar might forbid
        own.append(GrammarMask(choosing.matcher, len(prompt)))
    return model._get_logits_processor(  # ty: ignore[invalid-argument-type] - the mixin's own self
        config, len(prompt), logits_processor=own, device="cpu"
    )
