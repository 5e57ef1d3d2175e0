"""LoRAs of transformers 4, where each expert had linear layers of its own, for today's stacks.

PEFT's conversion knows two families, all projections of all experts together, and one rank; and
scales gate and up by the square root of 2 where `use_rslora` is set. This one asks transformers for
the path of each projection, and gives an expert the factors of all of its projections side by side.
Shapes: E experts, I in, O out, R rank of a stack, P that of a projection.
"""

import logging
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from peft import PeftConfig
from torch import Tensor, nn
from transformers import PreTrainedModel

from petl.core.adapter_file import PREFIX
from petl.core.compat import check_target_module_exists, get_pattern_key
from petl.core.experts.checkpoints import ExpertProjection, parts_of, path_in_checkpoints
from petl.core.experts.layout import experts_of
from petl.core.experts.stacks import saved_factors
from petl.core.model.linear import is_linear
from petl.errors import InputError, UnsupportedError

logger = logging.getLogger(__name__)

Scaled = list[tuple[ExpertProjection, Tensor, Tensor, float]]  # A, B and scale of projections


def to_stacks(
    config: PeftConfig, model: PreTrainedModel, tensors: Mapping[str, Tensor], what: object
) -> dict[str, Tensor]:
    """Return the tensors of such an adapter as PEFT saves those of stacks; `config` is changed.

    It then names each layer and stack by its complete path, with their ranks. Tensors that do not
    belong to a target of the config are returned as they are.

    Args:
        config: of a LoRA.
        model: the base model.
        tensors: by key in the file.
        what: the file, for messages.

    Raises:
        InputError: the file lacks a projection of an expert that the config names.
        UnsupportedError: its experts have more than the factors of a LoRA, such as with DoRA.
    """
    found, adapted = dict(tensors), _Targets(config)
    parameters = list[str]()
    for path, module in model.named_modules():
        layout = experts_of(module)
        for name in layout.stacks if layout else ():
            parts = [
                part
                for part in parts_of(model, path, module, name)
                if check_target_module_exists(config, part.path)
            ]
            if parts:
                parameters.append(f"{path}.{name}")
                factors = [_taken(found, part.path, what) for part in parts]
                adapted.add_stack(path, name, module, parts, factors)
        weight = module._parameters.get("weight")
        if weight is None or weight.dim() != 2:
            continue
        earlier = path_in_checkpoints(model, path)
        if check_target_module_exists(config, earlier):
            adapted.add_layer(found, path, earlier)
            # routers were linear layers, too
            if not isinstance(module, nn.Embedding) and not is_linear(module):
                parameters.append(f"{path}.weight")
    return found | adapted.finished(parameters)


def _taken(tensors: dict[str, Tensor], path: str, what: object) -> tuple[Tensor, Tensor]:
    """Remove and return A [P, I] and B [O, P] of one projection of an expert."""
    own = {key for key in tensors if key.startswith(f"{PREFIX}{path}.")}
    a, b = (f"{PREFIX}{path}.lora_{side}.weight" for side in "AB")
    for key in (a, b):
        if key not in own:
            raise InputError(
                f"{what} has no {key}, which its config targets: it was truncated, or saved from "
                "another model or config"
            )
    if own - {a, b}:
        raise UnsupportedError(
            f"{what} has {min(own - {a, b})}: the experts of this model are stacks, which take the "
            "factors of a LoRA and nothing else (no DoRA, no biases); merge the adapter with the "
            "version of transformers, below 5, that it was made with"
        )
    return tensors.pop(a), tensors.pop(b)


class _Targets:
    """What becomes of the layers that a config names.

    Args:
        config: as it was saved; changed by `finished`.
    """

    def __init__(self, config: Any) -> None:
        self.config = config
        self.power = 0.5 if config.use_rslora else 1.0
        # by the pattern of a stack's rank
        self.stacks: dict[str, list[tuple[str, nn.Module, str, Scaled]]] = {}
        self.layers: dict[str, tuple[int, float]] = {}  # rank and alpha, by path

    def _alpha(self, earlier: str) -> float:
        alphas = self.config.alpha_pattern or {}
        return alphas.get(get_pattern_key(list(alphas), earlier), self.config.lora_alpha)

    def add_layer(self, tensors: dict[str, Tensor], path: str, earlier: str) -> None:
        """Give the tensors of a layer their new names; without them, the strict check tells."""
        for key in [key for key in tensors if key.startswith(f"{PREFIX}{earlier}.")]:
            tensors[PREFIX + path + key.removeprefix(PREFIX + earlier)] = tensors.pop(key)
        A = tensors.get(f"{PREFIX}{path}.lora_A.weight")
        self.layers[path] = (self.config.r if A is None else len(A), self._alpha(earlier))

    def add_stack(
        self,
        path: str,
        name: str,
        module: nn.Module,
        parts: Iterable[ExpertProjection],
        factors: Iterable[tuple[Tensor, Tensor]],
    ) -> None:
        """Keep the factors of the projections of a stack's experts."""
        scaled = [
            (part, A, B, self._alpha(part.path) / len(A) ** self.power)
            for part, (A, B) in zip(parts, factors, strict=True)
        ]
        # those of one name in all layers have one rank
        inner = r"(\.base_layer)?"  # where PEFT wraps a layer around that of another stack
        pattern = rf".*\.{re.escape(path.rpartition('.')[2])}{inner}\.{re.escape(name)}"
        self.stacks.setdefault(pattern, []).append((path, module, name, scaled))

    def finished(self, parameters: list[str]) -> dict[str, Tensor]:
        """Return the tensors of the stacks, and write all targets into the config."""
        config, found, ranks, alphas = self.config, {}, {}, {}
        for pattern, stacks in self.stacks.items():
            R = max(_rank(scaled) for *_, scaled in stacks)
            scale = stacks[0][-1][0][-1]
            ranks[pattern], alphas[pattern] = R, scale * R**self.power
            for path, module, name, scaled in stacks:
                layout = experts_of(module)
                assert layout is not None
                A, B = _side_by_side(scaled, layout.shape(module, name), R, scale)
                # as `stacks_of`: that which is adapted last is the outer one
                later = {f"{path}.{n}" for n in layout.stacks[layout.stacks.index(name) + 1 :]}
                key = PREFIX + path + ".base_layer" * len(later & {*parameters})
                saved = saved_factors(A, B, swapped=False)
                found[f"{key}.lora_A.weight"], found[f"{key}.lora_B.weight"] = saved
        for path, (rank, alpha) in self.layers.items():
            if (rank, alpha) != (config.r, config.lora_alpha):
                ranks[re.escape(path)], alphas[re.escape(path)] = rank, alpha
        config.target_modules = self.layers.keys() - {p.removesuffix(".weight") for p in parameters}
        config.target_parameters = parameters
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
        config.rank_pattern, config.alpha_pattern = ranks, alphas
        if config.lora_dropout and any(name.endswith(".weight") for name in parameters):
            logger.info(
                "lora_dropout=%s of the file is not used: PEFT's layer around the weight of a "
                "router has none",
                config.lora_dropout,
            )
            config.lora_dropout = 0.0
        return found


def _rank(scaled: Scaled) -> int:
    """Return the largest rank of an expert: the sum of those of its projections."""
    ranks: dict[int, int] = {}
    for part, A, *_ in scaled:
        ranks[part.expert] = ranks.get(part.expert, 0) + len(A)
    return max(ranks.values())


def _side_by_side(
    scaled: Scaled, shape: tuple[int, int, int], rank: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Return A [E, R, I] and B [E, O, R] of a stack; zero where an expert has no projection."""
    experts, inputs, outputs = shape
    like = scaled[0][1]
    A_ERI, B_EOR = like.new_zeros(experts, rank, inputs), like.new_zeros(experts, outputs, rank)
    taken = [0] * experts
    for part, A, B, own in scaled:
        first, last = taken[part.expert], taken[part.expert] + len(A)
        A_ERI[part.expert, first:last] = A
        # exact where all have one scale
        factor = 1.0 if math.isclose(own, scale) else own / scale
        B_EOR[part.expert, part.outputs, first:last] = (B * factor).to(like)
        taken[part.expert] = last
    return A_ERI, B_EOR
