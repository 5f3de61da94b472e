"""Held-out prompts during alignment: always the same ones with the same seeds, sampled with the averaged policy.

They are scored as `stitchvm predict` scores: clean rewards, and the world's checker, on 8-bit images. Beside them stand
statistics of the images that betray reward hacking.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stitchvm.metrics.image_statistics import image_statistics
from stitchvm.modules.judges import Judges, encoded_alone
from stitchvm.modules.ranks import gather_objects
from stitchvm.modules.sample_lines import decode, sample_stream
from stitchvm.rewards.base import Reward
from stitchvm.samplers.base import Sampler
from stitchvm.samplers.plain import PlainSampler
from stitchvm.values.parts import Parts

__all__ = ["Evaluation", "HeldOut", "picture_grid"]


@dataclass
class Evaluation:
    """How held-out prompts are sampled and scored, as it stands in a YAML file.

    Attributes:
        rewards: Builds the clean rewards, by name. One that is described as the run's is loaded once with it.
        checker: Whether the embedded world's exact checker reads the images; prompts must be its captions.
        sampler: How to sample; 40 plain steps at guidance 1 (Appendix E) if None.
        pictures: How many images are drawn into the grid: those of the first prompts.
    """

    rewards: dict[str, Callable[[], Reward]] = field(default_factory=dict)
    checker: bool = False
    sampler: Sampler | None = None
    pictures: int = 16


class HeldOut:
    """Samples, scores and counts the held-out prompts of one evaluation.

    Arguments:
        evaluation: How.
        parts: The run's parts.
        reward: Builds the run's reward, if there is one.
        device: Where it runs.
        latent_size: Height and width of the latents.
        seed: With a prompt's index it gives the random stream of its sample.

    Raises:
        ValueError: If the checker cannot read images of that size.
    """

    def __init__(
        self,
        evaluation: Evaluation,
        parts: Parts,
        reward: Callable[[], Reward] | None,
        device: torch.device,
        latent_size: tuple[int, int],
        seed: int = 0,
    ) -> None:
        self.generator: Any = parts.generator
        self.sampler = evaluation.sampler or PlainSampler(num_steps=40, guidance_scale=1.0)
        self.judges = Judges(evaluation.rewards, parts, reward, evaluation.checker, device)
        self.judges.check_size(*(side * self.generator.vae.factor for side in latent_size))
        self.latent_size, self.pictures, self.seed = latent_size, evaluation.pictures, seed
        self._scores: dict[int, dict[str, float]] = {}
        self._images: dict[int, Tensor] = {}

    def add(self, batch: dict[str, Any], first: bool = False) -> None:
        """Samples and scores a batch of prompts, with whatever policy is active.

        Arguments:
            batch: The batch, with `index` and `prompt`.
            first: Whether it begins an evaluation: one that was interrupted is forgotten.
        """
        if first:
            self._scores, self._images = {}, {}
        index, prompts = batch["index"].tolist(), list(batch["prompt"])
        for prompt in encoded_alone(prompts, self.judges.device):
            self.generator.encode_prompts([prompt])
        streams = [sample_stream(self.seed, i) for i in index]
        samples = self.sampler(
            self.generator, prompts, seeds=streams, latent_size=self.latent_size
        )
        pixels = decode(self.generator.vae, samples.latents, prompts, self.sampler.micro_batch)
        statistics = {name: x.tolist() for name, x in image_statistics(pixels).items()}
        for row, line in enumerate(self.judges(pixels, prompts)):
            found = dict(line["rewards"])
            found |= {f"checker/{name}": x for name, x in line.get("checker", {}).items()}
            found |= {f"image/{name}": x[row] for name, x in statistics.items()}
            self._scores[index[row]] = found
            if index[row] < self.pictures:
                self._images[index[row]] = pixels[row]

    def finish(self) -> tuple[dict[str, float], list[Tensor]]:
        """Returns means over the prompts of all ranks by name, and the grid's images; forgets them.

        A prompt that two ranks had, to be equally many, counts once.
        """
        scores: dict[int, dict[str, float]] = {}
        images: dict[int, Tensor] = {}
        for theirs in gather_objects((self._scores, self._images)):
            scores, images = scores | theirs[0], images | theirs[1]
        self._scores, self._images = {}, {}
        rows = [scores[i] for i in sorted(scores)]
        names = rows[0] if rows else {}
        means = {name: sum(row[name] for row in rows) / len(rows) for name in names}
        return means, [images[i] for i in sorted(images)]


def picture_grid(images: list[Tensor], side: int = 256) -> Tensor:
    """Returns images (3, H, W), uint8, as one picture (3, rows·h, columns·w) with cells of at most `side` pixels."""
    stack = torch.stack(images).float()
    scale = min(side / max(stack.shape[2:]), 1.0)
    if scale < 1:
        size = [max(round(s * scale), 1) for s in stack.shape[2:]]
        stack = torch.nn.functional.interpolate(stack, size, mode="area")
    columns = max(round(len(stack) ** 0.5), 1)
    empty = stack.new_full((-len(stack) % columns, *stack.shape[1:]), 255)
    cells = torch.cat([stack, empty]).unflatten(0, (-1, columns))
    rows, columns, _, height, width = cells.shape
    picture = cells.permute(2, 0, 3, 1, 4).reshape(3, rows * height, columns * width)
    return picture.round().to(torch.uint8)
