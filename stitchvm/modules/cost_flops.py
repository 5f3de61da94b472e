"""The same in FLOPs, counted by torch on the calls themselves.

Two per multiply-add, attention as two matrix products forward and four backward, whatever its kernel does. Each kind of
call is counted once, for one image, on the run's own networks with their adapters; a method's `Plan` adds them up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from stitchvm.modules.cost import Prices
from stitchvm.modules.groups import frozen
from stitchvm.values.base import Value
from stitchvm.values.shared_runs import shared_runs
from stitchvm.values.stitched import BoundStitched, StitchedValue
from stitchvm.values.terminal import TerminalValue
from stitchvm.values.tweedie import TweedieValue
from stitchvm.values.weighted import WeightedValue

if TYPE_CHECKING:
    from stitchvm.modules.alignment import Alignment

__all__ = ["FlopCounter", "counted_prices", "no_checkpointing", "value_call"]


class FlopCounter(FlopCounterMode):
    """`FlopCounterMode` that does not follow modules: its hooks do not allow a gradient for a module's own input."""

    def __init__(self) -> None:
        super().__init__(display=False)
        self.mod_tracker: Any = _Everywhere()

    def of(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[float, Any]:
        """Returns the FLOPs of a call, and its answer."""
        before = self.get_total_flops()
        answer = call(*args, **kwargs)
        return float(self.get_total_flops() - before), answer


class _Everywhere:
    """What stands for all modules."""

    parents = frozenset({"Global"})

    def __enter__(self) -> _Everywhere:
        return self

    def __exit__(self, *_: Any) -> None:
        pass


def counted_prices(module: Alignment, fake: bool = False) -> Prices:
    """Returns the FLOPs of each kind of call for one image; passes that are run again are in the backward ones.

    Arguments:
        module: A fine-tuning with its networks, not sharded.
        fake: Whether to go through the operations alone, on fake tensors: quicker for large networks on a CPU. These
            may keep some of them, such as the positions of a new size, and must not be run afterwards.

    Raises:
        ValueError: If the value's calls cannot be counted.
    """
    built = module._built
    generator, policy, value = built.generator, built.policy, built.value
    weights = [p for p in policy.parameters().values() if p.requires_grad]
    device = weights[0].device
    shape = (1, generator.latent_channels, *built.latent_size)
    cond = generator.null
    asked = value_call(value)
    with counting(device, fake), FlopCounter() as counter:
        z, t = torch.zeros(shape, device=device), torch.tensor([0.5], device=device)

        def velocity(z_t: Tensor) -> Tensor:
            return generator.velocity(z_t, t, cond, module.guidance_scale)

        def both(call: Callable[[Tensor], Tensor], x: Tensor, *inputs: Tensor) -> float:
            """The backward pass to some inputs."""
            y = call(x)
            return counter.of(torch.autograd.grad, y.sum(), inputs, allow_unused=True)[0]

        with torch.no_grad():
            forward, _ = counter.of(velocity, z)
            with policy.off() if module.needs_frozen else nullcontext():
                without, _ = counter.of(velocity, z)
        leaf = z.clone().requires_grad_()
        ends, backward = both(velocity, z, *weights), both(velocity, leaf, leaf, *weights)
        with frozen(policy):  # values are the frozen model's
            with torch.no_grad():
                once, _ = counter.of(asked, z, t)
            gradient = both(lambda x: asked(x, t), leaf, leaf)
    return Prices(forward, without, backward, ends, once, gradient)


def value_call(value: Value) -> Callable[[Tensor, Tensor], Tensor]:
    """Returns what a value computes of latents, but for its score: a function of (z_t, t) that looks at no number.

    Arguments:
        value: The value; the stitched parts of a sum share their runs, as they do when it is asked.

    Raises:
        ValueError: If it is of a kind whose calls are not known beforehand.
    """
    if isinstance(value, StitchedValue):
        return lambda z, t: value.value_model(z, t).image
    if isinstance(value, TerminalValue):
        return lambda z, t: value.reward.embed(value.vae.decode(z)).image
    if isinstance(value, WeightedValue):
        return _sum_call(value)
    if isinstance(value, TweedieValue) and value.velocity == "null":
        return value.embed
    raise ValueError(
        f"the FLOPs of a {type(value).__name__} are not counted: only those of stitched and terminal values, of "
        "Tweedie values under null text, and of sums of them."
    )


def _sum_call(value: WeightedValue) -> Callable[[Tensor, Tensor], Tensor]:
    stitched = {n: v for n, v in value.values.items() if isinstance(v, StitchedValue)}
    models = {name: v.value_model for name, v in stitched.items()}
    shared = shared_runs({n: BoundStitched(v, None, None, None) for n, v in stitched.items()})
    together = {name for names, _ in shared for name in names}
    alone = [value_call(v) for name, v in value.values.items() if name not in together]

    def call(z: Tensor, t: Tensor) -> Tensor:
        images = [each(z, t) for each in alone]
        for names, run in shared:
            states = run(z, t)
            for name in names:
                model = models[name]
                images.append(model.from_features(states[model.i].features()).image)
        return torch.cat([image.float() for image in images], dim=1)

    return call


@contextmanager
def no_checkpointing(*parts: nn.Module) -> Iterator[None]:
    """Runs no pass again: what is left are the FLOPs of the model itself, by which a device's use is measured."""
    every: list[Any] = [module for part in parts for module in part.modules()]
    again = [module for module in every if getattr(module, "gradient_checkpointing", False)]
    for module in again:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in again:
            module.gradient_checkpointing = True


@contextmanager
def counting(device: torch.device, fake: bool) -> Iterator[None]:
    """Runs attention where a counter sees it, and, if asked, nothing at all: with fake tensors."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with ExitStack() as stack:
        if device.type != "meta":  # there it is no kernel anyway
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if fake:
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield
