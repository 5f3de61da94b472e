"""The aesthetic reward: its own CLIP vision tower and a head in the LAION predictor's key layout.

The head's layers 0, 2, 4, 6, 7 are linear with nothing but dropout between them: an affine map of the normalised
embedding. The tower starts from the retrieval CLIP's and is fine-tuned on the true score; its text tower
is a stub, for the reward reads no text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stitchvm.world.render import render
from stitchvm.world.scenes import sample_scenes
from stitchvm.world.scores import aesthetic_score
from stitchvm.world.train.clip import WIDTH, clip_config, load_clip, normalise, write_open_clip
from stitchvm.world.train.common import Stage, replace_folder

BATCH = 96
MEAN, STD = 5.0, 1.4


def aesthetic_config() -> dict[str, Any]:
    """Returns open_clip's model_cfg: the vision tower of the CLIP, a stub for text."""
    config = clip_config()
    config["text_cfg"] |= {"width": 16, "heads": 1, "layers": 1}
    return config


class Head(nn.Module):
    """Affine head over the normalised embedding with LAION's keys (`layers.0.weight` ...)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(WIDTH, 64),
            nn.Dropout(0.0),
            nn.Linear(64, 32),
            nn.Dropout(0.0),
            nn.Linear(32, 16),
            nn.Dropout(0.0),
            nn.Linear(16, 8),
            nn.Linear(8, 1),
        )

    def forward(self, embedding: Tensor) -> Tensor:
        """Returns scores (B,) of normalised embeddings (B, 96)."""
        return self.layers(embedding).squeeze(-1)


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Returns Spearman's rank correlation (no ties)."""
    first, second = (np.argsort(np.argsort(x)).astype(float) for x in (a, b))
    return float(np.corrcoef(first, second)[0, 1])


class AestheticStage(Stage):
    """Trains tower and head and writes weights/aesthetic."""

    name = "aesthetic"
    total_steps = 900
    warmup = 50
    ema_decay = 0.99

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        torch.manual_seed(seed)
        config = {k: dict(v) if isinstance(v, dict) else v for k, v in aesthetic_config().items()}
        self.clip = open_clip.CLIP(**config)
        self.clip.visual.load_state_dict(load_clip().visual.state_dict())
        for name, p in self.clip.named_parameters():
            p.requires_grad_(name.startswith("visual."))
        self.head = Head()
        nn.init.constant_(self.head.get_parameter("layers.7.bias"), MEAN)
        self.nets.update({"clip": self.clip, "head": self.head})
        groups = [
            {"params": list(self.clip.visual.parameters()), "base_lr": 5e-4, "weight_decay": 0.01},
            {"params": list(self.head.parameters()), "base_lr": 2e-3, "weight_decay": 0.0},
        ]
        self.optimizers = [torch.optim.AdamW(groups, lr=5e-4, betas=(0.9, 0.98))]
        self.start_ema()

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        scenes = sample_scenes("train", BATCH, [self.seed, 11, step])
        scores = self.predict(torch.from_numpy(render(scenes)))
        truth = torch.tensor([aesthetic_score(s) for s in scenes])
        loss = F.mse_loss(scores, truth)
        return loss / STD**2, {"rmse": loss.sqrt().item()}

    def predict(self, pixels: Tensor) -> Tensor:
        """Returns scores (B,) of pixels in [0, 1]."""
        return self.head(F.normalize(self.clip.encode_image(normalise(pixels)), dim=-1))

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        scenes = sample_scenes("test", 1000, [1, 96])
        scores = torch.cat([self.predict(p) for p in torch.from_numpy(render(scenes)).split(250)])
        truth = np.array([aesthetic_score(s) for s in scenes])
        return {"aesthetic/srcc": spearman(scores.numpy(), truth)}

    def export(self, folder: Path) -> None:
        def write(target: Path) -> None:
            write_open_clip(self.clip, target, model_cfg=aesthetic_config())
            head = {k: v.detach().clone() for k, v in self.head.state_dict().items()}
            torch.save(head, target / "aesthetic.pth")

        replace_folder(write, folder / "aesthetic")
