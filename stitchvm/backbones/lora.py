"""Runs a network that carries LoRA adapters as if they were not there.

A value model may share its transformer with a generator that is being fine-tuned. The value must stay that of
the frozen network, so the prefix switches the adapters off. peft's own switch also clears `requires_grad` of
the adapter weights, and setting it back marks frozen adapters as trainable; here only the flag that the
layers' forward reads is changed, so a backward pass that is under way sees nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def adapters_off(*modules: nn.Module) -> Iterator[None]:
    """Switches all LoRA layers inside `modules` off for the duration.

    Raises:
        ValueError: If an adapter is merged into the weights, where it cannot be switched off.
    """
    layers = lora_layers(modules)
    for layer in layers:
        if getattr(layer, "merged", False):
            raise ValueError(
                "a LoRA adapter is merged into the transformer that the backbone shares; unmerge it "
                "(`unfuse_lora`), or load the backbone separately from its own folder"
            )
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, state in zip(layers, before, strict=True):
            layer._disable_adapters = state


def lora_layers(modules: Iterable[nn.Module]) -> list[Any]:
    """Returns the LoRA layers inside `modules`.

    Samplers look once a block, so it is done the quick way: `modules()` and a miss of a module's own `__getattr__` cost
    four times as much.
    """
    found, left = [], list(modules)
    while left:
        module = left.pop()
        if hasattr(type(module), "_disable_adapters"):
            found.append(module)
        left += [child for child in module._modules.values() if child is not None]
    return found
