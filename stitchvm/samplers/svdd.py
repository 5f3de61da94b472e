r"""SVDD, value-based search among duplicates (Li et al., arXiv 2408.08252), at temperature 0:

    z_{k+1} = argmax_m V(z̄^m_{k+1}, σ_{k+1}),      z̄^m_{k+1} ~ p(· | z_k),  m = 1 … M, at every step with noise

FK steering with proposals only: N chains that know nothing of each other, never resampled.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

from stitchvm.samplers.fk import FKSteering

RESAMPLING = ("resample_from", "resample_to", "resampling", "ess_threshold")


class SVDD(FKSteering):
    """`FKSteering` with M proposals at every step and no resampling.

    Arguments:
        proposals: The number M of duplicates; 20 in the published code.
        particles: The number N of independent chains, of which the best is the sample.
        proposal_share: The share of the run, from its beginning, whose steps search.
        kwargs: As for `FKSteering`, but for the resampling.

    Raises:
        ValueError: If resampling is asked for, or as for `FKSteering`.
    """

    def __init__(
        self,
        proposals: int = 20,
        particles: int = 1,
        proposal_share: float = 1.0,
        **kwargs: Any,
    ) -> None:
        # a configuration names all settings, most with what they are by default
        usual = signature(FKSteering).parameters
        asked = [k for k in RESAMPLING if k in kwargs and kwargs[k] != usual[k].default]
        asked += ["resample_every"] if "resample_every" in kwargs else []
        if asked:
            raise ValueError(f"SVDD never resamples: leave {asked[0]} out, or take FKSteering.")
        super().__init__(
            particles=particles,
            proposals=proposals,
            proposal_share=proposal_share,
            resample_every=None,
            **kwargs,
        )
