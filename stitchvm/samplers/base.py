"""The step loop over explicit levels that every sampler shares, and what it returns.

Rows are particles: P prompts × N particles, row p·N + n. Every particle has a random stream of its own, keyed by its
prompt's seed and n, for its first latent and for the noise of its steps; so a sample does not depend on the
batch it is in nor on the number of devices (up to the rounding of batched kernels), and particle 0 of any method begins
where the plain sampler begins.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from operator import index
from typing import Any

import torch
from torch import Tensor

from stitchvm.backbones.prompts import listed
from stitchvm.deferral import Deferred, sent
from stitchvm.randomness import keyed_generator
from stitchvm.samplers.field import Field, Shared
from stitchvm.samplers.sde import Kernel, check_levels
from stitchvm.schedule import sigma_grid
from stitchvm.values.base import Bindable


@dataclass
class Record:
    """What happened at a step, for progress bars, plots and `samples.jsonl`.

    Attributes:
        step: The number of steps taken, 1 … N.
        sigma: The level at which values were taken.
        values: The values of the particles with shape (P, N), or None if none were asked for.
        info: Further numbers by name, each with shape (P,): effective sample size, gradient norms, …
        ancestors: Where particles were resampled, which one each comes from, with shape (P, N); values and info are
            those after resampling.
    """

    step: int
    sigma: float
    values: Tensor | None = None
    info: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    ancestors: Tensor | None = None


@dataclass
class Samples:
    """What a sampler returns.

    Attributes:
        latents: The chosen sample of every prompt, with shape (P, C, H, W).
        particles: All final particles, with shape (P, N, C, H, W).
        chosen: Which particle was chosen, with shape (P,).
        final_values: The values by which they were chosen, with shape (P, N), or None.
        records: The steps.
        calls: Rows of network calls, by kind (`Field.calls`).
        log_weights: The particles' normalised log-weights, with shape (P, N), or None if all count the same.
    """

    latents: Tensor
    particles: Tensor
    chosen: Tensor
    final_values: Tensor | None
    records: list[Record]
    calls: dict[str, int]
    log_weights: Tensor | None = None


class Noise:
    """Standard normal noise of P × N particles, each from its own stream.

    Arguments:
        seeds: One seed per prompt.
        particles: The number N.
        shape: The shape (C, H, W) of a latent.
        device: Where the noise goes; it is drawn on the CPU, the same for every device.
    """

    def __init__(
        self, seeds: Sequence[int], particles: int, shape: Sequence[int], device: torch.device
    ) -> None:
        self.shape, self.device, self.seeds = tuple(shape), device, list(seeds)
        self._streams = [
            keyed_generator("sampling", seed, n) for seed in seeds for n in range(particles)
        ]
        self._resampling = [keyed_generator("resampling", seed) for seed in seeds]

    def draw(self, proposals: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns noise with shape (P·N, proposals, C, H, W)."""
        # whatever the default dtype: in bfloat16, as under the precision bf16-true, it is other noise
        shape, kind = (proposals, *self.shape), torch.float32
        rows = [torch.randn(shape, generator=one, dtype=kind) for one in self._streams]
        return sent(torch.stack(rows), self.device).to(dtype)

    def uniforms(self, n: int) -> Tensor:
        """Returns uniforms in [0, 1) with shape (P, n), float64 on the CPU, from streams of their own."""
        return torch.stack(
            [torch.rand(n, generator=one, dtype=torch.float64) for one in self._resampling]
        )


@dataclass
class Run:
    """A sampling under way: what `Sampler.advance` reads and changes.

    Attributes:
        field: Velocity and value.
        sigmas: The levels, float32 with shape (N_steps + 1,), on the CPU.
        noise: The particles' random streams.
        row: The position of each particle's prompt, with shape (P·N,).
        z: The latents at the present level, with shape (P·N, C, H, W).
        prefix: What the value, if it was taken at (z, level), left for the velocity there (a prefix of the null-text
            branch, or a velocity), else None.
        memory: What a sampler keeps between steps.
    """

    field: Field
    sigmas: Tensor
    noise: Noise
    row: Tensor
    z: Tensor
    prefix: Shared | None = None
    memory: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def prompts(self) -> int:
        """The number P of prompts."""
        return len(self.field.prompts)

    def velocity(self, k: int) -> tuple[Tensor, Tensor | None]:
        """Returns u at the present latents and level k, from the prefix if there is one, and u(prompt) − u(∅)."""
        prefix, self.prefix = self.prefix, None
        return self.field.velocity(self.z, self.sigmas[k], self.row, prefix)

    def propose(
        self, kernel: Kernel, k: int, u: Tensor, proposals: int = 1, drift: Tensor | None = None
    ) -> Tensor:
        """Returns draws of z_{k+1} from the kernel, with shape (P·N, proposals, C, H, W).

        Arguments:
            kernel: The transition kernel.
            k: The step.
            u: The velocity at the present latents.
            proposals: How many; they are all the same where the step has no noise.
            drift: What is added to the drift.
        """
        mean = kernel.mean(self.z, u, k, self.sigmas, drift)[:, None]
        std = kernel.std(k, self.sigmas)
        if std == 0:
            return mean.expand(-1, proposals, *mean.shape[2:])
        return mean + std * self.noise.draw(proposals, mean.dtype)

    def grouped(self, x: Tensor) -> Tensor:
        """Returns what rows have, x (P·N, ...), by prompt: (P, N, ...)."""
        return x.unflatten(0, (self.prompts, -1))


class Sampler(ABC):
    """The loop over levels; a subclass says what a step does.

    Arguments:
        num_steps: The number of steps.
        guidance_scale: g; the generator's own by default.
        grid: "pipeline" (the generator's own scheduler), or "linear", "single", "double", "flux" of
            `sigma_grid` with `shift`.
        shift: The shift of those grids.
        nu: The noise ν_t of the sampling SDE, a name of `stitchvm.samplers.sde`.
        nu_scale: What it is multiplied by.
        micro_batch: The rows of one network call; all at once by default. Lower it when memory runs out.
        share_prefix: Whether the velocity goes on from what the value has run of it, where it can.

    Attributes:
        particles: The number N of particles of a prompt.
        wants_value: Whether it cannot do without a value.
    """

    particles: int = 1
    wants_value: bool = True

    def __init__(
        self,
        num_steps: int = 40,
        guidance_scale: float | None = None,
        grid: str = "pipeline",
        shift: float = 3.0,
        nu: str = "linear_sde",
        nu_scale: float = 1.0,
        micro_batch: int | None = None,
        share_prefix: bool = True,
    ) -> None:
        if num_steps < 1:
            raise ValueError(f"num_steps = {num_steps}: expected at least 1 step.")
        if micro_batch is not None and micro_batch < 1:
            raise ValueError(f"micro_batch = {micro_batch}: expected at least 1, or null for all.")
        if grid != "pipeline":
            sigma_grid(num_steps, shift=shift, kind=grid)  # raises for an unknown kind
        self.num_steps, self.guidance_scale = num_steps, guidance_scale
        self.grid, self.shift = grid, shift
        self.kernel = Kernel(nu, nu_scale)
        self.micro_batch, self.share_prefix = micro_batch, share_prefix

    @property
    def clean_only(self) -> bool:
        """Whether it asks its value about clean latents only, at σ = 0, so that a terminal reward will do."""
        return False

    @abstractmethod
    def advance(self, run: Run, k: int) -> Record:
        """Takes step k, from level k to k + 1: changes `run.z` (and `run.prefix`)."""

    def begin(self, run: Run) -> None:
        """Prepares what it keeps between steps, before the first; nothing by default."""
        run.memory.clear()

    def choose(self, run: Run, final: Tensor | None) -> Tensor:
        """Returns which particle of every prompt is the sample, with shape (P,); the best by default.

        Arguments:
            run: The finished run.
            final: The final values with shape (P, N), or None.
        """
        if final is None:
            return torch.zeros(run.prompts, dtype=torch.long, device=run.z.device)
        return final.argmax(dim=1)

    def weigh(self, run: Run, final: Tensor | None) -> Tensor | None:
        """Returns the final particles' normalised log-weights with shape (P, N); None, for equal, by default."""
        return None

    def sigmas(self, generator: Any, latent_size: tuple[int, int]) -> Tensor:
        """Returns the levels of a run, float32 on the CPU."""
        if self.grid == "pipeline":
            return check_levels(generator.sigmas(self.num_steps, latent_size))
        return sigma_grid(self.num_steps, shift=self.shift, kind=self.grid)

    @torch.no_grad()
    def __call__(
        self,
        generator: Any,
        prompts: Sequence[str],
        value: Bindable | None = None,
        *,
        seeds: int | Sequence[int] = 0,
        latent_size: tuple[int, int] | None = None,
        final_value: Bindable | None = None,
        on_step: Callable[[Record], None] | None = None,
    ) -> Samples:
        """Samples one latent for every prompt.

        Arguments:
            generator: The generator (`stitchvm.generator.Generator`).
            prompts: The P prompts.
            value: The value that steers, any of the library's.
            seeds: One seed per prompt; a number s means s, s + 1, ….
            latent_size: The latent height and width; the generator's default size by default.
            final_value: The value at t = 0 by which the final particle is chosen; `value` by default. Give the
                terminal reward where `value` is an estimate.
            on_step: Is called with the record of every step; on a GPU before its numbers are known to be finite.

        Raises:
            ValueError: If the sampler and the value do not go together, the prompts are one text, numbers do not
                match, or a value or gradient is not finite (naming step, level, prompt and estimator).
        """
        prompts = listed(prompts) or []
        seeds = one_each(seeds, len(prompts))
        self._check(prompts, seeds, value)
        size = latent_size or generator.default_size
        device = getattr(generator, "device", torch.device("cpu"))
        bound = None if value is None else value.bind(prompts, generator=value_streams(seeds))
        field_ = Field(
            generator, prompts, self.guidance_scale, bound, self.micro_batch, self.share_prefix
        )
        noise = Noise(seeds, self.particles, (generator.latent_channels, *size), device)
        # on the CPU: looking a row's prompt up would wait for the device at every step
        row = torch.arange(len(prompts)).repeat_interleave(self.particles)
        sigmas = self.sigmas(generator, size)
        run = Run(field_, sigmas, noise, row, noise.draw()[:, 0] * sigmas[0])
        self.begin(run)
        records = []
        field_.deferred = checks = Deferred()
        for k in range(len(sigmas) - 1):
            field_.step, before = k, len(checks)
            with checks.coming_first():
                records.append(self.advance(run, k))
            checks.settle(keep=len(checks) - before)  # of the steps before this one
            if on_step is not None:
                on_step(records[-1])
        with checks.coming_first():
            samples = self._finish(run, records, final_value or value, seeds)
        checks.settle()
        return samples

    def _finish(
        self, run: Run, records: list[Record], value: Bindable | None, seeds: Sequence[int]
    ) -> Samples:
        final = None
        if self.particles > 1 and value is not None:
            run.field.ask(value.bind(run.field.prompts, generator=value_streams(seeds)))
            final = run.grouped(run.field.value(run.z, run.sigmas[-1], run.row)[0])
        particles, chosen = run.grouped(run.z), self.choose(run, final)
        latents = particles[torch.arange(len(particles), device=particles.device), chosen]
        calls, weights = dict(run.field.calls), self.weigh(run, final)
        return Samples(latents, particles, chosen, final, records, calls, weights)

    def _check(self, prompts: list[str], seeds: list[int], value: Bindable | None) -> None:
        if not prompts:
            raise ValueError("there are no prompts: give at least one.")
        if len(seeds) != len(prompts):
            raise ValueError(
                f"{len(seeds)} seeds for {len(prompts)} prompts: expected one each, or a single number to count from."
            )
        if self.wants_value and value is None:
            raise ValueError(
                f"{type(self).__name__} asks a value, but none is configured: give `value`, or take PlainSampler."
            )


def one_each(seeds: Any, count: int) -> list[int]:
    """Returns one seed per prompt; plain numbers, since a stream is keyed by digits, not by "tensor(3)"."""
    if isinstance(seeds, Integral):
        seeds = range(int(seeds), int(seeds) + count)
    return [index(seed) for seed in seeds]


def value_streams(seeds: Sequence[int]) -> list[torch.Generator]:
    """Returns the random streams of values that roll out, one per prompt."""
    return [keyed_generator("value", seed) for seed in seeds]
