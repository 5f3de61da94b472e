"""The ways of sampling that are compared, and which kinds of steps each of them takes.

A step's cost depends on how many rows it runs the generator for, from what a value left of it ("continued") or anew,
and of how many it asks values or gradients: its `Kind`. A short run that has every kind of the full one is measured,
and the full one is added up from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from sampling_setups import Rig, SamplingSetup

from stitchvm.samplers.base import Sampler
from stitchvm.samplers.best_of_n import BestOfN
from stitchvm.samplers.field import Field
from stitchvm.samplers.fk import FKSteering
from stitchvm.samplers.guidance import GuidedSampler
from stitchvm.samplers.plain import PlainSampler
from stitchvm.values.base import Value
from stitchvm.values.stitched import StitchedValue
from stitchvm.values.terminal import TerminalValue
from stitchvm.values.tweedie import TweedieValue

PARTICLES = 4  # the paper's N
SHORT_FK = 7  # the fewest steps that have every kind


class Kind(NamedTuple):
    """A kind of step: whether it is the first; its rows of velocities, of those continued, of values, of gradients."""

    first: bool
    velocity: int
    continued: int
    value: int
    gradient: int


@dataclass(frozen=True)
class Variant:
    """One way of sampling.

    Attributes:
        method: "plain", "dps", "fk" or "bon".
        estimator: "tweedie" or "stitched", for "dps" and "fk".
        velocity: The velocity of a Tweedie value: "null" or "cfg".
        share: Whether the velocity goes on from what the value has run of it.
        checkpointing: "no", "whole" (the denoiser as a whole, the decoder by blocks) or "blocks" (all by blocks).
        proposals: M of "fk".
        decode_batch: The images the VAE decodes at once; all of them by default.
        graph: Whether stitch and tail of a stitched value are launched as CUDA graphs.
    """

    method: str
    estimator: str | None = None
    velocity: str = "cfg"
    share: bool = True
    checkpointing: str = "no"
    proposals: int = 1
    decode_batch: int | None = None
    graph: bool = False

    @property
    def particles(self) -> int:
        """The number N of particles."""
        return PARTICLES if self.method in ("fk", "bon") else 1

    @property
    def name(self) -> str:
        """Its name in tables."""
        if self.method in ("plain", "bon"):
            return "plain" if self.method == "plain" else f"best of {PARTICLES}"
        words = [f"{self.method.upper()} {self.estimator}"]
        words += [self.velocity] * (self.estimator == "tweedie")
        words += [f"M = {self.proposals}"] * (self.method == "fk")
        words += ["not shared"] * (not self.share)
        words += [f"checkpointing {self.checkpointing}"] * (self.checkpointing != "no")
        words += [f"decoding {self.decode_batch}"] * (self.decode_batch is not None)
        words += ["CUDA graph"] * self.graph
        return ", ".join(words)


def variants(two_branches: bool, several: bool = True, graphs: bool = False) -> list[Variant]:
    """Returns what is compared; the Tweedie path in every way that might be its best.

    Without an unconditional branch (distilled guidance) the null-text velocity is no part of the sampler's, and a
    stitched value shares nothing.

    Arguments:
        two_branches: Whether a plain step runs the network twice (classifier-free guidance).
        several: Whether to compare what has several particles, too: FK steering and best-of-N.
        graphs: Whether to compare CUDA graphs, too: on a GPU.
    """
    dps = [
        Variant("dps", "tweedie", velocity, checkpointing=how)
        for velocity in (("null", "cfg") if two_branches else ("cfg",))
        for how in ("no", "whole", "blocks")
    ]
    # what the literature differentiates through, and no code shares (SVDD, DAS, FreeDoM)
    dps.append(Variant("dps", "tweedie", "cfg", share=False))
    dps += [Variant("dps", "stitched", share=share) for share in (True, False)[not two_branches :]]
    share = two_branches
    dps.append(Variant("dps", "stitched", share=share, checkpointing="blocks"))
    dps += [Variant("dps", "stitched", share=share, graph=True)] * graphs
    fk = [Variant("fk", "tweedie", "cfg", decode_batch=n) for n in (None, 1)]
    fk += [Variant("fk", "stitched", share=share, proposals=m) for m in (1, 2, 4, 6)]
    fk += [Variant("fk", "stitched", share=share, graph=True)] * graphs
    return [Variant("plain"), *dps, *([Variant("bon"), *fk] if several else [])]


def make_sampler(setup: SamplingSetup, variant: Variant, steps: int | None = None) -> Sampler:
    """Returns the sampler of the full run, or a short one of about `steps` steps with the same kinds of them.

    The update of guidance is of unit norm, which random networks survive; its cost is that of any other.
    """
    n = steps or (setup.guided_steps if variant.particles == 1 else setup.fk_steps)
    common: dict[str, Any] = {
        "guidance_scale": setup.guidance_scale,
        "grid": "single",
        "nu": "linear_sde",
        "share_prefix": variant.share,
    }
    if variant.method == "plain":
        return PlainSampler(num_steps=n, **common)
    if variant.method == "dps":
        return GuidedSampler(strength=0.1, mode="unit_norm", num_steps=n, **common)
    if variant.method == "bon":
        return BestOfN(particles=variant.particles, num_steps=n, **common)
    shape: dict[str, Any] = {"particles": variant.particles, "proposals": variant.proposals}
    if steps:
        n = max(steps, SHORT_FK)
        # proposals at steps 1 and 2, resampling at step 5, nothing at the others
        shape |= {"proposal_share": 2 / n, "resample_from": 5, "resample_to": 5}
    return FKSteering(num_steps=n, **shape, **common)


def make_value(rig: Rig, variant: Variant) -> Value | None:
    """Returns the value that steers, with every switch of the networks as the variant has it."""
    network, vae = rig.generator.transformer, rig.generator.vae.network
    by_blocks = variant.checkpointing == "blocks"
    for module in (network, vae):
        module.disable_gradient_checkpointing()
    if by_blocks:
        network.enable_gradient_checkpointing()
    rig.generator.vae.micro_batch = variant.decode_batch
    rig.model.backbone.gradient_checkpointing = by_blocks
    rig.model.tail.gradient_checkpointing = by_blocks
    if variant.estimator == "stitched":
        return StitchedValue(rig.model, variant.graph)
    if variant.estimator == "tweedie":
        again = variant.checkpointing != "no"
        return TweedieValue(
            rig.generator, rig.reward, velocity=variant.velocity, checkpointing=again
        )
    return None


def final_value(rig: Rig, variant: Variant) -> Value | None:
    """Returns what chooses among particles: the terminal reward."""
    return TerminalValue(rig.generator.vae, rig.reward) if variant.particles > 1 else None


def field_of(rig: Rig, variant: Variant, value: Value | None) -> Field:
    """Returns the field that a sampler of the variant makes."""
    bound = None if value is None else value.bind(rig.prompts)
    scale = rig.setup.guidance_scale
    return Field(rig.generator, rig.prompts, scale, bound, share_prefix=variant.share)


def plan(sampler: Sampler, shared: bool) -> list[Kind]:
    """Returns the kinds of a run's steps, for one prompt."""
    rows, kinds = sampler.particles, []
    asked = False
    for k in range(sampler.num_steps):
        value = gradient = 0
        continued = rows if shared and asked else 0
        if isinstance(sampler, GuidedSampler):
            gradient, continued = rows, rows if shared else 0
        if isinstance(sampler, FKSteering):
            many = k + 1 in sampler.proposal_steps and k + 1 < sampler.num_steps
            asked = many or k + 1 in sampler.resampling_steps
            value = rows * (sampler.proposals if many else 1) if asked else 0
        kinds.append(Kind(k == 0, rows, continued, value, gradient))
    return kinds
