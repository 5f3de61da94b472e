r"""A policy that is trained, the copies that follow it, and the moves between them.

    default    the trained weights θ
    old        the policy that samples in DiffusionNFT:   θ_old ← d·θ_old + (1 − d)·θ               (71)
    ema        the average that is evaluated and exported: θ_ema ← d·θ_ema + (1 − d)·θ
    (off)      the frozen model θ_0

`with policy.use("old"):` runs the transformer with a copy, `with policy.off():` without any change of training. Outside
of such a block the policy itself is active, with gradients. What a block changes it changes back, also after an
exception.

**Gradient checkpointing** runs blocks again during the backward pass, by then perhaps with other weights active, and
the gradient is silently that of another function, or missing. So the policy brings its own checkpointing function,
which remembers what was active in the forward pass; the transformer's own is replaced by it. Whoever checkpoints a
whole call of the transformer does it through `policy.checkpoint`, or gets an error when the repetition meets other
weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stitchvm.interruption import uninterrupted

__all__ = ["Policy", "full_tensor"]

DEFAULT = "default"


class Policy(ABC):
    """The weights of a transformer that training changes, and named copies of them.

    Arguments:
        transformer: The diffusers transformer; gets a hook, and its checkpointing function is replaced.
        copies: The names of the copies, such as ("old", "ema").

    Attributes:
        transformer: The transformer.
        copies: The names of the copies.
    """

    def __init__(self, transformer: Any, copies: Sequence[str]) -> None:
        if DEFAULT in copies or len(set(copies)) < len(copies):
            raise ValueError(
                f"copies = {list(copies)}: expected distinct names besides '{DEFAULT}'."
            )
        self.transformer = transformer
        self.copies = tuple(copies)
        self._active: str | None = DEFAULT
        self._repeating = False
        if getattr(transformer, "gradient_checkpointing", False):
            self.enable_gradient_checkpointing()
        transformer.register_forward_pre_hook(self._refuse_other_weights)

    # What an implementation defines.

    @abstractmethod
    def parameters(self, name: str = DEFAULT) -> dict[str, Tensor]:
        """Returns the weights of the policy or a copy by key, in a fixed order; shards under FSDP2."""

    @abstractmethod
    def _switch(self, active: str | None) -> None:
        """Makes a set of weights (None: the frozen model) what the transformer runs with."""

    @abstractmethod
    def _verify(self) -> None:
        """Raises RuntimeError unless the transformer is in the state that `_active` says."""

    @abstractmethod
    def _again(self, active: str | None) -> AbstractContextManager[None]:
        """Returns the context of a repeated forward pass whose first run had `active`."""

    # Switching.

    @property
    def active(self) -> str | None:
        """What the transformer runs with: "default", a copy's name, or None for the frozen model."""
        return self._active

    def use(self, name: str) -> AbstractContextManager[None]:
        """Returns a context in which the transformer runs with the policy or a copy.

        Raises:
            ValueError: If there is no such copy.
            RuntimeError: On entering, if somebody else has switched adapters or checkpointing.
        """
        return self._while(self._known(name))

    def off(self) -> AbstractContextManager[None]:
        """Returns a context in which the transformer is the frozen model θ_0.

        The value of a latent belongs in here when its estimator asks the generator: it must not see the policy.
        """
        return self._while(None)

    @contextmanager
    def _while(self, active: str | None) -> Iterator[None]:
        self._check_checkpointing()
        self._verify()
        before = self._active
        try:
            self._set(active)
            yield
        finally:
            self._set(before)
            self._verify()

    def _set(self, active: str | None) -> None:
        if active != self._active:
            with uninterrupted():  # an interrupt leaves a checkpoint, not one of half a switch
                self._switch(active)
                self._active = active

    def _known(self, name: str) -> str:
        if name != DEFAULT and name not in self.copies:
            raise ValueError(
                f"the policy has no '{name}', only {[DEFAULT, *self.copies]}: name it in `copies`."
            )
        return name

    # Gradient checkpointing.

    def enable_gradient_checkpointing(self) -> None:
        """Makes the transformer run its blocks again in the backward pass, with the weights of the forward pass."""
        self.transformer.enable_gradient_checkpointing(self.checkpoint)

    def checkpoint(self, function: Callable[..., Any], *args: Any) -> Any:
        """Returns function(*args), which is run again in the backward pass with the weights that are active now."""
        active = self._active

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), self._repeat(active)

        return checkpoint(function, *args, use_reentrant=False, context_fn=contexts)

    @contextmanager
    def _repeat(self, active: str | None) -> Iterator[None]:
        before, self._repeating = self._repeating, True
        try:
            with self._again(active):
                yield
        finally:
            self._repeating = before

    def _check_checkpointing(self) -> None:
        transformer = self.transformer
        if getattr(transformer, "gradient_checkpointing", False) and (
            transformer._gradient_checkpointing_func != self.checkpoint
        ):
            raise RuntimeError(
                "gradient checkpointing was switched on past the policy: blocks would be run again with whatever "
                "is active during the backward pass. Call policy.enable_gradient_checkpointing() instead."
            )

    def _refuse_other_weights(self, module: nn.Module, args: Any) -> None:
        if self._active == DEFAULT or self._repeating or torch.compiler.is_compiling():
            return
        if torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                f"the transformer is run again in a backward pass while '{self._active or 'off'}' is active, perhaps "
                "for a graph of other weights: leave use()/off() before backward(), or checkpoint with "
                "policy.checkpoint(function, *args), which remembers the weights."
            )

    # Moves. All are elementwise, so that they act on the shards of FSDP2.

    @torch.no_grad()
    def follow(self, name: str, decay: float) -> None:
        """Moves a copy towards the policy in place, copy ← d·copy + (1 − d)·default; equal, not an alias, for d = 0.

        Arguments:
            name: The copy.
            decay: d in [0, 1].

        Raises:
            ValueError: If there is no such copy or d is out of its range.
        """
        if self._known(name) == DEFAULT or not 0 <= decay <= 1:
            raise ValueError(f"follow('{name}', {decay}): expected a copy and a decay in [0, 1].")
        self._verify_default()
        copy, policy = self._local(name), self._local(DEFAULT)
        if decay == 0:
            torch._foreach_copy_(copy, policy)
        else:
            torch._foreach_lerp_(copy, policy, 1 - decay)

    def decay_old(self, decay: float) -> None:
        """Moves the old policy after the trained one: θ_old ← d·θ_old + (1 − d)·θ, Eq. (71)."""
        self.follow("old", decay)

    def update_ema(self, decay: float) -> None:
        """Moves the average after the trained policy: θ_ema ← d·θ_ema + (1 − d)·θ."""
        self.follow("ema", decay)

    @torch.no_grad()
    def distance(self, name: str) -> Tensor:
        """Returns ‖default − copy‖, the ℓ2 norm over all weights, a scalar; every rank must call it under FSDP2."""
        self._verify_default()
        difference = torch._foreach_sub(self._local(DEFAULT), self._local(self._known(name)))
        square = torch.stack(torch._foreach_norm(difference)).square().sum()
        sharded = next((p for p in self.parameters().values() if hasattr(p, "device_mesh")), None)
        if sharded is not None:
            torch.distributed.all_reduce(square, group=sharded.device_mesh.get_group())
        return square.sqrt()

    def _local(self, name: str) -> list[Tensor]:
        return [_shard(p.detach()) for p in self.parameters(name).values()]

    def _verify_default(self) -> None:
        if self._active != DEFAULT:
            raise RuntimeError(
                f"weights cannot be moved, saved or loaded while '{self._active or 'off'}' is active: leave use() or "
                "off() before."
            )
        self._verify()
        self._reshard()
        dtypes = {p.dtype for p in self.parameters().values()}
        if any(dtype.itemsize < 4 for dtype in dtypes):
            raise RuntimeError(
                f"the trained weights are in {sorted(map(str, dtypes))}, expected float32: somebody has cast the whole "
                "transformer (Lightning's precision='bf16-true' does). Load the generator with dtype bfloat16 instead; "
                "the adapters are made in float32 on top of it."
            )

    def _reshard(self) -> None:
        # FSDP2's root keeps its weights whole after a forward pass; shards are what is moved
        for module in self.transformer.modules():
            if hasattr(module, "reshard"):
                module.reshard()

    # State.

    def weights(self, name: str = DEFAULT, keep: bool = True) -> dict[str, Tensor]:
        """Returns one set of weights, whole, detached and copied; every rank must call it under FSDP2.

        They are gathered one by one into CPU memory: whole sets beside the shards would not fit on a GPU.

        Arguments:
            name: "default" or a copy.
            keep: Whether this rank wants them; if not, it helps to gather them and gets {}.
        """
        self._verify_default()
        found = {}
        for key, p in self.parameters(name).items():
            whole = full_tensor(p.detach())
            if keep:
                found[key] = whole.to("cpu", copy=True)
        return found

    def state(self, keep: bool = True) -> dict[str, Tensor]:
        """Returns the policy and all copies by "name.key", as `weights` does."""
        return {
            f"{name}.{key}": value
            for name in (DEFAULT, *self.copies)
            for key, value in self.weights(name, keep).items()
        }

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Loads what `state` returned, strictly.

        Raises:
            ValueError: If keys or shapes differ, naming them.
        """
        self._verify_default()
        own = {
            f"{name}.{key}": p
            for name in (DEFAULT, *self.copies)
            for key, p in self.parameters(name).items()
        }
        missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        wrong = [
            f"{key} {tuple(state[key].shape)} (expected {tuple(own[key].shape)})"
            for key in sorted(own.keys() & state.keys())
            if state[key].shape != own[key].shape
        ]
        if missing or unknown or wrong:
            raise ValueError(
                f"the state does not fit this policy: missing {missing[:5]} ({len(missing)}), unknown {unknown[:5]} "
                f"({len(unknown)}), wrong shape {wrong[:5]} ({len(wrong)}). It was made with other targets, rank, "
                "copies or another transformer."
            )
        for key, p in own.items():
            _shard(p.detach()).copy_(_shard_like(state[key], p))


def full_tensor(tensor: Tensor) -> Tensor:
    """Returns a tensor gathered from its shards, or itself."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _shard(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _shard_like(value: Tensor, tensor: Any) -> Tensor:
    """Returns this rank's part of a whole tensor, cut as `tensor` is."""
    if not hasattr(tensor, "device_mesh"):
        return value
    from torch.distributed.tensor import distribute_tensor

    value = value.to(tensor.device, tensor.dtype)
    return _shard(distribute_tensor(value, tensor.device_mesh, tensor.placements))
