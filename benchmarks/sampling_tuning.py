"""Which attention kernel and which layout of the decoder are fastest here: found once a rig, used by every variant."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from common import seconds_of
from sampling_setups import Rig
from sampling_steps import part_calls
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}


def attention(name: str) -> AbstractContextManager[Any]:
    """Returns a context in which a kernel is preferred where it can be used; "auto" leaves the choice to torch."""
    if name == "auto":
        return nullcontext()
    rest = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    order = list(dict.fromkeys([BACKENDS[name], *rest]))
    return sdpa_kernel(order, set_priority=True)


@dataclass(frozen=True)
class Tuning:
    """What was fastest.

    Attributes:
        attention: A key of `BACKENDS`, or "auto".
        layout: The VAE's memory layout, a key of `LAYOUTS`.
        dtype: The VAE's dtype.
        records: All that was tried.
    """

    attention: str
    layout: str
    dtype: torch.dtype
    records: list[dict[str, Any]]

    def apply(self, rig: Rig) -> None:
        """Gives the VAE its layout and dtype."""
        network = rig.generator.vae.network
        nn.Module.to(network, dtype=self.dtype, memory_format=LAYOUTS[self.layout])


def tune(rig: Rig, repeats: int) -> Tuning:
    """Returns what is fastest, and leaves the VAE so.

    Attention is tried on one pass of the denoiser, the decoder on one latent forward and backward, since guidance by
    Tweedie values spends its time there.
    """
    parts = part_calls(rig)
    records: list[dict[str, Any]] = []

    def tried(part: str, choice: str, backward: bool) -> float:
        call, x = parts[part]

        def run() -> None:
            leaf = x.detach().requires_grad_(backward)
            with torch.set_grad_enabled(backward):
                y = call(leaf)
            if backward:
                torch.autograd.grad(y.sum(), leaf)

        try:
            seconds = seconds_of(run, rig.device, repeats)
        except torch.OutOfMemoryError:
            seconds = float("inf")
        records.append({"tuning": part, "choice": choice, "seconds": seconds})
        return seconds

    times = {}
    for name in ("auto", *BACKENDS):
        with attention(name):
            times[name] = tried("denoiser", f"attention {name}", backward=False)
    best = min(times, key=lambda name: times[name])
    own = rig.generator.vae.dtype
    forms = [Tuning(best, layout, own, records) for layout in LAYOUTS]
    if own != torch.float32:
        forms.append(Tuning(best, "channels last", torch.float32, records))
    decoder = {}
    with attention(best):
        for form in forms:
            form.apply(rig)
            name = f"{form.layout}, {str(form.dtype).removeprefix('torch.')}"
            decoder[form.layout, form.dtype] = tried("decoder", name, backward=True)
    fastest = min(forms, key=lambda form: decoder[form.layout, form.dtype])
    fastest.apply(rig)
    return fastest
