"""A pipeline that is in memory already: what it is, and its text encoders, run by its own `encode_prompt`."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from stitchvm.backbones.text import FAMILIES, Condition, TextEncoders


class PipelineEncoders(TextEncoders):
    """The encoders of a loaded `StableDiffusion3Pipeline` or `FluxPipeline`; they stay the pipeline's.

    Arguments:
        pipe: The pipeline.
        family: "sd3" or "flux".
        num_tokens: The length T5's tokens are padded or cut to (the pipelines' `max_sequence_length`).
    """

    def __init__(self, pipe: Any, family: str, num_tokens: int) -> None:
        super().__init__("", family, num_tokens, pipe.transformer.dtype)
        self.pipe = pipe

    @property
    def on_disk(self) -> bool:
        """Whether what they say can be kept in a file: not where they were changed in memory, say by LoRA."""
        return False

    def with_tokens(self, num_tokens: int) -> PipelineEncoders:
        """Returns the same encoders for another length."""
        return PipelineEncoders(self.pipe, self.family, num_tokens)

    def free(self) -> None:
        """Does nothing: they are the pipeline's."""

    @torch.no_grad()
    def __call__(
        self, prompts: Sequence[str], device: torch.device | str = "cpu", keep: bool = True
    ) -> Condition:
        """Returns the condition of prompts, where the pipeline runs.

        Arguments:
            prompts: The B prompts, encoded in one batch.
            device: Not used: encoders run where the pipeline runs.
            keep: Not used: they stay in memory.

        Raises:
            ValueError: If there are no prompts, or the pipeline was loaded without an encoder it needs.
        """
        texts = list(prompts)
        if not texts:
            raise ValueError("no prompts to encode; give at least one")
        if self.pipe.text_encoder is None or self.pipe.text_encoder_2 is None:
            raise ValueError(
                f"this {type(self.pipe).__name__} was loaded without text encoders, so it cannot encode prompts: load "
                "it with them"
            )
        options: dict[str, Any] = {"prompt_2": texts, "max_sequence_length": self.num_tokens}
        with torch.autocast(self.pipe.transformer.device.type, enabled=False):
            if self.family == "sd3":
                options |= {"prompt_3": texts, "do_classifier_free_guidance": False}
                tokens, _, pooled, _ = self.pipe.encode_prompt(texts, **options)
            else:
                tokens, pooled, _ = self.pipe.encode_prompt(texts, **options)
        return Condition(tokens, pooled)

    def ahead(
        self, prompts: Sequence[str], device: torch.device | str = "cpu"
    ) -> Iterator[Condition]:
        """Yields the condition of each prompt by itself, on the CPU; the encoders stay the pipeline's."""
        for prompt in prompts:
            yield self([prompt]).to("cpu")


def read_pipeline(pipe: Any) -> tuple[str, str, float]:
    """Returns a pipeline's family, what it was loaded from, and the guidance scale its call has by default.

    Raises:
        ValueError: If its transformer is of neither family, its scheduler is not the flow's Euler scheduler, or its
            networks are moved between CPU and GPU while it runs.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    transformer: Any = getattr(pipe, "transformer", None)
    family = FAMILIES.get(type(transformer).__name__)
    if family is None:
        raise ValueError(
            f"a {type(pipe).__name__} with a {type(transformer).__name__} came, expected a StableDiffusion3Pipeline or "
            "a FluxPipeline (compile a transformer in place, with `pipe.transformer.compile()`)"
        )
    if not isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler):
        raise ValueError(
            f"the pipeline has a {type(pipe.scheduler).__name__}, expected a FlowMatchEulerDiscreteScheduler: "
            "pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)"
        )
    if any(hasattr(network, "_hf_hook") for network in (transformer, pipe.vae)):
        raise ValueError(
            "the pipeline's networks are offloaded to the CPU by hooks, which see whole networks only, and a value "
            'runs some of their blocks: call pipe.remove_all_hooks(), then pipe.to("cuda")'
        )
    scale = float(inspect.signature(type(pipe).__call__).parameters["guidance_scale"].default)
    if family == "flux" and not transformer.config.guidance_embeds:
        scale = 1.0  # the default of true_cfg_scale
    return family, str(getattr(pipe, "name_or_path", None) or type(pipe).__name__), scale
