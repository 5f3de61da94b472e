"""What values are built from, shared, and the light descriptions that build them.

A YAML file names estimators by factories: small objects of plain numbers and paths that are made when the
file is parsed and build nothing until they are called with `Parts`. All values of a run then share one
reward, one generator and one VAE.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from torch import nn

from stitchvm.backbones.base import Backbone
from stitchvm.rewards.base import Reward
from stitchvm.spec import fingerprint, spec_of
from stitchvm.value_model import used_weights
from stitchvm.values.base import Value, VelocityModel


class Parts:
    """The reward, generator and VAE of a run, each built when first asked for, once, frozen.

    Arguments:
        reward: Builds the reward.
        generator: Builds the generator (`.velocity`, `.encode_prompts`, `.vae`).
        vae: Builds the VAE; the generator's own by default.
    """

    def __init__(
        self,
        reward: Callable[[], Reward] | None = None,
        generator: Callable[[], Any] | None = None,
        vae: Callable[[], Any] | None = None,
    ) -> None:
        self._factories = {"reward": reward, "generator": generator, "vae": vae}
        self._built: dict[str, Any] = {}
        self._run: Parts | None = None  # of a term: the parts of the whole sum
        self._rewards: list[Reward] = []  # that are in memory, of all terms
        self._backbones: list[Backbone] = []  # that value models brought along, likewise

    def of_term(self, reward: Callable[[], Reward] | None = None) -> Parts:
        """Returns the parts of one term of a sum: the same generator and VAE, and its own reward or the run's.

        A value model that names no reward brings its own; where that is in memory already, it is shared.

        Arguments:
            reward: Builds the term's reward; the run's by default.
        """
        term = Parts(
            reward,
            (lambda: self.generator) if self.has("generator") else None,
            (lambda: self.vae) if self.has("vae") else None,
        )
        term._run, term._rewards, term._backbones = self, self._rewards, self._backbones
        return term

    def known_reward(self, spec: dict[str, Any]) -> Reward | None:
        """Returns the reward in memory that a spec with a fingerprint describes, or None.

        Arguments:
            spec: What `config.json` of a value model says of its reward.
        """
        run = self._run
        while run is not None:  # a sum may be a term of another
            if run.has("reward"):
                _ = run.reward
            run = run._run
        for reward in self._rewards:
            if described(spec, reward):
                return reward
        return None

    def known_backbone(self, config: dict[str, Any]) -> Backbone | None:
        """Returns a backbone that an earlier value model brought along and this one can run on, or None.

        Arguments:
            config: The value model's `config.json`.
        """
        wanted, (i, _) = config["backbone"], config["stitch_point"]
        for backbone in self._backbones:
            spec = spec_of(backbone)
            settings = spec["init_args"] | {"max_depth": i}
            if (
                (spec["class_path"], settings) == (wanted["class_path"], wanted["init_args"])
                and backbone.loaded_blocks >= i
                and used_weights(backbone, i) == wanted["fingerprint"]
            ):
                return backbone
        return None

    def offer_backbone(self, backbone: Backbone) -> None:
        """Takes the backbone of a value model, for others on the same; a borrowed one is its owner's to lend."""
        if getattr(backbone, "borrowed", False):
            return
        if not any(backbone is known for known in self._backbones):
            self._backbones.append(backbone)

    def _get(self, name: str) -> Any:
        if name not in self._built:
            factory = self._factories[name]
            if factory is None and name == "reward" and self._run is not None:
                self._built[name] = self._run.reward
                return self._built[name]
            if factory is None:
                raise ValueError(
                    f"an estimator needs a {name}, but none is configured: give `{name}` beside the "
                    "estimators."
                )
            self._built[name] = frozen(factory())
            if name == "reward":
                self._rewards.append(self._built[name])
        return self._built[name]

    def has(self, name: str) -> bool:
        """Returns whether "reward", "generator" or "vae" was built or can be."""
        return name in self._built or self._factories[name] is not None

    def offer_reward(self, reward: Reward) -> None:
        """Takes a reward that a value model brought along, if none is configured."""
        if not self.has("reward"):
            self._built["reward"] = frozen(reward)
            self._rewards.append(reward)

    @property
    def reward(self) -> Reward:
        """The reward. Raises ValueError if none is configured; so do the other parts."""
        return self._get("reward")

    @property
    def generator(self) -> VelocityModel:
        """The generator."""
        return self._get("generator")

    @property
    def vae(self) -> Any:
        """The VAE: its own, else the generator's."""
        if not self.has("vae") and self.has("generator"):
            return self.generator.vae
        return self._get("vae")


class ValueFactory(ABC):
    """A light description of a value; called with the run's parts, it builds it."""

    @abstractmethod
    def __call__(self, parts: Parts) -> Value:
        """Returns the value, frozen and in evaluation mode."""

    def sources(self) -> dict[str, str]:
        """Returns what it loads from disk or hub beyond the parts: names to paths or ids."""
        return {}


def described(spec: dict[str, Any], reward: Reward) -> bool:
    """Returns whether a spec with a fingerprint, as in `config.json` of a value model, is that of a reward."""
    return spec == spec_of(reward) | {"fingerprint": fingerprint(reward)}


def frozen(part: Any) -> Any:
    """Returns the part in evaluation mode, its parameters without gradients (z_t still gets its own)."""
    if isinstance(part, nn.Module):
        part.eval().requires_grad_(False)
    return part
