"""Sampling by reward in a few lines, from a diffusers pipeline that is in memory:

    pipe = StableDiffusion3Pipeline.from_pretrained(…).to("cuda")
    value = stitchvm.load_value("runs/…/value_model", pipe)
    images = stitchvm.sample(pipe, prompts, value, method="fk").images

Nothing is copied: the generator runs on the pipeline's networks, and so does a value model of the same backbone.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stitchvm.generator import Generator
from stitchvm.hub import resolve
from stitchvm.rewards.base import Reward
from stitchvm.samplers.base import Record, Sampler, Samples
from stitchvm.samplers.best_of_n import BestOfN
from stitchvm.samplers.fk import FKSteering
from stitchvm.samplers.guidance import GuidedSampler
from stitchvm.samplers.plain import PlainSampler
from stitchvm.samplers.svdd import SVDD
from stitchvm.values.base import Bindable, Value
from stitchvm.values.stitched import StitchedValue
from stitchvm.values.terminal import TerminalValue

__all__ = ["METHODS", "Sampled", "load_pipeline", "load_value", "sample"]

METHODS: dict[str, type[Sampler]] = {
    "plain": PlainSampler,
    "guidance": GuidedSampler,
    "fk": FKSteering,
    "best_of_n": BestOfN,
    "svdd": SVDD,
}


@dataclass
class Sampled:
    """What `sample` returns.

    Attributes:
        images: One PIL image for every prompt.
        samples: The sampler's own answer: latents, all particles and their values, records of the steps, calls.
    """

    images: list[Any]
    samples: Samples


def load_pipeline(path: str | Path, **options: Any) -> Any:
    """Returns a diffusers pipeline; `diffusers.DiffusionPipeline.from_pretrained` that knows `world:NAME`, too.

    Arguments:
        path: A folder, a hub id, "world:sd3", "world:sd3_large" or "world:flux".
        options: Whatever `from_pretrained` takes.

    Raises:
        FileNotFoundError: If the embedded world has no such pipeline.
    """
    from diffusers import DiffusionPipeline

    name = os.fspath(path)
    return DiffusionPipeline.from_pretrained(
        resolve(name) if name.startswith("world:") else name, **options
    )


def load_value(path: str | Path, pipe: Any = None, reward: Reward | None = None) -> StitchedValue:
    """Returns a value model as a value, frozen; with a pipeline, for its latents, on its device.

    A value model that was distilled on the pipeline's transformer runs on it, without a second copy; that of another
    backbone on the same latent space brings its own blocks along.

    Arguments:
        path: What `stitchvm fit` wrote (`value_model/` of a run), `world:NAME` or a hub id.
        pipe: The `StableDiffusion3Pipeline` or `FluxPipeline`, or a `Generator`.
        reward: An already loaded reward to share.

    Raises:
        FileNotFoundError: If there is no value model at `path`.
        ValueError: If it reads another latent space, or the pipeline or the reward does not fit.
    """
    generator = None if pipe is None else as_generator(pipe)
    return StitchedValue.from_pretrained(path, generator=generator, reward=reward)


def sample(
    pipe: Any,
    prompts: str | Sequence[str],
    value: Bindable | str | Path | None = None,
    method: str | Sampler = "plain",
    *,
    seeds: int | Sequence[int] = 0,
    height: int | None = None,
    width: int | None = None,
    max_sequence_length: int | None = None,
    final_value: Bindable | None = None,
    on_step: Callable[[Record], None] | None = None,
    **options: Any,
) -> Sampled:
    """Samples one image for every prompt.

    Arguments:
        pipe: The `StableDiffusion3Pipeline` or `FluxPipeline`, or a `Generator`, which keeps prompts' embeddings.
        prompts: The P prompts, or one.
        value: The value that steers, any of the library's, or the path of a value model.
        method: "plain", "guidance", "fk", "best_of_n" or "svdd", or a sampler of `stitchvm.samplers`.
        seeds: One seed per prompt; a number s means s, s + 1, …. A sample depends on its prompt and seed alone.
        height: The height in pixels; the pipeline's default size if neither is given.
        width: The width in pixels; as the height if it is not given.
        max_sequence_length: The T5 length; the pipeline's default if None.
        final_value: The value at t = 0 by which one of several particles is chosen; by default the clean reward of
            `value` on the decoded image, if it has one.
        on_step: Is called with the record of every step.
        options: The method's own, see the samplers' classes: `num_steps`, `guidance_scale`, `nu`, `micro_batch`, … of
            all; `strength`, `mode`, … of guidance; `particles`, `proposals`, `lam`, … of fk; `particles` of best_of_n.

    Raises:
        ValueError: If the method or an option is unknown, the value does not go with the method, a size is not the
            model's, or a value is not finite.
    """
    sampler = method if isinstance(method, Sampler) else make_sampler(method, options)
    if sampler is method and options:
        raise ValueError(
            f"the sampler is given, and beside it the options {sorted(options)}: set them where it is made."
        )
    generator = as_generator(pipe, max_sequence_length)
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if isinstance(value, (str, Path)):
        value = load_value(value, generator)
    if final_value is None and isinstance(value, Value) and not isinstance(value, TerminalValue):
        final_value = TerminalValue(generator.vae, value.reward)
    samples = sampler(
        generator,
        texts,
        value,
        seeds=seeds,
        latent_size=latent_size(generator, height, width),
        final_value=final_value,
        on_step=on_step,
    )
    return Sampled(decoded(generator, samples.latents, sampler.micro_batch), samples)


def as_generator(pipe: Any, max_sequence_length: int | None = None) -> Generator:
    """Returns a generator around a pipeline, or the generator itself.

    Raises:
        ValueError: If it is no such pipeline, or a generator with another T5 length than the asked one.
    """
    if not isinstance(pipe, Generator):
        return Generator.from_pipeline(pipe, text_tokens=max_sequence_length)
    if max_sequence_length not in (None, pipe.text_tokens):
        raise ValueError(
            f"max_sequence_length = {max_sequence_length}, but the generator has {pipe.text_tokens} text tokens: leave "
            "it out, or make the generator with that number."
        )
    return pipe


def make_sampler(method: str, options: dict[str, Any]) -> Sampler:
    """Returns the sampler of a method.

    Raises:
        ValueError: If the method or an option is unknown, naming those there are.
    """
    if method not in METHODS:
        raise ValueError(f"method = {method!r}: expected one of {', '.join(METHODS)}.")
    known: dict[str, None] = {}
    for cls in METHODS[method].__mro__:
        if issubclass(cls, Sampler) and "__init__" in vars(cls):
            known |= dict.fromkeys(inspect.signature(cls).parameters)
    known.pop("kwargs", None)
    if unknown := sorted(options.keys() - known.keys()):
        raise ValueError(f"the method {method!r} has no {unknown}: it has {', '.join(known)}.")
    return METHODS[method](**options)


def latent_size(generator: Any, height: int | None, width: int | None) -> tuple[int, int] | None:
    """Returns the latent height and width of images of a size in pixels; None for the model's own.

    Raises:
        ValueError: If the size is no multiple of a token's, or too large for the generator.
    """
    if height is None and width is None:
        return None
    sides = (height or width or 0, width or height or 0)
    step = generator.vae.factor * generator.patch
    if any(side < step or side % step for side in sides):
        near = [max(round(side / step), 1) * step for side in sides]
        raise ValueError(
            f"height {sides[0]} and width {sides[1]}: expected multiples of {step} for {generator.id}, such as "
            f"{near[0]} and {near[1]}."
        )
    size = sides[0] // generator.vae.factor, sides[1] // generator.vae.factor
    generator.check_size(size)
    return size


@torch.no_grad()
def decoded(generator: Any, latents: Tensor, micro_batch: int | None = None) -> list[Any]:
    """Returns the PIL images of clean latents (P, C, H, W).

    Arguments:
        generator: The generator whose latents they are.
        latents: The latents.
        micro_batch: How many are decoded at a time; all at once by default.
    """
    from PIL import Image

    images = []
    for part in latents.split(micro_batch or len(latents)):
        pixels = (255 * generator.vae.decode(part, clamp=True)).round().to("cpu", torch.uint8)
        images += [Image.fromarray(one.permute(1, 2, 0).numpy()) for one in pixels]
    return images
