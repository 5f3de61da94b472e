"""The clean rewards, and the exact checker, that every finished image is scored with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stitchvm.rewards.base import NotFiniteError, Reward
from stitchvm.rewards.weighted import WeightedReward
from stitchvm.values.parts import Parts, frozen

__all__ = ["Judges", "encoded_alone"]


class Judges:
    """Scores finished images.

    Arguments:
        factories: Build the rewards, by name.
        parts: The run's parts: its reward judges, too, where it is built in the same way.
        reward: Builds the run's reward, if there is one.
        checker: Whether the embedded world's checker reads the images.
        device: Where rewards run. From a GPU they go back to CPU memory after each use.

    Attributes:
        rewards: The rewards by name.
        resident: The names of those that are the run's, and stay where they are.
    """

    def __init__(
        self,
        factories: Mapping[str, Callable[[], Reward]],
        parts: Parts,
        reward: Callable[[], Reward] | None,
        checker: bool,
        device: torch.device,
    ) -> None:
        self.checker, self.device = checker, device
        # a dict, so that no module takes them for parts of its own and moves them
        self.rewards: dict[str, Reward] = {}
        self.resident: set[str] = set()
        for name, factory in factories.items():
            if same(factory, reward):
                self.rewards[name] = parts.reward
                self.resident.add(name)
            else:
                self.rewards[name] = frozen(factory())

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raises ValueError if the checker cannot read a prompt."""
        if self.checker:
            check_prompts(prompts)

    def check_size(self, height: int, width: int) -> None:
        """Raises ValueError if the checker cannot read images of a size in pixels."""
        from stitchvm.world.render import SIZE

        if self.checker and (height, width) != (SIZE, SIZE):
            raise ValueError(
                f"the checker reads the embedded world's images, {SIZE} x {SIZE} pixels, but these are {height} x "
                f"{width}: set model.checker to false."
            )

    @torch.no_grad()
    def __call__(self, pixels: Tensor, prompts: Sequence[str]) -> list[dict[str, Any]]:
        """Returns for every image {"rewards": {name: score}} and, from the checker, {"checker": {name: share}}.

        A weighted reward's parts follow it, as "name.part", as they are (neither weighted nor normalised).

        Arguments:
            pixels: uint8 images with shape (B, 3, H, W), on the CPU.
            prompts: Their prompts.
        """
        images = pixels.to(self.device).float() / 255
        columns: dict[str, list[float]] = {}
        for name, reward in self.rewards.items():
            columns |= self._scores(name, reward, images, list(prompts))
        rows: list[dict[str, Any]] = [
            {"rewards": {name: column[row] for name, column in columns.items()}}
            for row in range(len(pixels))
        ]
        if self.checker:
            from stitchvm.world.checker import check_batch

            verdicts = check_batch((pixels.float() / 255).numpy(), prompts)
            for row, verdict in zip(rows, verdicts, strict=True):
                row["checker"] = {"whole": float(verdict.whole), **verdict.attributes}
        return rows

    def _scores(
        self, name: str, reward: Reward, images: Tensor, prompts: list[str]
    ) -> dict[str, list[float]]:
        module: nn.Module = reward if reward.parked else reward.to(self.device)
        with torch.autocast(self.device.type, enabled=False):
            distinct = list(dict.fromkeys(prompts))
            text = None
            if reward.uses_text:
                for prompt in encoded_alone(distinct, self.device):
                    reward.encode_text([prompt])
                text = reward.encode_text(distinct)[[distinct.index(p) for p in prompts]]
            embedded = reward.embed(images).image
            try:
                found = {name: reward.score(embedded, text).tolist()}
                parts = (
                    reward.part_scores(embedded, text)
                    if isinstance(reward, WeightedReward)
                    else {}
                )
            except NotFiniteError as error:
                raise NotFiniteError(
                    f"the reward {name!r} of finished images, of the prompts {distinct[:4]}"
                    f"{' …' if len(distinct) > 4 else ''}: {error} These images are not kept."
                ) from error
            found |= {f"{name}.{part}": score.tolist() for part, score in parts.items()}
        if self.device.type != "cpu" and name not in self.resident:
            module.to("cpu")
        return found


def check_prompts(prompts: Iterable[str]) -> None:
    """Raises ValueError if the embedded world's checker cannot read a prompt."""
    from stitchvm.world.scenes import parse

    for prompt in prompts:
        parse(prompt)


def encoded_alone(prompts: Iterable[str], device: torch.device) -> list[str]:
    """Returns the prompts whose texts are encoded one by one, to be kept: on a CPU, where runs go on bit for bit, all.

    In a batch a text is rounded with its neighbours, and in a run that goes on others are new. A GPU is quicker so.
    """
    return list(dict.fromkeys(prompts)) if device.type == "cpu" else []


def same(one: Any, other: Any) -> bool:
    """Returns whether two factories build the same: one object, or one class with the same arguments."""
    if isinstance(one, partial) and isinstance(other, partial):
        return (one.func, one.args, one.keywords) == (other.func, other.args, other.keywords)
    return one is other
