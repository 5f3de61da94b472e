"""One run of a network for all stitched values that read it, where nobody else runs it for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from stitchvm.backbones.text import Condition
from stitchvm.values.base import BoundValue, Prefixes, same_level
from stitchvm.values.stitched import BoundStitched

__all__ = ["shared_runs"]


def shared_runs(
    terms: Mapping[str, BoundValue],
) -> list[tuple[list[str], Callable[[Tensor, Tensor], Prefixes]]]:
    """Returns which stitched values read one network under one null text, and what runs it for all of them.

    A network that a single value reads is left out: it runs it itself.

    Arguments:
        terms: Bound values by name.
    """
    stitched = {name: term for name, term in terms.items() if isinstance(term, BoundStitched)}
    groups, left = [], list(stitched)
    while left:
        backbone: Any = stitched[left[0]].value.value_model.backbone
        network = getattr(backbone, "network", None)
        if network is None:
            left.pop(0)
            continue
        null = Condition(backbone.null_context, backbone.null_pooled)
        found = {
            name: depths
            for name in left
            if (depths := stitched[name].depths(network, null))
            and same_settings(stitched[name].value.value_model.backbone, backbone)
        }
        left = [name for name in left[1:] if name not in found]
        if len(found) > 1:
            wanted = sorted({depth for depths in found.values() for depth in depths})
            groups.append((list(found), prefix_run(backbone, wanted)))
    return groups


def same_settings(a: Any, b: Any) -> bool:
    """Returns whether two backbones on one network tell it the same: the distilled guidance of FLUX."""
    return getattr(a, "guidance", None) == getattr(b, "guidance", None)


def prefix_run(backbone: Any, depths: Sequence[int]) -> Callable[[Tensor, Tensor], Prefixes]:
    """Returns a function of (z_t, t) that runs a backbone once and gives its states at several depths."""

    def run(z_t: Tensor, t: Tensor) -> Prefixes:
        state = backbone.prefix(z_t, same_level(t, z_t), depths[0])
        states = {state.depth: state}
        while state.depth < depths[-1]:
            state = backbone.advance(state)
            if state.depth in depths:
                states[state.depth] = state
        return states

    return run
