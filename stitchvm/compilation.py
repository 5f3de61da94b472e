"""`torch.compile` of the parts that networks repeat: blocks of transformers, a VAE's encoder and decoder.

Compiled by the block, a network is compiled in a minute instead of many, since all blocks of one kind share one result,
and what runs is nearly as fast as the network compiled as a whole: what is won is that norms, gates, activations and
residual sums are done in one pass over memory each, which on a GPU take as long as the matrix products beside them.

The first call of each kind (shape, with or without gradient, adapters on or off) compiles, for seconds; with more kinds
than `KINDS` the rest runs uncompiled. Values change in their last digits only.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterable
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

__all__ = ["compile_forward", "require_compiler"]

BACKEND = "inductor"
KINDS = 64


def compile_forward(modules: Iterable[nn.Module], backend: bool | str = True) -> None:
    """Compiles the forward pass of modules, in place; what is compiled already stays.

    State dicts, hooks (those of FSDP2 among them) and adapters stay as they are, and a copy of a module runs with its
    own weights.

    Arguments:
        modules: The modules, each a whole graph.
        backend: That of `torch.compile` by name; True for inductor.
    """
    backend = BACKEND if backend is True else str(backend)
    # diffusers looks its versions up in a cached function
    warnings.filterwarnings(
        "ignore", message=r"Dynamo detected a call to a `functools\.lru_cache`"
    )
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, KINDS)
    for module in modules:
        if "forward" not in vars(module):
            cls: Any = type(module)
            forward: Any = partial(_compiled(cls, backend), module)
            module.forward = forward


def require_compiler(backend: bool | str) -> None:
    """Raises ValueError if there is nothing to compile with, before networks are loaded.

    Arguments:
        backend: What `compile` says: False, True, or a backend.
    """
    if backend is False or (BACKEND if backend is True else backend) != "inductor":
        return
    missing = []
    names = (os.environ.get("CC", ""), os.environ.get("CXX", ""), "cc", "gcc", "clang", "cl")
    if not any(shutil.which(name) for name in names if name):
        missing.append("a C compiler (gcc or clang; CC names another)")
    if torch.cuda.is_available() and find_spec("triton") is None:
        missing.append("the package triton")
    if missing:
        raise ValueError(
            f"compile: true needs {' and '.join(missing)}, which this machine does not have: install it, or say "
            "compile: false, which is slower and does the same."
        )


@cache
def _compiled(cls: Any, backend: str) -> Callable[..., Any]:
    """Returns the compiled forward pass of a class, as a function of the module, so that its instances share it."""
    return torch.compile(cls.forward, backend=backend, dynamic=False)
