"""A component written down as plain data: `{"class_path": ..., "init_args": {...}}`, as in the YAML files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from importlib import import_module
from typing import Any

import torch
from torch import nn

__all__ = ["build", "fingerprint", "spec_of"]


def spec_of(component: object) -> dict[str, Any]:
    """Returns the class path and the constructor arguments (attribute `init_args`) of a component."""
    cls = type(component)
    init_args: dict[str, Any] = dict(component.init_args)  # type: ignore[attr-defined]
    return {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": init_args}


def build(spec: dict[str, Any], expected: type = object, **overrides: Any) -> Any:
    """Builds what a spec describes; `overrides` replace arguments.

    A spec may come from a stranger's `config.json`, which must not choose what is called.

    Raises:
        ValueError: If the class path does not name an importable class, or one that is no subclass of `expected`.
    """
    module, _, name = spec["class_path"].rpartition(".")
    try:
        cls = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"class_path {spec['class_path']!r} cannot be imported ({error}); expected the full path "
            "of a class, such as stitchvm.backbones.sd3.SD3Backbone"
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, expected)):
        raise ValueError(
            f"class_path {spec['class_path']!r} is no {expected.__name__}, and is not called: was the file tampered "
            "with?"
        )
    return cls(**{**spec["init_args"], **overrides})


def fingerprint(module: nn.Module, leave_out: Iterable[nn.Module] = ()) -> str:
    """Returns 16 hexadecimal digits that tell two sets of weights of one architecture apart.

    Up to 64 values of every parameter are hashed in bfloat16, so that it takes milliseconds and is the same for
    weights loaded in float32 and in bfloat16; float16 rounds those of a float32 file to others. LoRA adapters on
    top of the weights are not looked at, nor are the parameters of submodules in `leave_out`.
    """
    digest = hashlib.blake2b(digest_size=8)
    skip = {id(parameter) for part in leave_out for parameter in part.parameters()}
    base = {
        name.replace(".base_layer", ""): parameter
        for name, parameter in module.named_parameters()
        if "lora_" not in name and id(parameter) not in skip
    }
    for name, parameter in sorted(base.items()):
        values = parameter.detach().flatten()[:64].to("cpu", torch.bfloat16)
        digest.update(name.encode())
        digest.update(values.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
