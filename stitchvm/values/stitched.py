"""The stitched value V_ω(z_t) = r_φ^{≥j}(s_ψ(u_θ^{≤i}(z_t))), Eq. (6): i of L blocks and the reward's tail."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from stitchvm.value_model import StitchedValueModel
from stitchvm.values.base import Generators, Value, same_level
from stitchvm.values.parts import Parts, ValueFactory, frozen


class StitchedValue(Value):
    """A distilled value model as a value: a deterministic function of z_t and t, differentiable in z_t.

    The backbone's condition is its own null text, whatever the prompts.

    Arguments:
        value_model: The stitched value model.
    """

    def __init__(self, value_model: StitchedValueModel) -> None:
        super().__init__(value_model.reward)
        self.value_model = value_model

    def embed(
        self,
        z_t: Tensor,
        t: Tensor,
        *,
        prompts: Sequence[str] | None = None,
        generator: Generators = None,
    ) -> Tensor:
        """Returns the image embeddings with shape (B, E); prompts and generator are not used."""
        return self.value_model(z_t, same_level(t, z_t)).image


class StitchedFactory(ValueFactory):
    """Loads a value model that `stitchvm fit` wrote, sharing the run's reward.

    Arguments:
        path: A folder, `world:NAME` or a hub id.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def __call__(self, parts: Parts) -> StitchedValue:
        """Returns the value; its reward becomes the run's if none is configured."""
        reward = parts.reward if parts.has("reward") else None
        model = StitchedValueModel.from_pretrained(self.path, reward=reward)
        parts.offer_reward(model.reward)
        return StitchedValue(frozen(model))

    def sources(self) -> dict[str, str]:
        """Returns the value model's path."""
        return {"value_model": self.path}
