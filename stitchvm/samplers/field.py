r"""The velocity field of a generator under prompts, with a value on it: where their work is shared, it is done once.

    u_t = u(∅) + g·(u(prompt) − u(∅)),      V = r^{≥j}(s(u^{≤i}(∅)))

A stitched value reads the first i blocks of the null-text branch. Where that branch runs anyway (classifier-free
guidance) on the same weights and null text, the blocks are run once, for the value, and the branch goes on
from there. What is *not* shared: a value model of another backbone (it brings its own blocks along); a
generator with LoRA adapters (the value sees the base weights, the branch does not); guidance-distilled FLUX, which has
no null-text branch (there the value model runs on the generator's weights, without a second copy, but costs its i
blocks: 4 of 57 for i = 4).

A Tweedie value runs one branch or all of the velocity at z_t: of the same generator, at the same scale, under the same
prompts, it is taken as it is, and only a branch that is missing is run.

All calls are in micro-batches of rows, so that many prompts × particles × proposals fit in bounded memory.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from stitchvm.backbones.base import PrefixState
from stitchvm.deferral import Change, Deferred, require
from stitchvm.path import levels
from stitchvm.rewards.base import NotFiniteError
from stitchvm.values.base import BoundValue, Part


@dataclass
class SharedVelocity:
    """What a value has run, on its way, of the velocity at (z_t, t).

    Attributes:
        part: "whole", or one branch of the guidance: "null" or "prompt".
        u: The velocity, with shape (B, C, H, W).
        direction: u(prompt) − u(∅) where the whole has two branches, else None.
    """

    part: Part
    u: Tensor
    direction: Tensor | None = None

    def select(self, index: Tensor) -> SharedVelocity:
        """Returns the velocity of the samples `index` (for resampled particles)."""
        direction = None if self.direction is None else self.direction[index]
        return replace(self, u=self.u[index], direction=direction)

    def detach(self) -> SharedVelocity:
        """Returns the velocity without its graph."""
        direction = None if self.direction is None else self.direction.detach()
        return replace(self, u=self.u.detach(), direction=direction)

    @staticmethod
    def cat(parts: Sequence[SharedVelocity]) -> SharedVelocity:
        """Returns several velocities of one kind as one batch."""
        directions = [part.direction for part in parts if part.direction is not None]
        direction = torch.cat(directions) if directions else None
        return replace(parts[0], u=torch.cat([part.u for part in parts]), direction=direction)


ROWS_KEPT = 64  # places of rows that are kept where they are needed: those of a step come again at the next

# What a value leaves for the velocity at the same latents and level: each has `select`, `detach` and `cat`.
Shared = PrefixState | SharedVelocity


class Field:
    """u_t(z_t) and V(z_t) of rows of latents, each with its prompt.

    Arguments:
        generator: The generator: `encode_prompts`, `velocity`, and for sharing what `Generator` has.
        prompts: The P distinct requests; rows name them by position.
        guidance_scale: g; the generator's own by default.
        value: The value, bound to the P prompts.
        micro_batch: The rows of one network call; all at once by default.
        share_prefix: Whether the velocity goes on from what the value has run of it, where it can.

    Attributes:
        calls: Rows run so far, by kind: "velocity", of which "continued" (from what a value left), "value",
            "gradient".
        part: What the value runs of the velocity, if it is taken from there.
        step: The step that messages name.
        deferred: Where checks of numbers on a GPU wait, if they may come a step late; at once if None.
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
        self.deferred: Deferred | None = None
        self._kept: OrderedDict[tuple[int, ...], tuple[Tensor, Any]] = OrderedDict()
        self.branch: Any = None
        self.depths: tuple[int, ...] = ()
        self.part: Part | None = None
        runs = getattr(generator, "runs_null_branch", None)
        self._two_branches = runs is not None and runs(guidance_scale)
        if share_prefix and value is not None:
            self.part = value.velocity_part(generator, self.prompts, guidance_scale)
        if share_prefix and value is not None and self.part is None and self._two_branches:
            network = generator.transformer
            if not any("lora_" in name for name, _ in network.named_parameters()):
                self.depths = value.depths(network, generator.null)
                self.branch = generator.null_branch() if self.depths else None

    @property
    def shares(self) -> bool:
        """Whether the velocity goes on from what the value has run of it."""
        return bool(self.depths) or self.part is not None

    @property
    def scale(self) -> float:
        """The guidance scale g."""
        own = self.guidance_scale
        return self.generator.guidance_scale if own is None else own

    def ask(self, value: BoundValue) -> None:
        """Changes to another value, from which no velocity is taken."""
        self.bound, self.depths, self.part = value, (), None
        self._kept.clear()

    @torch.no_grad()
    def velocity(
        self, z: Tensor, t: Tensor, row: Tensor, prefix: Shared | None = None
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
            state = prefix
            if prefix is not None and part.stop - part.start < len(z):
                state = prefix.select(torch.arange(part.start, part.stop, device=z.device))
            answers.append(self._velocity(z[part], t, row[part], state))
        self.calls["velocity"] += len(z)
        self.calls["continued"] += len(z) * (prefix is not None)
        directions = [d for _, d in answers if d is not None]
        return torch.cat([u for u, _ in answers]), torch.cat(directions) if directions else None

    @torch.no_grad()
    def value(self, z: Tensor, t: Tensor, row: Tensor) -> tuple[Tensor, Shared | None]:
        """Returns V(z) with shape (R,), and the prefix that `velocity` can go on from (None if nothing is shared)."""
        values, states = [], []
        for part in self._parts(len(z)):
            v, state = self._evaluate(z[part], t, row[part])
            values.append(v)
            states.append(state)
        self.calls["value"] += len(z)
        return torch.cat(values), self.joined(states)

    def value_gradient(
        self, z: Tensor, t: Tensor, row: Tensor
    ) -> tuple[Tensor, Tensor, Shared | None]:
        """Returns V(z) with shape (R,), ∇V(z) of every row by itself with the shape of z, and the prefix.

        Raises:
            ValueError: If the value is not differentiable.
            NotFiniteError: If a value or a gradient is not finite.
        """
        values, gradients, states = [], [], []
        for part in self._parts(len(z)):
            leaf = z[part].detach().requires_grad_()
            with torch.enable_grad():
                v, state = self._evaluate(leaf, t, row[part])
                if torch.is_inference_mode_enabled():
                    raise ValueError(
                        f"guidance takes the gradient of {self._name}, and torch.inference_mode() allows none: leave "
                        "it out, or take torch.no_grad()."
                    )
                if not v.requires_grad:
                    raise ValueError(
                        f"{self._name} is not differentiable in the latents, so it cannot guide: choose a "
                        "stitched or Tweedie value, or a sampler that only compares values (FK steering, best-of-N)."
                    )
                # a sum, never a mean: each row's gradient is its own, whatever the batch
                (gradient,) = torch.autograd.grad(v.sum(), leaf)
            self.check(gradient.flatten(1), "gradient of the value", t, row[part])
            values.append(v.detach())
            gradients.append(gradient)
            states.append(None if state is None else state.detach())
        self.calls["gradient"] += len(z)
        return torch.cat(values), torch.cat(gradients), self.joined(states)

    @property
    def _name(self) -> str:
        return "the value" if self.bound is None else self.bound.name

    def _evaluate(self, z: Tensor, t: Tensor, row: Tensor) -> tuple[Tensor, Shared | None]:
        assert self.bound is not None, "a sampler asked for a value, but there is none"
        level = levels(t, z)
        states: dict[int, PrefixState] = {}
        if self.depths:
            state = self.branch.prefix(z, level, min(self.depths))
            states[state.depth] = state
            while state.depth < max(self.depths):
                state = self.branch.advance(state)
                states[state.depth] = state
        cond, bound = self._of(row)
        shared: Shared | None = states.get(max(self.depths)) if states else None
        with self._telling(t, row):
            if self.part is not None:
                v, u, direction = bound.with_velocity(z, level, cond)
                shared = SharedVelocity(self.part, u, direction)
            else:
                v = bound(z, level, states) if states else bound(z, level)
        self.check(v[:, None], "value", t, row)
        return v, shared

    @contextmanager
    def _telling(self, t: Tensor, row: Tensor) -> Iterator[None]:
        """Says step, level and prompts with errors of the value that come up in here, now or later."""
        where = f"step {self.step + 1}, σ = {float(t):.4g}, {self._name}"

        def told(error: Exception) -> Exception:
            if not isinstance(error, NotFiniteError):
                return error
            asked = list(dict.fromkeys(self.prompts[place] for place in row.tolist()))
            return NotFiniteError(
                f"{where} of the prompts {asked[:4]}{' …' if len(asked) > 4 else ''}: {error} "
                "If guidance led there, lower its strength."
            )

        try:
            with self._collecting(told):
                yield
        except NotFiniteError as error:
            raise told(error) from error

    def _velocity(
        self, z: Tensor, t: Tensor, row: Tensor, prefix: Shared | None
    ) -> tuple[Tensor, Tensor | None]:
        level = levels(t, z)
        if isinstance(prefix, SharedVelocity):
            return self._completed(z, level, row, prefix)
        cond, _ = self._of(row)
        if hasattr(self.generator, "velocity_parts"):
            return self.generator.velocity_parts(z, level, cond, self.guidance_scale, prefix)
        return self.generator.velocity(z, level, cond, guidance_scale=self.guidance_scale), None

    def _completed(
        self, z: Tensor, level: Tensor, row: Tensor, known: SharedVelocity
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the velocity from what is known of it, running the branch that is missing."""
        if known.part == "whole":
            return known.u, known.direction
        missing = self._of(row)[0] if known.part == "null" else self.generator.null
        other = self.generator.velocity(z, level, missing, guidance_scale=1.0)
        u_null, u_prompt = (known.u, other) if known.part == "null" else (other, known.u)
        return u_null + self.scale * (u_prompt - u_null), u_prompt - u_null

    def check(self, x: Tensor, what: str, t: Tensor, row: Tensor) -> None:
        """Raises NotFiniteError if a row of x (R, ...) is not, naming step, level, prompt and value."""
        finite = x.isfinite().all(dim=1)
        step, name = self.step + 1, self._name

        def error() -> NotFiniteError:
            place = int(row[int((~finite).nonzero()[0])])
            return NotFiniteError(
                f"the {what} is not finite at step {step}, σ = {float(t):.4g}, prompt "
                f"{self.prompts[place]!r} ({name}): lower the guidance strength, or run the value in float32."
            )

        with self._collecting():
            require(finite, error)

    def _collecting(self, change: Change | None = None) -> AbstractContextManager[None]:
        return nullcontext() if self.deferred is None else self.deferred.collecting(change)

    def _of(self, row: Tensor) -> tuple[Any, Any]:
        """Returns the conditions of rows and the value bound to their prompts; looking them up makes a GPU wait."""
        places = tuple(row.tolist())
        if places not in self._kept:
            bound = None if self.bound is None else self.bound.select(row)
            tokens = getattr(self.cond, "tokens", row)
            self._kept[places] = row.to(tokens.device), bound
        self._kept.move_to_end(places)
        while len(self._kept) > ROWS_KEPT:
            self._kept.popitem(last=False)
        there, bound = self._kept[places]
        return select(self.cond, there), bound

    def _parts(self, rows: int) -> Iterator[slice]:
        size = self.micro_batch or rows
        for start in range(0, rows, size):
            yield slice(start, min(start + size, rows))

    @staticmethod
    def joined(states: Sequence[Shared | None]) -> Shared | None:
        """Returns what a value left for the parts of a batch, as one; None if it left nothing."""
        prefixes = [state for state in states if isinstance(state, PrefixState)]
        velocities = [state for state in states if isinstance(state, SharedVelocity)]
        if velocities:
            return SharedVelocity.cat(velocities)
        return PrefixState.cat(prefixes) if prefixes else None


def select(cond: Any, row: Tensor) -> Any:
    """Returns the conditions of rows; None stays None."""
    if cond is None:
        return None
    return cond[row.cpu()] if isinstance(cond, Tensor) else cond.select(row)
