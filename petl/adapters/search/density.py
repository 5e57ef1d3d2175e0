"""Levels of density: of each adapted module, the fraction of its values that ComPEFT keeps.

The largest values and the magnitude (alpha 1) are those of a module's tensors together, and each
tensor has a Rice code of its own, whose bytes are the cost.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from petl.adapters.deltas.compress import compress_groups
from petl.adapters.search.tensors import active_adapter, adapter_tensors, config_of, grouped
from petl.adapters.search.units import Unit
from petl.core.adapter_file import reference_of
from petl.core.types import Fields
from petl.ops.ternary import State, Ternary
from petl.system.files.tensor_file import check_finite

DENSITIES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
ALPHA, SCOPE = 1.0, "module"


@dataclass(frozen=True)
class CompressedCandidate:
    """An adapter compressed at each density, module by module.

    Attributes:
        groups: names in the file by module.
        each: the compressed state at each of `DENSITIES`.
    """

    groups: Mapping[str, Sequence[str]]
    each: Sequence[Ternary]

    @classmethod
    def of(
        cls, state: State, groups: Mapping[str, Sequence[str]], reference: State | None
    ) -> "CompressedCandidate":
        """Compress the tensors of groups; `reference` as of `petl.adapters.deltas.compress`."""
        settings = [(density, ALPHA) for density in DENSITIES]
        each = compress_groups(state, settings, groups.values(), scope=SCOPE, reference=reference)
        return cls(groups, each)

    def costs(self) -> dict[str, list[int]]:
        """Return the bytes of the codes of each module at each density."""
        sizes = []
        for ternary in self.each:
            codes = apart(ternary, {}).codes
            sizes.append({n: len(c) for n, (c, *_) in zip(ternary.shapes, codes, strict=True)})
        return {
            path: [sum(by_name[name] for name in names) for by_name in sizes]
            for path, names in self.groups.items()
        }

    def mixed(self, state: Sequence[int]) -> Ternary:
        """Return the compressed adapter with the modules at the levels of a state."""
        level = {
            name: level
            for names, level in zip(self.groups.values(), state, strict=True)
            for name in names
        }
        first = self.each[0]
        own = {name: self.each[level[name]] for name in first.shapes}
        slices = {name: ternary.places[name][2] for name, ternary in own.items()}
        kept = {name: ternary.kept[name] for name, ternary in own.items()}
        found = Ternary(
            first.shapes,
            kept,
            first.sigma,
            {name: ternary.scale[name] for name, ternary in own.items()},
            # all have the same tensors, so positions are in the same tau
            np.concatenate([ternary.positions[slices[name]] for name, ternary in own.items()]),
            np.concatenate([ternary.signs[slices[name]] for name, ternary in own.items()]),
            first.others,
        )
        density = sum(kept.values()) / found.numel
        return apart(found, {"density": density, "alpha": ALPHA, "scope": SCOPE})


def apart(ternary: Ternary, settings: Fields) -> Ternary:
    """Return the same state with a code for each tensor."""
    return replace(ternary, apart=True, settings=settings)


def density_of(model: nn.Module) -> list[Unit]:
    """Return the adapted modules of the active adapter, each at `DENSITIES`.

    Raises:
        InputError: there is no adapter, its file holds other tensors than the model, or a value is
            not finite.
    """
    model, name = active_adapter(model)
    own = adapter_tensors(model)
    check_finite(own.state, f"adapter {name!r}")
    groups = grouped(model, own.live)
    reference = reference_of(config_of(model, name), {k: t.shape for k, t in own.state.items()})
    coded = CompressedCandidate.of(
        {key: t.cpu() for key, t in own.state.items()}, groups, reference
    )
    return units_of(coded, own.live, reference)


def units_of(
    coded: CompressedCandidate, live: Mapping[str, str], reference: State | None
) -> list[Unit]:
    """Return the modules of a compressed adapter as units.

    Args:
        live: for each name in the file, the name in the model.
        reference: as of `petl.adapters.deltas.compress`.
    """
    costs = coded.costs()
    states = [ternary.dense(reference) for ternary in coded.each]
    return [
        Unit(
            path,
            len(DENSITIES),
            tuple(costs[path]),
            tuple({live[key]: dense[key] for key in keys} for dense in states),
            DENSITIES,
        )
        for path, keys in coded.groups.items()
    ]
