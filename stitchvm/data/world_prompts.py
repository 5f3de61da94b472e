"""Captions of the embedded world as prompts: what is sampled for them, the exact checker can judge.

Prompt n is the caption of the n-th of a fixed random order of the split's scene keys, so that more prompts contain
fewer, no two ask for the same picture, and `stitchvm.world.checker.check(image, prompt)` reads every one of them.
"""

from __future__ import annotations

from stitchvm.data.prompts import PromptDataset, PromptModule, check_given
from stitchvm.world.scenes import keys, parse, sample_scenes


class WorldPrompts(PromptModule):
    """Distinct captions of a split of the scene grammar: batches with `index` and `prompt`.

    Training prompts are the captions of the split "train", all of them.

    Arguments:
        num_prompts: How many captions for validation, test and predict; a split has a few hundred.
        split: "test", or "tune" for choices made while developing.
        batch_size: Prompts per batch and device.
        seed: Fixes the captions, and the order of the training prompts.
        prompts: Captions of your own, in place of those of the split.
        prompts_per_update: Prompts per training batch on all devices together; `batch_size` on each by default.

    Raises:
        ValueError: If `prompts` is empty, has one twice, or one that the world's grammar does not have.
    """

    def __init__(
        self,
        num_prompts: int = 200,
        split: str = "test",
        batch_size: int = 64,
        seed: int = 0,
        prompts: list[str] | None = None,
        prompts_per_update: int | None = None,
    ) -> None:
        super().__init__(batch_size, seed, prompts_per_update)
        self.num_prompts = num_prompts
        self.split = split
        self.prompts = prompts
        if prompts is not None:
            check_given(prompts, unique=True)
            for prompt in prompts:
                parse(prompt)

    def fit_data(self) -> tuple[PromptDataset, PromptDataset]:
        """Returns the captions of "train" and those of the split.

        Raises:
            ValueError: If there is no such split, or it has fewer captions than asked for.
        """
        if self.num_prompts < 1:
            raise ValueError(f"num_prompts must be at least 1, got {self.num_prompts}.")
        singles, pairs = keys("train")
        train = world_captions("train", len(singles) + len(pairs), self.seed)
        prompts = self.prompts or world_captions(self.split, self.num_prompts, self.seed)
        return PromptDataset(train), PromptDataset(prompts)


def world_captions(split: str, count: int, seed: int = 0) -> list[str]:
    """Returns captions of `count` distinct scenes of a split.

    Raises:
        ValueError: If there is no such split, or it has fewer.
    """
    return [scene.caption for scene in sample_scenes(split, count, [seed, 5], distinct=True)]
