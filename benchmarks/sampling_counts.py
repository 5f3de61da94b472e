r"""FLOPs of sampling counted on paper, from what backbone, stitch, tail and reward say of themselves.

With u = one pass of the generator, F = its first i blocks, S = stitch and tail, D = the decoder, R = the reward, and a
bar for the backward pass to their *inputs* (no weight has a gradient: as much as forward in linear layers and
convolutions, twice as much in attention, nothing for what depends on text or noise level alone), a guided step costs
beyond the plain one (2u with classifier-free guidance)

    stitched, prefix shared    F̄ + S + S̄              not shared    + F
    Tweedie, "null", shared    ū + D + D̄ + R + R̄      not shared    + u
    Tweedie, "cfg",  shared    2ū + D + D̄ + R + R̄     not shared    + 2u

and with checkpointing once more what is run again: the denoiser and the decoder, or the prefix's and tail's blocks.
The rough count takes every backward pass for as much as the forward pass: at 4096 tokens, where attention is 40 % of a
dual block of SD 3.5 Medium, it says 13 % (23 %) of a plain step for i = 4 instead of 17 % (27 %).
"""

from __future__ import annotations

from dataclasses import dataclass

from sampling_setups import Rig
from sampling_variants import Kind, Variant


@dataclass(frozen=True)
class Part:
    """FLOPs of a part of the computation for one sample: forward, and backward to its input."""

    forward: float
    backward: float

    def __add__(self, other: Part) -> Part:
        return Part(self.forward + other.forward, self.backward + other.backward)


def transformer_part(rig: Rig, depth: int) -> Part:
    """Returns the first `depth` blocks under one condition; all of them make a velocity.

    The backward pass misses what sees text and noise level only, the first block's queries, keys and values of the
    text, and what the last block makes of the text.
    """
    backbone, config = rig.model.backbone, rig.generator.transformer.config
    forward = backbone.flops(rig.latent_size, depth)
    w, L = backbone.width(0), backbone.num_blocks
    n = (rig.latent_size[0] // backbone.patch) * (rig.latent_size[1] // backbone.patch)
    m = rig.generator.null.tokens.shape[1]
    # of 12·m·w² a block; a single block of FLUX has text and image in one sequence, and runs all of it back
    single = rig.generator.family == "flux" and depth > config.num_layers
    text = 3 if depth == L or single else 12
    if rig.generator.family == "sd3":
        dual = [k in config.dual_attention_layers for k in range(depth)]
        head = n * w * backbone.patch**2 * rig.generator.latent_channels
        aside = m * w * config.joint_attention_dim
        aside += w * (256 + config.pooled_projection_dim + 2 * w)
        modulation = sum((9 if d else 6) + (2 if k == L - 1 else 6) for k, d in enumerate(dual))
        attention = depth * 2 * (n + m) ** 2 * w + sum(dual) * 2 * n**2 * w
    else:
        head = n * w * config.in_channels
        aside = m * w * config.joint_attention_dim + w * (config.pooled_projection_dim + w)
        aside += (2 if config.guidance_embeds else 1) * w * (256 + w)
        doubles = min(depth, config.num_layers)
        modulation = 12 * doubles + 3 * (depth - doubles)
        attention = depth * 2 * (n + m) ** 2 * w
    aside += modulation * w**2 + text * m * w**2
    if depth < L:
        head = 0
    backward = forward + 2 * (attention - aside + head)
    return Part(forward + 2 * (head + 2 * w * w * (depth == L)), backward)


def reward_part(rig: Rig, from_block: int) -> Part:
    """Returns the reward's blocks from j on, or the whole tower for j = 0."""
    tower = rig.reward.visual
    forward = rig.model.tail.flops() if from_block else rig.reward.flops()
    blocks = len(tower.transformer.resblocks) - max(from_block - 1, 0)
    tokens = 1 + rig.reward.grid[0] * rig.reward.grid[1]
    attention = blocks * 4 * tokens**2 * rig.reward.width
    return Part(forward, forward + attention)


def stitch_part(rig: Rig) -> Part:
    """Returns the stitching layer."""
    h, w = rig.latent_size
    patch = rig.model.backbone.patch
    flops = rig.model.stitch.flops((h // patch, w // patch))
    return Part(flops, flops)


def decoder_part(rig: Rig) -> Part:
    """Returns the VAE's decoder: convolutions, and the attention of its middle block."""
    config = rig.generator.vae.network.config
    h, w = rig.latent_size
    cells, widths = h * w, list(reversed(config.block_out_channels))
    width, linear, attention = widths[0], 0, 0

    def resnet(a: int, b: int) -> int:
        return 9 * a * b + 9 * b * b + (a * b if a != b else 0)

    linear += cells * (9 * config.latent_channels * width + 2 * resnet(width, width))
    if config.mid_block_add_attention:
        linear += 4 * cells * width**2
        attention = 2 * cells**2 * width
    for level, out in enumerate(widths):
        layers = config.layers_per_block + 1
        linear += cells * (resnet(width, out) + (layers - 1) * resnet(out, out))
        width = out
        if level < len(widths) - 1:
            cells *= 4
            linear += cells * 9 * width**2
    linear += cells * 9 * width * config.out_channels
    return Part(2 * (linear + attention), 2 * (linear + 2 * attention))


@dataclass(frozen=True)
class Units:
    """FLOPs of what steps are made of, each for one row; steps add up from them, however many rows they have.

    Attributes:
        fresh: A velocity from scratch.
        continued: A velocity that goes on from what the value has run of it.
        value: A value.
        gradient: A value and its gradient.
        judged: The terminal reward of a particle.
        decoded: The sample's pixels.
    """

    fresh: float
    continued: float
    value: float
    gradient: float
    judged: float
    decoded: float

    def step(self, kind: Kind) -> float:
        """Returns the FLOPs of a step."""
        velocity = (kind.velocity - kind.continued) * self.fresh + kind.continued * self.continued
        return velocity + kind.value * self.value + kind.gradient * self.gradient

    def end(self, variant: Variant) -> float:
        """Returns the FLOPs after the last step: judging the particles, decoding the sample."""
        return (variant.particles > 1) * variant.particles * self.judged + self.decoded

    def sample(self, variant: Variant, kinds: list[Kind]) -> float:
        """Returns the FLOPs of a run."""
        return sum(self.step(kind) for kind in kinds) + self.end(variant)


class Paper:
    """The count on paper for a rig.

    Arguments:
        rig: The rig.
        rough: Whether every backward pass counts as much as the forward pass.

    Attributes:
        parts: The parts by name.
        branches: The velocities of a plain step.
    """

    def __init__(self, rig: Rig, rough: bool = False) -> None:
        i, j = rig.setup.stitch_point
        self.branches = rig.branches
        self.parts = {
            "denoiser": transformer_part(rig, rig.model.backbone.num_blocks),
            "prefix": transformer_part(rig, i),
            "stitch and tail": stitch_part(rig) + reward_part(rig, j),
            "decoder": decoder_part(rig),
            "reward": reward_part(rig, 0),
        }
        if rough:
            self.parts = {k: Part(p.forward, p.forward) for k, p in self.parts.items()}

    def units(self, variant: Variant) -> Units:
        """Returns what a variant's steps are made of."""
        decoder, reward = self.parts["decoder"], self.parts["reward"]
        fresh = self.branches * self.parts["denoiser"].forward
        value = self.value(variant)
        spared = 0.0
        if variant.share and variant.estimator == "stitched":
            spared = self.parts["prefix"].forward
        elif variant.share and variant.estimator == "tweedie":
            spared = self._passes(variant) * self.parts["denoiser"].forward
        judged = decoder.forward + reward.forward
        gradient = value.forward + value.backward
        return Units(fresh, fresh - spared, value.forward, gradient, judged, decoder.forward)

    def value(self, variant: Variant) -> Part:
        """Returns one value and its gradient, with what is run again in the backward pass."""
        if variant.estimator is None:
            return Part(0.0, 0.0)
        if variant.estimator == "stitched":
            prefix, head = self.parts["prefix"], self.parts["stitch and tail"]
            again = prefix.forward + head.forward if variant.checkpointing == "blocks" else 0.0
            return prefix + head + Part(0.0, again)
        passes = self._passes(variant)
        u, D, R = (self.parts[name] for name in ("denoiser", "decoder", "reward"))
        again = passes * u.forward + D.forward if variant.checkpointing != "no" else 0.0
        backward = passes * u.backward + D.backward + R.backward + again
        return Part(passes * u.forward + D.forward + R.forward, backward)

    def _passes(self, variant: Variant) -> int:
        return self.branches if variant.velocity == "cfg" else 1
