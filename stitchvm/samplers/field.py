r"""The velocity field of a generator under prompts, with a value on it: where their work is shared, it is done once.

    u_t = u(∅) + g·(u(prompt) − u(∅)),      V = r^{≥j}(s(u^{≤i}(∅)))

A stitched value reads the first i blocks of the null-text branch. Where that branch runs anyway (classifier-free
guidance) on the same weights and null text, the blocks are run once, for the value, and the branch goes on
from there. What is *not* shared: a value model of another backbone (it brings its own blocks along); a
generator with LoRA adapters (the value sees the base weights, the branch does not); guidance-distilled FLUX, which has
no null-text branch (there the value model runs on the generator's weights, without a second copy, but costs its i
blocks: 4 of 57 for i = 4).

All calls are in micro-batches of rows, so that many prompts × particles × proposals fit in bounded memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from stitchvm.backbones.base import PrefixState
from stitchvm.rewards.base import NotFiniteError
from stitchvm.values.base import BoundValue


class Field:
    """u_t(z_t) and V(z_t) of rows of latents, each with its prompt.

    Arguments:
        generator: The generator: `encode_prompts`, `velocity`, and for sharing what `Generator` has.
        prompts: The P distinct requests; rows name them by position.
        guidance_scale: g; the generator's own by default.
        value: The value, bound to the P prompts.
        micro_batch: The rows of one network call; all at once by default.
        share_prefix: Whether the null-text branch goes on from the value's prefix where it can.

    Attributes:
        calls: Rows run so far, by kind: "velocity", "continued" (of a prefix), "value", "gradient".
        step: The step that messages name.
    """

    def __init__(
        self,
        generator: Any,
        prompts: Sequence[str],
        guidance_scale: float | None = None,
        value: BoundValue | None = None,
        micro_batch: int | None = None,
        share_prefix: bool = True,
    ) -> None:
        if micro_batch is not None and micro_batch < 1:
            raise ValueError(f"micro_batch = {micro_batch}: expected at least 1, or null for all.")
        self.generator, self.prompts, self.bound = generator, list(prompts), value
        self.guidance_scale, self.micro_batch = guidance_scale, micro_batch
        with torch.no_grad():
            self.cond = generator.encode_prompts(self.prompts)
        self.calls: Counter[str] = Counter()
        self.step = 0
        self.branch: Any = None
        self.depths: tuple[int, ...] = ()
        runs = getattr(generator, "runs_null_branch", None)
        if share_prefix and value is not None and runs is not None and runs(guidance_scale):
            network = generator.transformer
            if not any("lora_" in name for name, _ in network.named_parameters()):
                self.depths = value.depths(network, generator.null)
                self.branch = generator.null_branch() if self.depths else None

    @property
    def shares(self) -> bool:
        """Whether the null-text branch goes on from the value's prefix."""
        return bool(self.depths)

    @torch.no_grad()
    def velocity(
        self, z: Tensor, t: Tensor, row: Tensor, prefix: PrefixState | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Returns u_t(z), and u(prompt) − u(∅) or None where there is one branch only.

        Arguments:
            z: The latents, with shape (R, C, H, W).
            t: Their level, a scalar tensor.
            row: The position of each one's prompt, with shape (R,).
            prefix: What `value` or `value_gradient` returned at the same latents and level.
        """
        answers = []
        for part in self._parts(len(z)):
            rows = torch.arange(part.start, part.stop, device=z.device)
            state = None if prefix is None else prefix.select(rows)
            answers.append(self._velocity(z[part], t, row[part], state))
        self.calls["velocity"] += len(z)
        self.calls["continued"] += len(z) * (prefix is not None)
        directions = [d for _, d in answers if d is not None]
        return torch.cat([u for u, _ in answers]), torch.cat(directions) if directions else None

    @torch.no_grad()
    def value(self, z: Tensor, t: Tensor, row: Tensor) -> tuple[Tensor, PrefixState | None]:
        """Returns V(z) with shape (R,), and the prefix that `velocity` can go on from (None if nothing is shared)."""
        values, states = [], []
        for part in self._parts(len(z)):
            v, state = self._evaluate(z[part], t, row[part])
            values.append(v)
            states.append(state)
        self.calls["value"] += len(z)
        return torch.cat(values), self._joined(states)

    def value_gradient(
        self, z: Tensor, t: Tensor, row: Tensor
    ) -> tuple[Tensor, Tensor, PrefixState | None]:
        """Returns V(z) with shape (R,), ∇V(z) of every row by itself with the shape of z, and the prefix.

        Raises:
            ValueError: If the value is not differentiable, or a gradient is not finite.
        """
        values, gradients, states = [], [], []
        for part in self._parts(len(z)):
            leaf = z[part].detach().requires_grad_()
            with torch.enable_grad():
                v, state = self._evaluate(leaf, t, row[part])
                if not v.requires_grad:
                    raise ValueError(
                        f"{self._name} is not differentiable in the latents, so it cannot guide: choose a "
                        "stitched or Tweedie value, or a sampler that only compares values (FK steering, best-of-N)."
                    )
                # a sum, never a mean: each row's gradient is its own, whatever the batch
                (gradient,) = torch.autograd.grad(v.sum(), leaf)
            self._check(gradient.flatten(1), "gradient of the value", t, row[part])
            values.append(v.detach())
            gradients.append(gradient)
            states.append(None if state is None else state.detach())
        self.calls["gradient"] += len(z)
        return torch.cat(values), torch.cat(gradients), self._joined(states)

    @property
    def _name(self) -> str:
        return "the value" if self.bound is None else self.bound.name

    def _evaluate(self, z: Tensor, t: Tensor, row: Tensor) -> tuple[Tensor, PrefixState | None]:
        assert self.bound is not None, "a sampler asked for a value, but there is none"
        levels = t.to(z.device).float().expand(len(z))
        states: dict[int, PrefixState] = {}
        if self.depths:
            state = self.branch.prefix(z, levels, min(self.depths))
            states[state.depth] = state
            while state.depth < max(self.depths):
                state = self.branch.advance(state)
                states[state.depth] = state
        bound = self.bound.select(row)
        try:
            v = bound(z, levels, states) if states else bound(z, levels)
        except NotFiniteError as error:
            raise ValueError(f"step {self.step + 1}, σ = {float(t):.4g}: {error}") from error
        self._check(v[:, None], "value", t, row)
        return v, states.get(max(self.depths)) if states else None

    def _velocity(
        self, z: Tensor, t: Tensor, row: Tensor, prefix: PrefixState | None
    ) -> tuple[Tensor, Tensor | None]:
        levels = t.to(z.device).float().expand(len(z))
        cond = select(self.cond, row)
        if hasattr(self.generator, "velocity_parts"):
            return self.generator.velocity_parts(z, levels, cond, self.guidance_scale, prefix)
        return self.generator.velocity(z, levels, cond, guidance_scale=self.guidance_scale), None

    def _check(self, x: Tensor, what: str, t: Tensor, row: Tensor) -> None:
        finite = x.isfinite().all(dim=1)
        if bool(finite.all()):
            return
        place = int(row[int((~finite).nonzero()[0])])
        raise ValueError(
            f"the {what} is not finite at step {self.step + 1}, σ = {float(t):.4g}, prompt "
            f"{self.prompts[place]!r} ({self._name}): lower the guidance strength, or run the value in float32."
        )

    def _parts(self, rows: int) -> Iterator[slice]:
        size = self.micro_batch or rows
        for start in range(0, rows, size):
            yield slice(start, min(start + size, rows))

    @staticmethod
    def _joined(states: Sequence[PrefixState | None]) -> PrefixState | None:
        kept = [state for state in states if state is not None]
        return PrefixState.cat(kept) if kept else None


def select(cond: Any, row: Tensor) -> Any:
    """Returns the conditions of rows; None stays None."""
    if cond is None:
        return None
    return cond[row.cpu()] if isinstance(cond, Tensor) else cond.select(row.to(cond.tokens.device))
