r"""Values in diffusers' own pipelines, by `callback_on_step_end`: no step loop of ours.

    pipe(prompts, callback_on_step_end=GuidanceCallback(value, prompts, strength=0.5))

**Guidance.** The gradient is taken at the latents a step starts from and added to those it ends at, as `GuidedSampler`
does. The callback sees latents after each step, so that it takes the gradient for step k + 1 there and adds it one call
later; before the first step it sees none, and the first is not guided: its latents are noise, of which the true value
does not depend on z.

**FK steering.** `num_images_per_prompt` are the particles of a prompt, row p·N + n. After the steps of S_FK they are
resampled in place. Stock pipelines take one proposal per particle (M = 1), and their step must be random: with an ODE
resampled particles stay identical. `stitchvm.samplers.scheduler` gives them steps of the SDE.

Values see float32 latents (B, C, H, W), those of FLUX unpacked, and the level of the pipeline's own scheduler.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stitchvm.backbones.flux import pack, unpack
from stitchvm.samplers.base import Noise, Record, Run, Samples, value_streams
from stitchvm.samplers.field import Field
from stitchvm.samplers.fk import FKSteering
from stitchvm.samplers.guidance import GuidedSampler, rms
from stitchvm.samplers.scheduler import is_random
from stitchvm.samplers.sde import Kernel, check_levels
from stitchvm.values.base import Bindable

__all__ = ["FKCallback", "GuidanceCallback"]


class _Pipeline:
    """What a field asks of a generator, where the pipeline runs the network itself: nothing."""

    def encode_prompts(self, prompts: Sequence[str]) -> None:
        """Returns None."""


class _Callback(ABC):
    """What both callbacks share: the value of the pipeline's latents for their prompts.

    Arguments:
        value: The value, any of the library's, on the pipeline's device.
        prompts: The prompts that the pipeline is given, in their order.
        seed: Seeds values that roll out, and resampling.
        height: The height in pixels. Give height and width exactly where the pipeline is given them: the packed latents
            of FLUX do not tell their shape.
        width: The width in pixels.
        micro_batch: The latents of one call of the value; all at once by default.

    Attributes:
        records: What happened at each step where the value was asked, of the last run.
    """

    # so that diffusers' MultiPipelineCallbacks takes several of them
    tensor_inputs = ("latents",)

    def __init__(
        self,
        value: Bindable,
        prompts: str | Sequence[str],
        seed: int = 0,
        height: int | None = None,
        width: int | None = None,
        micro_batch: int | None = None,
    ) -> None:
        self.value, self.micro_batch, self.seed = value, micro_batch, seed
        self.prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not self.prompts:
            raise ValueError("there are no prompts: give those that the pipeline is given.")
        self.height, self.width = height, width
        self.records: list[Record] = []

    @torch.no_grad()
    def __call__(
        self, pipe: Any, step: int, timestep: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Is called by the pipeline after every step, and returns what it was given, with the latents it made.

        Raises:
            ValueError: If the pipeline does not show its latents, or as the class says.
        """
        if "latents" not in callback_kwargs:
            raise ValueError(
                f"the pipeline shows the callback {sorted(callback_kwargs)}, but no latents: leave "
                "callback_on_step_end_tensor_inputs out, or put 'latents' into it."
            )
        latents = callback_kwargs["latents"]
        if step == 0:
            self.records = []
            self._run = self._start(pipe, latents)
            self._begin(pipe, self._run)
        self._run.field.step = step
        changed = self._after(self._run, step, latents)
        return callback_kwargs if changed is None else callback_kwargs | {"latents": changed}

    @abstractmethod
    def _begin(self, pipe: Any, run: Run) -> None:
        """Prepares a run, after the pipeline's first step."""

    @abstractmethod
    def _after(self, run: Run, step: int, latents: Tensor) -> Tensor | None:
        """Returns the latents in place of those the pipeline made, or None to leave them."""

    def _start(self, pipe: Any, latents: Tensor) -> Run:
        """Returns a run on the pipeline's latents, levels and prompts."""
        count, rows = len(self.prompts), len(latents)
        if rows % count:
            raise ValueError(
                f"the pipeline has {rows} latents, but the callback {count} prompts: give it the prompts that the "
                "pipeline is given (num_images_per_prompt may be any)."
            )
        self._size = self._latent_size(pipe, latents)
        streams = value_streams(self._seeds)
        bound = self.value.bind(self.prompts, generator=streams)
        field = Field(_Pipeline(), self.prompts, None, bound, self.micro_batch, share_prefix=False)
        noise = Noise(self._seeds, rows // count, (), latents.device)
        row = torch.arange(count).repeat_interleave(rows // count)
        return Run(field, check_levels(pipe.scheduler.sigmas), noise, row, latents)

    @property
    def _seeds(self) -> list[int]:
        return [self.seed + place for place in range(len(self.prompts))]

    def _latent_size(self, pipe: Any, latents: Tensor) -> tuple[int, int]:
        if latents.ndim == 4:
            return latents.shape[2], latents.shape[3]
        # as FluxPipeline does: to whole tokens of 2 x 2
        sides = (self.height, self.width)
        default = pipe.default_sample_size * pipe.vae_scale_factor
        height, width = (2 * ((side or default) // (2 * pipe.vae_scale_factor)) for side in sides)
        if height * width != 4 * latents.shape[1]:
            raise ValueError(
                f"the pipeline has {latents.shape[1]} packed latents, but the callback expects {height // 2} x "
                f"{width // 2}: give it the height and width in pixels that the pipeline is given."
            )
        return height, width

    def _seen(self, latents: Tensor) -> Tensor:
        """Returns latents as values see them, float32 with shape (B, C, H, W)."""
        if latents.ndim == 3:
            latents = unpack(latents, (self._size[0] // 2, self._size[1] // 2))
        return latents.float()

    def _unseen(self, z: Tensor, latents: Tensor) -> Tensor:
        """Returns z in the layout and dtype of the pipeline's latents."""
        return (pack(z) if latents.ndim == 3 else z).to(latents.dtype)


class GuidanceCallback(_Callback):
    """Adds the gradient of a value to the pipeline's latents after each step.

    Arguments:
        value: The value; differentiable.
        prompts: The prompts that the pipeline is given.
        strength: What the update is multiplied by; 0 leaves the pipeline's latents as they are.
        mode: How the gradient is scaled: "raw", "unit_norm", "abs_reward" or "exact", as for `GuidedSampler`.
        window: The first and last share of the steps in which guidance acts.
        levels: The lowest and highest noise level at which it acts.
        every: It acts at every so many of those steps.
        kwargs: `seed`, `height`, `width`, `micro_batch`, as for both callbacks (`height` and `width` exactly where the
            pipeline is given them).

    Raises:
        ValueError: If a setting is out of range, or the mode needs what a callback cannot see.
    """

    def __init__(
        self,
        value: Bindable,
        prompts: str | Sequence[str],
        strength: float = 1.0,
        mode: str = "raw",
        window: tuple[float, float] = (0.0, 1.0),
        levels: tuple[float, float] = (0.0, 1.0),
        every: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(value, prompts, **kwargs)
        if mode == "cfg_rms":
            raise ValueError(
                "the mode 'cfg_rms' measures guidance by u(prompt) − u(∅), which pipelines show no callback: take "
                "'raw', 'unit_norm' or 'abs_reward', or stitchvm.sample."
            )
        self.sampler = GuidedSampler(strength, mode, window, levels, every, nu="ode")

    def _begin(self, pipe: Any, run: Run) -> None:
        kernel = getattr(pipe.scheduler, "kernel", None)
        if self.sampler.mode == "exact" and kernel is None and is_random(pipe.scheduler):
            raise ValueError(
                "the mode 'exact' is for steps of the ODE or of the SDE (26), and stochastic_sampling draws others: "
                "take stitchvm.sde_scheduler, or another mode."
            )
        self.sampler.kernel = kernel or Kernel("ode")
        self.sampler.begin(run)
        acts = run.memory["acts"] - {0}
        if self.sampler.strength and not acts:
            raise ValueError(
                "guidance would act at the first step only, at which a callback cannot: widen window or levels, or "
                "take more steps."
            )
        run.memory["acts"] = acts
        self._pending: Tensor | None = None

    def _after(self, run: Run, step: int, latents: Tensor) -> Tensor | None:
        z, changed = self._seen(latents), None
        if self._pending is not None:
            z = z + self._pending
            run.field.check(z.flatten(1), "latent", run.sigmas[step], run.row)
            changed, self._pending = self._unseen(z, latents), None
        k = step + 1
        if k in run.memory["acts"]:
            v, gradient, _ = run.field.value_gradient(z, run.sigmas[k], run.row)
            self._pending = self.sampler.update(run, k, v, gradient)
            info = {"gradient_rms": rms(gradient), "update_rms": rms(self._pending)}
            self.records.append(Record(k + 1, float(run.sigmas[k]), run.grouped(v), info))
        return changed


class FKCallback(_Callback):
    """Resamples the pipeline's images of each prompt, its particles, by a value: FK steering with M = 1.

    Arguments:
        value: The value.
        prompts: The prompts that the pipeline is given, with `num_images_per_prompt=particles`.
        particles: The number N of particles of a prompt.
        final_value: The value at σ = 0 by which the best particle is told; `value` by default. Give the terminal
            reward where `value` is an estimate.
        seed: Seeds the resampling.
        height: The height in pixels, exactly where the pipeline is given it.
        width: The width in pixels, exactly where the pipeline is given it.
        micro_batch: The latents of one call of the value; all at once by default.
        options: `potential`, `lam`, `lam_per`, `resampling`, `resample_every`, `resample_from`, `resample_to`,
            `ess_threshold` and `final`, as for `stitchvm.samplers.fk.FKSteering`.

    Attributes:
        samples: The final particles, their values and weights, and which is chosen, of the last run.

    Raises:
        ValueError: When the pipeline runs, if a setting is out of range, its step is deterministic, or it has another
            number of images.
    """

    def __init__(
        self,
        value: Bindable,
        prompts: str | Sequence[str],
        particles: int = 4,
        final_value: Bindable | None = None,
        seed: int = 0,
        height: int | None = None,
        width: int | None = None,
        micro_batch: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(value, prompts, seed, height, width, micro_batch)
        if odd := sorted({"proposals", "score", "nu", "nu_scale"} & options.keys()):
            raise ValueError(
                f"{odd} cannot be chosen in a stock pipeline, which takes its own steps: use stitchvm.sample, and "
                "stitchvm.sde_scheduler for the noise."
            )
        self.particles, self.final_value, self.options = particles, final_value, options
        self.samples: Samples | None = None

    def best(self, images: Sequence[Any]) -> list[Any]:
        """Returns the chosen image of every prompt from all that the pipeline returned.

        Raises:
            ValueError: If the pipeline has not run, or these are not its images.
        """
        if self.samples is None or len(images) != len(self.prompts) * self.particles:
            raise ValueError(
                f"{len(images)} images: expected the {len(self.prompts) * self.particles} that the pipeline returned "
                "in the run with this callback."
            )
        chosen = self.samples.chosen.tolist()
        return [images[place * self.particles + n] for place, n in enumerate(chosen)]

    def _begin(self, pipe: Any, run: Run) -> None:
        self.samples = None
        if len(run.z) != len(self.prompts) * self.particles:
            raise ValueError(
                f"the pipeline makes {len(run.z)} images of {len(self.prompts)} prompts, but there are to be "
                f"{self.particles} particles of each: pass it num_images_per_prompt={self.particles}."
            )
        if self.particles > 1 and not is_random(pipe.scheduler):
            raise ValueError(
                "the pipeline's scheduler is deterministic, so that resampled particles would stay identical: "
                "pipe.scheduler = stitchvm.sde_scheduler(pipe.scheduler), or FlowMatchEulerDiscreteScheduler."
                "from_config(pipe.scheduler.config, stochastic_sampling=True)."
            )
        steps = len(run.sigmas) - 1
        self.sampler = FKSteering(self.particles, num_steps=steps, **self.options)
        self.sampler.begin(run)

    def _after(self, run: Run, step: int, latents: Tensor) -> Tensor | None:
        k, changed = step + 1, None
        if k in self.sampler.resampling_steps:
            v, _ = run.field.value(self._seen(latents), run.sigmas[k], run.row)
            run.z = latents  # as they are, so that particles that stay lose no digit
            values, came_from, info = self.sampler.resample(run, run.grouped(v))
            self.records.append(Record(k, float(run.sigmas[k]), values, info, came_from))
            latents = changed = run.z
        if k == len(run.sigmas) - 1:
            self._finish(run, self._seen(latents))
        return changed

    def _finish(self, run: Run, z: Tensor) -> None:
        """Values the final particles, and chooses one of each prompt."""
        value = self.final_value or self.value
        run.field.ask(value.bind(self.prompts, generator=value_streams(self._seeds)))
        final = run.grouped(run.field.value(z, run.sigmas[-1], run.row)[0])
        chosen, particles = self.sampler.choose(run, final), run.grouped(z)
        place = torch.arange(len(particles), device=z.device)
        weights = self.sampler.weigh(run, final)
        self.samples = Samples(
            particles[place, chosen], particles, chosen, final, self.records, {}, weights
        )
