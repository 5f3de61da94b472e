r"""What fine-tuning costs, counted from a method's settings alone: how often an image's sample runs the networks.

The unit is a *forward*: one pass of the generator's transformer for one image under one condition. In it

    a pass                        1; with classifier-free guidance 2
    a pass run again              1: gradient checkpointing repeats it in the backward pass
    a backward pass               1 through frozen weights (LoRA), where inputs get a gradient and W gets none;
                                  2 where the weights themselves are trained
    a value, its gradient         their FLOPs over those of a pass: for a stitched value about i/L and the tail's share,
                                  for a terminal reward the decoder's and the reward's

The adapters' own products, a few percent of a pass, the prompts' text encoders and the optimiser's step are left out.
With k calls of a roll-out that stops at z_τ, k = N for τ = 0, and a mean over the stopping window,

    DRaFT-K    k + K·[λ > 0] + K backward, and a value with its gradient
    NFT        k + n·(2 + [λ > 0] + 1 backward), and a value;  n of the k levels above τ are regressed at
    GRPO       k + W·(1 + [kl > 0] + 1 backward), and a value;  W steps of the window

so a sample of DiffusionNFT with 25 steps and 24 levels costs 25 + 24·4 = 121, one that stops after 12 … 17 and is
regressed at all levels above τ 72.5 on average: 1.67 times less. `cost_flops.py` counts the same in FLOPs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import astuple, dataclass

import torch

from stitchvm.objectives.grpo import sde_window
from stitchvm.objectives.stopping import StopWindow, first_gradient_step, training_levels

__all__ = ["STAGES", "Plan", "Prices", "Work", "draft_plan", "grpo_plan", "nft_plan", "rough"]

STAGES = ("rollout", "value", "update")


@dataclass(frozen=True)
class Work:
    """How often a stage runs the networks for one image, as a mean over stops perhaps.

    Attributes:
        forward: The transformer's passes with the policy or a copy of it.
        frozen: Its passes without them, as the frozen model.
        backward: Backward passes through it that go on to its input.
        ends: Backward passes that end in it: to its weights only.
        value: Calls of the value.
        value_backward: Backward passes through it.
    """

    forward: float = 0.0
    frozen: float = 0.0
    backward: float = 0.0
    ends: float = 0.0
    value: float = 0.0
    value_backward: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, factor: float) -> Work:
        return Work(*(factor * a for a in astuple(self)))

    def at(self, prices: Prices) -> float:
        """Returns what it costs at prices, in their unit."""
        return sum(a * b for a, b in zip(astuple(self), astuple(prices), strict=True))


@dataclass(frozen=True)
class Prices:
    """What one of each costs, in forwards or in FLOPs; attributes as those of `Work`."""

    forward: float
    frozen: float
    backward: float
    ends: float
    value: float
    value_backward: float


@dataclass(frozen=True)
class Plan:
    """What a method runs for an image.

    Attributes:
        window: The stopping window, [N, N] for roll-outs to the end.
        work: Work by stage for a stop k.
        losses: How many losses an image has at a stop k: NFT has one for each level.
        ahead: Whether all roll-outs and values come before the first loss; else each loss begins with its own.
    """

    window: StopWindow
    work: Callable[[int], Mapping[str, Work]]
    losses: Callable[[int], int]
    ahead: bool

    @property
    def stops(self) -> range:
        """The stops, all as likely."""
        return range(self.window.low, self.window.high + 1)

    def mean(self) -> dict[str, Work]:
        """Returns the mean work of each stage over the stopping window."""
        found = [self.work(k) for k in self.stops]
        return {s: total(each[s] for each in found) * (1 / len(found)) for s in STAGES}

    def mean_losses(self) -> float:
        """Returns the mean number of losses of an image."""
        return sum(self.losses(k) for k in self.stops) / len(self.stops)


def total(works: Iterable[Work]) -> Work:
    """Returns the sum of works."""
    answer = Work()
    for work in works:
        answer = answer + work
    return answer


def rough(
    value: float,
    *,
    branches: int = 1,
    trained: bool = False,
    again: bool = False,
    value_backward: float | None = None,
) -> Prices:
    """Returns prices in forwards by the conventions above.

    Arguments:
        value: A value's forward pass.
        branches: The passes of a velocity: 2 with classifier-free guidance.
        trained: Whether the transformer's own weights are trained.
        again: Whether passes are run again in the backward pass.
        value_backward: A value's backward pass; as much as forward by default.
    """
    back = branches * ((2.0 if trained else 1.0) + again)
    return Prices(
        branches, branches, back, back, value, value if value_backward is None else value_backward
    )


def draft_plan(
    window: StopWindow, *, backprop_steps: int | None = 1, lam: float = 0.01, redraws: int = 0
) -> Plan:
    """Returns the plan of DRaFT-K; each redraw of DRaFT-LV is one more last step with a value of its own.

    Arguments:
        window: The stopping window.
        backprop_steps: K; None for all steps.
        lam: λ; 0 spares the frozen model's passes.
        redraws: n.
    """

    def work(stop: int) -> dict[str, Work]:
        K = stop - first_gradient_step(stop, backprop_steps)
        ends = 1 + redraws
        return {
            "rollout": Work(forward=stop + redraws, frozen=(K + redraws) if lam > 0 else 0),
            "value": Work(value=ends),
            "update": Work(backward=K - 1, ends=ends, value_backward=ends),
        }

    return Plan(window, work, lambda stop: 1, ahead=False)


def nft_plan(window: StopWindow, *, fraction: float = 0.99, lam: float = 1e-4) -> Plan:
    """Returns the plan of DiffusionNFT: old, frozen and trained velocity at each level.

    Arguments:
        window: The stopping window.
        fraction: The share of the levels above τ that an image is regressed at.
        lam: λ; 0 spares the frozen model's passes.
    """

    def levels(stop: int) -> int:
        grid = torch.linspace(1, 0, stop + 1)
        return training_levels(grid, stop, 1, fraction=fraction, key=("count",)).shape[1]

    def work(stop: int) -> dict[str, Work]:
        n = levels(stop)
        return {
            "rollout": Work(forward=stop),
            "value": Work(value=1),
            "update": Work(forward=2 * n, frozen=n if lam > 0 else 0, ends=n),
        }

    return Plan(window, work, levels, ahead=True)


def grpo_plan(
    window: StopWindow, *, steps: int | None = 3, bounds: tuple[int, int] = (0, 5), kl: float = 0.0
) -> Plan:
    """Returns the plan of Flow-GRPO: the policy, and the frozen model for kl > 0, at each stochastic step.

    Arguments:
        window: The stopping window.
        steps: The number of stochastic steps; None for all but the last.
        bounds: The steps they lie within.
        kl: The weight of the divergence from the frozen model.
    """

    def width(stop: int) -> int:
        return len(sde_window(stop, steps, bounds, key=("count",)))

    def work(stop: int) -> dict[str, Work]:
        W = width(stop)
        return {
            "rollout": Work(forward=stop),
            "value": Work(value=1),
            "update": Work(forward=W, frozen=W if kl > 0 else 0, ends=W),
        }

    return Plan(window, work, width, ahead=True)
