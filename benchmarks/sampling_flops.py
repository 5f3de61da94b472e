"""FLOPs of sampling counted on the calls themselves, on the meta device: the real sizes, on any machine.

Two per multiply-add, attention as two matrix products forward and four backward, whatever its kernel does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from unittest import mock

import torch
from sampling_counts import Part, Units
from sampling_setups import Rig
from sampling_steps import part_calls
from sampling_variants import Variant, field_of, make_value
from steps import meta_tensors
from torch import Tensor

from stitchvm.modules.cost_flops import FlopCounter
from stitchvm.samplers.field import Field
from stitchvm.values import stitched

__all__ = ["counted_parts", "counted_units", "meta_sampling"]


def counted_parts(rig: Rig) -> dict[str, Part]:
    """Returns each part of the computation, for a rig on the meta device and within `meta_sampling`."""
    parts = {}
    for name, (call, x) in part_calls(rig).items():
        leaf = x.detach().requires_grad_()
        with FlopCounter() as counter:
            forward, y = counter.of(call, leaf)
            backward, _ = counter.of(torch.autograd.grad, y.sum(), leaf)
        parts[name] = Part(forward, backward)
    return parts


def counted_units(rig: Rig, variants: list[Variant]) -> dict[Variant, Units]:
    """Returns what each variant's steps are made of, from the very calls a sampler makes, with one row.

    What a variant does not ask (a value for guidance, a gradient for FK steering) is not counted but 0.

    Arguments:
        rig: A rig on the meta device, within `meta_sampling`.
        variants: The variants; those that differ in particles or proposals only are counted once.
    """
    z = torch.randn(1, rig.generator.latent_channels, *rig.latent_size, device=rig.device)
    t, row = torch.tensor(0.5), torch.zeros(1, dtype=torch.long)
    known: dict[Variant, Units] = {}
    plain = field_of(rig, variants[0], None)
    with FlopCounter() as counter:
        with torch.no_grad():
            decoded, pixels = counter.of(rig.generator.vae.decode, z)
            judged = decoded + counter.of(rig.reward.embed, pixels)[0]
        fresh, _ = counter.of(plain.velocity, z, t, row)
        for variant in variants:
            key = replace(variant, proposals=1, decode_batch=None)
            if key in known:
                continue
            value = make_value(rig, variant)
            field = field_of(rig, variant, value)
            continued, asked, gradient, left = fresh, 0.0, 0.0, None
            if value is not None and variant.method == "fk":
                asked, (_, left) = counter.of(field.value, z, t, row)
            elif value is not None:
                gradient, (_, _, left) = counter.of(field.value_gradient, z, t, row)
            if left is not None:
                continued, _ = counter.of(field.velocity, z, t, row, left)
            known[key] = Units(fresh, continued, asked, gradient, judged, decoded)
    return {v: known[replace(v, proposals=1, decode_batch=None)] for v in variants}


@contextmanager
def meta_sampling() -> Iterator[None]:
    """Lets values and velocities run on the meta device, where no number can be looked at: without checks."""
    from torch._C import TensorBase

    def truth(x: Tensor) -> bool:
        return False if x.is_meta else TensorBase.__bool__(x)

    with ExitStack() as stack:
        stack.enter_context(meta_tensors())
        for owner, name, instead in (
            (torch.Tensor, "__bool__", truth),
            (stitched, "same_null", lambda backbone, null: True),
            (Field, "check", lambda *_: None),
        ):
            stack.enter_context(mock.patch.object(owner, name, instead))
        yield
