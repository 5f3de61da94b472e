r"""LoRA adapters on a generator's transformer: the policy of training-time alignment.

    W x + (α/r)·B·A·x,   A ~ N(0, 1/r²), B = 0 at the start

with r = 32, α = 64 on the attention projections of the blocks. Which ones is ambiguous in the paper, whose list of bare
names also matches the second attention (`attn2`) that SD 3.5 Medium has in 13 blocks; the reference that it follows has
names with the prefix "attn.", which leaves it out:

    SD 3.5 Medium, attn2 = False    191 modules, 18.78 M weights    (DiffusionNFT and Flow-GRPO as coded)
    SD 3.5 Medium, attn2 = True     243 modules, 23.89 M weights    (the paper's list as printed)

Adapters are float32 whatever the frozen weights are. They are *applied* in the dtype of their input, as autocast would:
a float32 product beside bfloat16 ones is many times slower, and what users load (`export.py`) runs in one dtype anyway.

Switching sets the flags that peft's layers read, and nothing else: peft's own `set_adapter` and `disable_adapter` also
set `requires_grad`, so that a switch before `backward()` leaves no gradient behind.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stitchvm.adapters.policy import DEFAULT, Policy
from stitchvm.randomness import keyed_generator

__all__ = ["PolicyAdapters", "is_adapter_key", "lora_targets"]

PROJECTIONS = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "to_add_out",
)


def lora_targets(attn2: bool = False) -> list[str]:
    """Returns the paper's eight projections, of the first attention only or of `attn2` too."""
    return list(PROJECTIONS) if attn2 else [f"attn.{name}" for name in PROJECTIONS]


def is_adapter_key(key: str) -> bool:
    """Returns whether a key of a state dict belongs to an adapter: what a lean checkpoint keeps of a transformer."""
    return ".lora_A." in key or ".lora_B." in key


class PolicyAdapters(Policy):
    """LoRA adapters "default" (trained) and its copies on a transformer, whose own weights are frozen.

    Arguments:
        transformer: A diffusers transformer without adapters, e.g. `generator.transformer`.
        r: The rank r.
        alpha: α; the update is scaled by α/r.
        attn2: Which reading of the paper's list: with the second attention, or without.
        targets: Names of linear layers instead of that list; a layer matches if its name is one or ends in ".name".
        copies: The copies; DiffusionNFT has ("old", "ema"), the others ("ema",).
        seed: The seed of A: the same weights on every rank, device and order of layers.

    Attributes:
        r: The rank.
        alpha: α.
        targets: The names that were looked for.
        modules: The full names of the layers that were found, in the model's order.

    Raises:
        ValueError: If a target matches nothing, the rank is not positive, or there are adapters already.
    """

    def __init__(
        self,
        transformer: Any,
        r: int = 32,
        alpha: float = 64,
        *,
        attn2: bool = False,
        targets: Sequence[str] | None = None,
        copies: Sequence[str] = ("old", "ema"),
        seed: int = 0,
    ) -> None:
        self.r, self.alpha = r, alpha
        self.targets = lora_targets(attn2) if targets is None else list(targets)
        if r < 1 or not alpha > 0:
            raise ValueError(f"r = {r}, alpha = {alpha}: expected a rank ≥ 1 and alpha > 0.")
        self.modules = _matching(transformer, self.targets)
        super().__init__(transformer, copies)
        transformer.requires_grad_(False)
        self._layers = self._inject()
        self._halves: list[tuple[Any, bool]] = [
            (half, name == DEFAULT)
            for layer in self._layers
            for halves in (layer.lora_A, layer.lora_B)
            for name, half in halves.items()
        ]
        self._start(seed)

    @property
    def scale(self) -> float:
        """The factor α/r of the update."""
        return self.alpha / self.r

    def parameters(self, name: str = DEFAULT) -> dict[str, Tensor]:
        """Returns the weights of an adapter by "module.lora_A.weight", in the model's order; shards under FSDP2."""
        self._known(name)
        return {
            f"{module}.{half}.weight": getattr(layer, half)[name].weight
            for module, layer in zip(self.modules, self._layers, strict=True)
            for half in ("lora_A", "lora_B")
        }

    def trainable(self) -> list[nn.Parameter]:
        """Returns what an optimiser takes: the weights of "default"."""
        return [p for p in self.parameters().values() if isinstance(p, nn.Parameter)]

    # How the adapters come about.

    def _inject(self) -> list[Any]:
        from peft import LoraConfig

        for name in (DEFAULT, *self.copies):
            config = LoraConfig(
                r=self.r,
                lora_alpha=self.alpha,
                target_modules=self.targets,
                init_lora_weights="gaussian",
            )
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Already found a `peft_config`")
                self.transformer.add_adapter(config, name)
        layers = [self.transformer.get_submodule(module) for module in self.modules]
        found = [n for n, m in self.transformer.named_modules() if hasattr(m, "lora_A")]
        assert found == self.modules, "peft has put adapters elsewhere than its rule says"
        for layer in layers:
            layer.cast_input_dtype_enabled = False  # see `_Half`
            for half in (layer.lora_A, layer.lora_B):
                for name in half:
                    half[name] = _Half(half[name].weight, trained=name == DEFAULT)
            layer._active_adapter = [DEFAULT]
        return layers

    @torch.no_grad()
    def _start(self, seed: int) -> None:
        for key, weight in self.parameters().items():
            if weight.is_meta:
                return
            if key.endswith("lora_A.weight"):
                # as peft's "gaussian", but not from the global random state
                generator = keyed_generator("lora", seed, key)
                a = torch.randn(weight.shape, generator=generator, device=generator.device)
                weight.copy_(a / self.r)
            else:
                weight.zero_()
        for name in self.copies:
            self.follow(name, 0.0)

    # Switching.

    def _switch(self, active: str | None) -> None:
        # past nn.Module's attribute machinery, here and below: some hundred layers at every switch
        flags = {"_active_adapter": [active or DEFAULT], "_disable_adapters": active is None}
        for layer in self._layers:
            layer.__dict__.update(flags)

    def _verify(self) -> None:
        active, off = [self._active or DEFAULT], self._active is None
        for module, layer in zip(self.modules, self._layers, strict=True):
            flags = layer.__dict__
            if (
                flags["_active_adapter"] != active
                or flags["_disable_adapters"] is not off
                or flags["merged_adapters"]
            ):
                self._past_the_policy(module)
        for half, trained in self._halves:
            if half._parameters["weight"].requires_grad is not trained:
                self._past_the_policy("an adapter")

    def _past_the_policy(self, module: str) -> NoReturn:
        raise RuntimeError(
            f"{module} does not run as '{self._active or 'off'}' with gradients for '{DEFAULT}' alone: somebody has "
            "switched, merged or frozen adapters past the policy (set_adapter, disable_adapters, fuse_lora, "
            "requires_grad_). Use policy.use(name) and policy.off()."
        )

    @contextmanager
    def _again(self, active: str | None) -> Iterator[None]:
        before = self._active
        try:
            self._set(active)
            yield
        finally:
            self._set(before)


class _Half(nn.Linear):
    """A or B: a float32 weight that is applied in the dtype of its input."""

    def __init__(self, weight: Tensor, trained: bool) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight.detach().float(), requires_grad=trained)
        self.register_parameter("bias", None)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.to(input.dtype))


def _matching(transformer: nn.Module, targets: list[str]) -> list[str]:
    if any(hasattr(module, "lora_A") for module in transformer.modules()):
        raise ValueError(
            "the transformer has adapters already: give it to one policy only, and unload other LoRA weights "
            "(`unload_lora_weights`, or fuse them)."
        )
    linear = [
        name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)
    ]
    hits = {
        target: [n for n in linear if n == target or n.endswith(f".{target}")]
        for target in targets
    }
    empty = [target for target, names in hits.items() if not names]
    if empty or not targets:
        kinds = sorted({name.split(".", 2)[-1] for name in linear if name.count(".") >= 2})
        raise ValueError(
            f"LoRA targets {empty or targets} match no linear layer of {type(transformer).__name__}: its blocks have "
            f"{', '.join(kinds)}."
        )
    wanted = {name for names in hits.values() for name in names}
    return [name for name in linear if name in wanted]
