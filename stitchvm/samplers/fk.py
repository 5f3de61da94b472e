r"""Feynman–Kac steering with proposal scaling, Algorithm 1 of the paper:

    z̄^{n,m}_{k+1} ~ p(· | z^n_k),  m = 1 … M;   z̄^n_{k+1} = the one of highest V(·, σ_{k+1})    at steps S_M
    a^n ~ Multinomial(G^1 … G^N);               z^n_{k+1} = z̄^{a^n}_{k+1}                       at steps S_FK, Eq. (9)

Steps are numbered 1 … K by how many have been taken. The paper's S_FK is every 4th step of 8 … 32 (of 40, SD 3.5) or
of 6 … 22 (of 28, FLUX): the default, 20 % to 80 % of the run. Its S_M is every step of the first 40 %.

**What is scored.** `score="child"`: the value of z̄_{k+1} at σ_{k+1}, as in Eq. (9). A value that shares work with the
next velocity (a stitched value: the null-text prefix; a Tweedie value: the velocity) has it done once, and handed on
to the particles that were chosen. So with M = 1 a Tweedie value of the guided velocity ("cfg") costs no more passes of
the generator than plain sampling. `score="parent"`: the clean reward of the denoised *parent* z_k − σ_k u(z_k), as
in the published code of FK steering (give a terminal value). It costs as little, but is a step stale: children of one
parent are not told apart.

**What M does.** Each argmax moves particles up by the spread of their kernel, and no weight corrects for it: the
result is tilted more than λ says, and less diverse. That is the paper's algorithm; with M = 1 the weighted particles
converge to the tilted distribution as N grows, whatever the values on the way.

**At the end.** Values on the way are hints; the sample is chosen by the final value r(z_0). `final="best"`: the
highest, as in the published code. "sample": a draw by the weights after the last correction (see `potentials`), hence
from the tilted distribution as N grows. "first": particle 0, a draw by the weights of the last resampling. All
particles and their weights stay in `Samples`. No value is asked at σ = 0 on the way, unless `resample_to` says so by
naming the last step, and the resampling falls on it. The last step has no noise, hence one proposal.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stitchvm.deferral import sent
from stitchvm.path import FlowPath
from stitchvm.samplers.base import Record, Run, Sampler
from stitchvm.samplers.potentials import Weights
from stitchvm.samplers.resampling import (
    ancestors,
    draw,
    effective_sample_size,
    normalise,
    uniforms_needed,
)

FINALS = ("best", "sample", "first")
SCORES = ("child", "parent")


class FKSteering(Sampler):
    """Particles that are resampled, and proposals that are chosen, by any value.

    Arguments:
        particles: The number N of particles of a prompt.
        proposals: The number M of proposals per particle at the steps of `proposal_share`.
        potential: "diff", "max", "add" or "rt" (see `potentials`).
        lam: λ ≥ 0. At 0 nothing is resampled: with M = 1 every particle is the plain sampler's, of which `final` still
            takes one; proposals are chosen by their value whatever λ.
        lam_per: "value", or "spread" for λ in units of the values' spread over the particles (see `potentials`).
        score: "child" or "parent" (see above).
        resampling: "systematic", or "multinomial" as the paper says (more variance).
        resample_every: S_FK is every so many steps; null for none.
        resample_from: The first step of S_FK; 20 % of the steps by default.
        resample_to: The last step it may have; 80 % of the steps by default.
        ess_threshold: Particles are resampled only where ESS < this share of N, and else their weights carried on;
            always by default.
        proposal_share: S_M is every step of this first share of the run.
        final: "best", "sample" or "first" (see above).
        kwargs: As for `Sampler`.

    Raises:
        ValueError: If a setting is out of range, or the kernel is deterministic: particles from one ancestor,
            and proposals of one particle, would all be the same.
    """

    def __init__(
        self,
        particles: int = 4,
        proposals: int = 1,
        potential: str = "diff",
        lam: float = 2.0,
        lam_per: str = "spread",
        score: str = "child",
        resampling: str = "systematic",
        resample_every: int | None = 4,
        resample_from: int | None = None,
        resample_to: int | None = None,
        ess_threshold: float | None = None,
        proposal_share: float = 0.4,
        final: str = "best",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.particles, self.proposals = particles, proposals
        self.potential, self.lam, self.lam_per = potential, lam, lam_per
        self.score, self.resampling, self.final = score, resampling, final
        self.ess_threshold, self.proposal_share = ess_threshold, proposal_share
        first = round(0.2 * self.num_steps) if resample_from is None else resample_from
        last = round(0.8 * self.num_steps) if resample_to is None else resample_to
        self.resample_every, self.resample_from, self.resample_to = resample_every, first, last
        self._check_settings()
        self.wants_value = particles > 1 or proposals > 1

    @property
    def clean_only(self) -> bool:
        """Whether it asks its value about clean latents only: the denoised parents."""
        return self.score == "parent"

    @property
    def resampling_steps(self) -> tuple[int, ...]:
        """S_FK, in steps taken."""
        if self.resample_every is None or self.particles == 1:
            return ()
        start = max(self.resample_from, 1)
        return tuple(range(start, self.resample_to + 1, self.resample_every))

    @property
    def proposal_steps(self) -> tuple[int, ...]:
        """S_M, in steps taken."""
        if self.proposals == 1:
            return ()
        return tuple(range(1, round(self.proposal_share * self.num_steps) + 1))

    def begin(self, run: Run) -> None:
        """Gives all particles equal weights."""
        run.memory["weights"] = self._even(run.prompts)

    def advance(self, run: Run, k: int) -> Record:
        """Takes one step of Algorithm 1."""
        sigma = run.sigmas[k + 1]
        u, _ = run.velocity(k)
        noisy = self.kernel.std(k, run.sigmas) > 0
        many = self.proposals if noisy and k + 1 in self.proposal_steps else 1
        weighs = k + 1 in self.resampling_steps
        values = None
        if self.score == "parent" and weighs:
            clean = FlowPath.denoise(run.z, u, run.sigmas[k]).to(run.z.dtype)
            values, _ = run.field.value(clean, torch.zeros(()), run.row)
            sigma = run.sigmas[k]
        children = run.propose(self.kernel, k, u, many)
        if values is not None or not (weighs or many > 1):
            run.z = children[:, 0]
        else:
            values = self._choose_children(run, children, sigma)
        if values is None:
            return Record(k + 1, float(sigma))
        info: dict[str, Tensor] = {}
        values, came_from = run.grouped(values), None
        if weighs:
            values, came_from, info = self.resample(run, values)
        return Record(k + 1, float(sigma), values, info, came_from)

    def weigh(self, run: Run, final: Tensor | None) -> Tensor | None:
        """Returns the final particles' normalised log-weights with shape (P, N)."""
        return None if final is None else normalise(run.memory["weights"].last(final))

    def choose(self, run: Run, final: Tensor | None) -> Tensor:
        """Returns which particle of every prompt is the sample, with shape (P,)."""
        if final is None or self.final == "best":
            return super().choose(run, final)
        if self.final == "first":
            return super().choose(run, None)
        weights = run.memory["weights"].last(final)
        return draw(weights, run.noise.uniforms(1)).to(run.z.device)[:, 0]

    def _choose_children(self, run: Run, children: Tensor, sigma: Tensor) -> Tensor:
        """Keeps each particle's best child, (R, M, C, H, W), and the work its value shares; returns their values.

        Particles are scored in groups, so that the shared work of M proposals is in memory for one group only.
        """
        rows, many = children.shape[:2]
        size = max(1, (run.field.micro_batch or rows * many) // many)
        kept, best_values, states = [], [], []
        for start in range(0, rows, size):
            group = children[start : start + size]
            row = run.row[start : start + size].repeat_interleave(many)
            v, state = run.field.value(group.flatten(0, 1), sigma, row)
            v = v.unflatten(0, (-1, many))
            best = v.argmax(dim=1)
            place = torch.arange(len(group), device=best.device)
            kept.append(group[place, best])
            best_values.append(v[place, best])
            states.append(None if state is None else state.select(place * many + best))
        run.z = torch.cat(kept)
        run.prefix = run.field.joined(states)
        return torch.cat(best_values)

    def resample(self, run: Run, values: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Weights particles by their values (P, N) and resamples them; returns new values, ancestors, numbers."""
        weights: Weights = run.memory["weights"]
        lam = weights.multiply(values)
        prompts, n = values.shape
        log_w = normalise(weights.carried)
        ess = effective_sample_size(weights.carried)
        threshold = self.ess_threshold
        drawn = torch.full((prompts,), True) if threshold is None else ess < threshold * n
        uniforms = run.noise.uniforms(uniforms_needed(self.resampling, n))
        index = ancestors(weights.carried, uniforms, self.resampling)
        index = torch.where(drawn[:, None], index, torch.arange(n))
        weights.resample(index, drawn)
        rows = sent((index + n * torch.arange(prompts)[:, None]).flatten(), run.z.device)
        run.z = run.z[rows]
        if run.prefix is not None:
            run.prefix = run.prefix.select(rows)
        distinct = torch.tensor([len(set(row)) / n for row in index.tolist()])
        info = {
            "ess": ess,
            "max_log_weight": log_w.max(dim=1).values,
            "distinct_ancestors": distinct,
            "resampled": drawn.double(),
            "lam": lam,
        }
        return values.gather(1, sent(index, values.device)), index, info

    def _even(self, prompts: int) -> Weights:
        return Weights.even(self.potential, self.lam, self.lam_per, prompts, self.particles)

    def _check_settings(self) -> None:
        every = 1 if self.resample_every is None else self.resample_every
        if min(self.particles, self.proposals, every) < 1:
            raise ValueError(
                f"particles = {self.particles}, proposals = {self.proposals}, resample_every = "
                f"{self.resample_every}: expected 1 or more (resample_every: null for never)."
            )
        self._even(1)  # raises for an unknown potential or a λ out of range
        uniforms_needed(self.resampling, self.particles)
        for name, value, allowed in (
            ("score", self.score, SCORES),
            ("final", self.final, FINALS),
        ):
            if value not in allowed:
                raise ValueError(f"{name} = {value!r}: expected one of {', '.join(allowed)}.")
        if self.resample_every and not 0 <= self.resample_from <= self.resample_to:
            raise ValueError(
                f"resampling from step {self.resample_from} to {self.resample_to}: expected 0 ≤ from ≤ to."
            )
        if self.resample_to > self.num_steps:
            raise ValueError(
                f"resample_to = {self.resample_to}, but there are {self.num_steps} steps: lower resample_to, or leave "
                "resample_from and resample_to out (null) for 20 % to 80 % of the steps."
            )
        if not 0 <= self.proposal_share <= 1:
            raise ValueError(
                f"proposal_share = {self.proposal_share}: expected a share in [0, 1]."
            )
        if self.ess_threshold is not None and not 0 <= self.ess_threshold <= 1:
            raise ValueError(
                f"ess_threshold = {self.ess_threshold}: expected a share of N in [0, 1]; null resamples always."
            )
        if self.score == "parent" and self.proposals > 1:
            raise ValueError(
                f"score = 'parent' cannot tell {self.proposals} proposals of one parent apart: set proposals to 1, or "
                "score to 'child'."
            )
        if self.kernel.deterministic and max(self.particles, self.proposals) > 1:
            raise ValueError(
                f"nu = {self.kernel.nu!r} (scale {self.kernel.scale}) has no noise, so that resampled particles and "
                "proposals would be identical: take an SDE such as nu = 'linear_sde', or BestOfN, which needs none."
            )
