"""The average score of several images from the average of their unit embeddings: exact where the score is affine.

    r(ẽ) = a·ẽ + b  for unit ẽ,  m = mean of ẽ:      mean of r = a·m + b = b + ‖m‖·(r(m) − b),   b = (r(m) + r(−m))/2

Rewards bring their argument to unit length, so that r(m) = a·m/‖m‖ + b.
"""

from __future__ import annotations

from torch import Tensor

from stitchvm.rewards.base import Reward

__all__ = ["score_of_average"]


def score_of_average(reward: Reward, mean: Tensor, text: Tensor | None = None) -> Tensor:
    """Returns the average score of samples, with shape (B,), from the average of their unit embeddings.

    Arguments:
        reward: A reward of the library.
        mean: The averages, with shape (B, E).
        text: The text embeddings, with shape (B, E), or None.

    Raises:
        ValueError: If the reward is not affine.
    """
    if not reward.affine:
        raise ValueError(
            f"the score of {reward.id} is not affine in the image embedding, so that an average embedding has "
            "not the average score: bind the value to prompts and call that, which scores every sample."
        )
    ahead, behind = reward.score(mean, text), reward.score(-mean, text)
    return (ahead + behind) / 2 + mean.norm(dim=-1) * (ahead - behind) / 2
