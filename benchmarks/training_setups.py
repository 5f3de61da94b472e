"""What is fine-tuned: the shipped world, and SD 3.5 Medium at 512² with random weights, with R = DFN-CLIP + HPSv2 (80).

Real networks are those of `sampling_setups.py`: frozen weights bfloat16, LoRA float32, prompts of the real length, text
encoders neither run nor in memory, as after `encode_ahead`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from sampling_setups import ARCHITECTURES, RandomReward, SamplingSetup, random_networks
from setups import CLIP_H, NULL_TOKENS, random_clip

from stitchvm.adapters.lora import PolicyAdapters
from stitchvm.backbones.text import Condition
from stitchvm.generator import Generator
from stitchvm.modules.alignment import Alignment
from stitchvm.modules.draft import DRaFT
from stitchvm.modules.nft import DiffusionNFT
from stitchvm.modules.stages import Stages
from stitchvm.rewards.base import Reward
from stitchvm.rewards.clip import CLIPReward
from stitchvm.rewards.hpsv2 import HPSv2Reward
from stitchvm.rewards.weighted import WeightedReward
from stitchvm.value_model import StitchedValueModel
from stitchvm.values.base import Value
from stitchvm.values.parts import Parts, ValueFactory
from stitchvm.values.stitched import StitchedFactory, StitchedValue
from stitchvm.values.terminal import TerminalValue
from stitchvm.values.weighted import Term, WeightedFactory, WeightedValue

__all__ = ["TRAINING_SETUPS", "Trained", "TrainingSetup", "build", "trainings"]

Settings = dict[str, Any]


@dataclass(frozen=True)
class TrainingSetup:
    """A generator with its reward, and the settings of its configs.

    Attributes:
        name: Its name on the command line.
        resolution: The side of the images in pixels.
        draft: DRaFT's settings, `draft1_stitched_….yaml`.
        nft: DiffusionNFT's settings, `nft_stitched_….yaml`.
        rank: The rank r of the adapters; α = 2r.
        text_tokens: The tokens of a prompt; None for the world.
        reduced: Whether every size is shrunk.
    """

    name: str
    resolution: int
    draft: Settings
    nft: Settings
    rank: int
    text_tokens: int | None = None
    reduced: bool = False

    @property
    def real(self) -> bool:
        """Whether it is a published architecture, not the world."""
        return self.text_tokens is not None

    def shrunk(self) -> TrainingSetup:
        """Returns the same with small sizes."""
        small = {"micro_batch": 2}
        nft = self.nft | small | {"rollout_batch": 4, "group_size": 4}
        return replace(
            self,
            resolution=64,
            draft=self.draft | small,
            nft=nft,
            rank=2,
            text_tokens=9,
            reduced=True,
        )


_DRAFT: Settings = {"num_steps": 10, "stop": [3, 7], "lam": 0.01}
_NFT: Settings = {"lam": 1e-4, "fraction": 0.99}
_MEDIUM = TrainingSetup(
    "sd35m",
    512,
    _DRAFT | {"micro_batch": 8},
    _NFT
    | {"num_steps": 25, "stop": [12, 17], "group_size": 24, "micro_batch": 9, "rollout_batch": 24},
    32,
    NULL_TOKENS,
)
TRAINING_SETUPS = {
    setup.name: setup
    for setup in (
        TrainingSetup(
            "world",
            32,
            _DRAFT | {"micro_batch": 16},
            _NFT
            | {"num_steps": 10, "stop": [5, 7], "group_size": 8, "micro_batch": 32}
            | {"rollout_batch": 64},
            16,
        ),
        _MEDIUM,
        # 77 of CLIP and 128 of T5, of which DiffusionNFT's reference makes its prompts
        replace(_MEDIUM, name="sd35m_205", text_tokens=77 + 128),
    )
}


@dataclass(frozen=True)
class Trained:
    """One way of fine-tuning.

    Attributes:
        method: "DRaFT-1", "DRaFT-3" or "NFT".
        estimator: "terminal" or "stitched".
        checkpointing: Whether the transformer's blocks are run again in the backward pass.
        settings: What differs from the setup's.
    """

    method: str
    estimator: str
    checkpointing: bool = False
    settings: tuple[tuple[str, Any], ...] = field(default=())

    @property
    def name(self) -> str:
        """Its name in tables."""
        words = [f"{self.method} {self.estimator}"]
        words += [f"{name} = {value}" for name, value in self.settings]
        return ", ".join(words + ["checkpointing"] * self.checkpointing)


def trainings(checkpointing: bool = False) -> list[Trained]:
    """Returns what is compared, the terminal reward before the stitched value."""
    methods, values = ("DRaFT-1", "DRaFT-3", "NFT"), ("terminal", "stitched")
    return [Trained(method, value, checkpointing) for method in methods for value in values]


class Built(ValueFactory):
    """Builds a value by a function of the run's parts."""

    def __init__(self, make: Callable[[Parts], Value]) -> None:
        self.make = make

    def __call__(self, parts: Parts) -> Value:
        """Returns the value."""
        return self.make(parts)


class ProcessStages(Stages):
    """Stages by this process' own time, which leaves out most of what others do on a shared machine."""

    def _mark(self) -> object:
        return time.process_time()


def build(
    setup: TrainingSetup, trained: Trained, device: torch.device, parts: Any = None
) -> Alignment:
    """Returns a fine-tuning with its networks on a device.

    Arguments:
        setup: What is fine-tuned.
        trained: How.
        device: Where; "meta" to count only.
        parts: The networks of another method with the same value, to be taken as they are.
    """
    generator, value = None, None
    if parts is None:
        generator, value = (real if setup.real else world)(setup, trained, device)
    nft = trained.method == "NFT"
    settings: Settings = dict(setup.nft if nft else setup.draft) | dict(trained.settings)
    if trained.estimator == "terminal":
        settings["stop"] = None
    if not nft:
        settings["backprop_steps"] = int(trained.method.removeprefix("DRaFT-"))
    cls: Any = DiffusionNFT if nft else DRaFT
    module: Alignment = cls(
        generator=lambda: generator,
        value=value,
        policy=partial(PolicyAdapters, r=setup.rank, alpha=2 * setup.rank),
        height=setup.resolution,
        width=setup.resolution,
        gradient_checkpointing=trained.checkpointing,
        **settings,
    )
    module.to(device)
    module.parts = parts
    module.configure_model()
    if device.type == "cpu" and torch.get_num_threads() == 1:
        module.stages = ProcessStages(device)
    return module


def world(
    setup: TrainingSetup, trained: Trained, device: torch.device
) -> tuple[Generator, ValueFactory]:
    """Returns the world's generator, and its terminal reward or its two stitched values."""
    generator = Generator("world:sd3", text_tokens=1)
    rewards: dict[str, Callable[[], Reward]] = {
        "clip": partial(CLIPReward, "world:clip"),
        "hps": partial(HPSv2Reward, model="world:hps"),
    }
    if trained.estimator == "terminal":
        return generator, Built(lambda parts: TerminalValue(parts.vae, WeightedReward(rewards)))
    terms = {
        name: Term(StitchedFactory(f"world:value_{name}", share_generator=True), reward=reward)
        for name, reward in rewards.items()
    }
    return generator, WeightedFactory(terms)


def real(
    setup: TrainingSetup, trained: Trained, device: torch.device
) -> tuple[Generator, ValueFactory]:
    """Returns SD 3.5 Medium, and its terminal reward or stitched values of ViT-H towers, all random."""
    like = SamplingSetup("", "sd35m", CLIP_H, setup.resolution, "squash", reduced=setup.reduced)
    generator, dfn = random_networks(like, device)
    tokens = setup.text_tokens or ARCHITECTURES["sd35m"].text_tokens
    null, cond = (Condition(c.tokens[:, :tokens], c.pooled) for c in generator.conditions)
    generator.conditions = (null, cond)
    hps = random_clip("ViT-H-14", "pad", device, setup.reduced, cls=RandomReward, dtype="bfloat16")
    rewards = {"dfn_clip": dfn, "hpsv2": hps}

    def make(parts: Parts) -> Value:
        if trained.estimator == "terminal":
            value: Value = TerminalValue(parts.vae, WeightedReward(rewards))
        else:
            backbone = generator.null_branch()
            models = {n: StitchedValueModel(backbone, r, (4, 1)) for n, r in rewards.items()}
            value = WeightedValue({n: StitchedValue(m) for n, m in models.items()})
        return value.eval().requires_grad_(False)

    return generator, Built(make)
