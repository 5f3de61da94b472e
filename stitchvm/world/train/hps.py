"""The preference reward: the CLIP fine-tuned on pairs of images of one prompt (as HPSv2 was).

For a prompt and its images, L = -log sigmoid(s_i - s_j) averaged over pairs in which i is preferred, with
s = exp(logit_scale) cos(text, image). Shipped as HPSv2 is: {"state_dict": ...} beside the architecture's config.
"""

from __future__ import annotations

from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor

from stitchvm.world.render import render
from stitchvm.world.scores import PreferenceGroup, preference_groups
from stitchvm.world.tokens import encode
from stitchvm.world.train.clip import load_clip, normalise, write_open_clip
from stitchvm.world.train.common import Stage, replace_folder

GROUPS, IMAGES = 24, 4


class HPSStage(Stage):
    """Fine-tunes the CLIP on preferences and writes weights/hps."""

    name = "hps"
    total_steps = 900
    warmup = 50
    ema_decay = 0.99

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        torch.manual_seed(seed)
        self.clip = load_clip()
        self.nets["clip"] = self.clip
        group = {"params": list(self.clip.parameters()), "base_lr": 5e-4, "weight_decay": 0.01}
        self.optimizers = [torch.optim.AdamW([group], lr=5e-4, betas=(0.9, 0.98))]
        self.start_ema()

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        groups = preference_groups("train", GROUPS, [self.seed, 12, step], IMAGES)
        difference, preferred = pairs(self.clip, groups)
        loss = F.softplus(-difference[preferred]).mean()
        return loss, {"accuracy": (difference[preferred] > 0).float().mean().item()}

    def evaluate(self) -> dict[str, float]:
        return {"hps/pair_accuracy": pair_accuracy(self.clip, 250, 1)}

    def export(self, folder: Path) -> None:
        def write(target: Path) -> None:
            write_open_clip(self.clip, target, weights=False)
            state = {k: v.detach().half().clone() for k, v in self.clip.state_dict().items()}
            torch.save({"state_dict": state}, target / "hps.pt")

        replace_folder(write, folder / "hps")


def pairs(model: open_clip.CLIP, groups: list[PreferenceGroup]) -> tuple[Tensor, Tensor]:
    """Returns score differences (groups, images, images) and which of them should be positive."""
    pixels = torch.from_numpy(render([s for g in groups for s in g.scenes]))
    image = F.normalize(model.encode_image(normalise(pixels)), dim=-1).view(
        len(groups), IMAGES, -1
    )
    text = F.normalize(model.encode_text(torch.tensor(encode([g.prompt for g in groups]))), dim=-1)
    scores = model.logit_scale.clamp(max=4.6).exp() * torch.einsum("gie,ge->gi", image, text)
    truth = torch.tensor([g.scores for g in groups])
    return scores[:, :, None] - scores[:, None], truth[:, :, None] > truth[:, None]


@torch.no_grad()
def pair_accuracy(model: open_clip.CLIP, groups: int, seed: int, split: str = "test") -> float:
    """Returns the share of pairs within test groups that the model ranks as the true preference does."""
    difference, preferred = pairs(model, preference_groups(split, groups, [seed, 95], IMAGES))
    return (difference[preferred] > 0).float().mean().item()
