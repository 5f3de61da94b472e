"""`torch.compile` of the parts that networks repeat: blocks of transformers, a VAE's encoder and decoder.

Compiled by the block, a network is compiled in a minute instead of many, since all blocks of one kind share one result,
and what runs is nearly as fast as the network compiled as a whole: what is won is that norms, gates, activations and
residual sums are done in one pass over memory each, which on a GPU take as long as the matrix products beside them.

The first call of each kind (shape, with or without gradient, adapters on or off) compiles, for seconds; with more kinds
than `KINDS` the rest runs uncompiled. Values change in their last digits only.
"""

from __future__ import annotations

import inspect
import os
import shutil
import sysconfig
import warnings
from collections.abc import Iterable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

__all__ = ["compile_forward", "require_compiler"]

BACKEND = "inductor"
KINDS = 64


def compile_forward(modules: Iterable[nn.Module], backend: bool | str = True) -> None:
    """Compiles the forward pass of modules, in place; what is compiled already stays.

    A module becomes one of a class that is called as its own, and has its forward pass compiled. State dicts, hooks and
    adapters stay as they are. Copies and pickled modules are not compiled. Under FSDP2, compile before sharding.

    Arguments:
        modules: The modules, each a whole graph.
        backend: That of `torch.compile` by name; True for inductor.
    """
    # diffusers looks its versions up in a cached function
    warnings.filterwarnings(
        "ignore", message=r"Dynamo detected a call to a `functools\.lru_cache`"
    )
    for module in modules:
        cls: Any = type(module)
        if not hasattr(cls, "uncompiled"):
            module.__class__ = _compiled(cls, BACKEND if backend is True else str(backend))


@cache
def _compiled(cls: Any, backend: str) -> type[nn.Module]:
    """Returns a class like another whose forward pass is compiled, once for all of its instances."""
    options: dict[str, Any] = {}
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        options["recompile_limit"] = KINDS
    else:  # for this thread only, in some releases
        config: Any = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, KINDS)

    def reduced(self: Any, protocol: Any) -> Any:
        return cls.__new__, (cls,), self.__getstate__()

    members = {
        "forward": torch.compile(cls.forward, backend=backend, dynamic=False, **options),
        "uncompiled": cls,
        "__reduce_ex__": reduced,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
    }
    return type(cls.__name__, (cls,), members)


def require_compiler(backend: bool | str) -> None:
    """Raises ValueError if there is nothing to compile with, before networks are loaded.

    Arguments:
        backend: What `compile` says: False, True, or a backend.
    """
    if backend is False:
        return
    name = BACKEND if backend is True else str(backend)
    if name != "inductor":
        known = torch._dynamo.list_backends(None)
        if name not in known:
            raise ValueError(
                f"compile: {name}: expected true, false or one of {', '.join(known)}."
            )
        return
    missing = []
    gpu = torch.cuda.is_available()
    names = ("CC", "cc", "gcc", "clang") if gpu else ("CXX", "c++", "g++", "clang++", "cl")
    if not any(shutil.which(os.environ.get(name, name)) for name in names):
        what = "C compiler (gcc, clang" if gpu else "C++ compiler (g++, clang++"
        missing.append(f"a {what}; {names[0]} names another)")
    if gpu and find_spec("triton") is None:
        missing.append("the package triton")
    if gpu and not Path(sysconfig.get_paths()["include"], "Python.h").is_file():
        missing.append("Python's headers (python3-dev)")
    if missing:
        raise ValueError(
            f"compile: true needs {' and '.join(missing)}, which this machine does not have: install it, or say "
            "compile: false, which is slower and does the same."
        )
