"""The retrieval CLIP: open_clip's CLIP class, symmetric contrastive loss with hard negatives in the batch.

A batch holds families: a scene and scenes that differ from it in one attribute, so that binding and relation
matter from the first step. Equal keys in a batch share the target's mass. Early on, linear heads on the patch
tokens name the colour and shape under each patch; their weight decays and they are not shipped.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stitchvm.world.render import render
from stitchvm.world.scenes import (
    COLOURS,
    SHAPES,
    Scene,
    dress,
    keys,
    mutate,
    sample_scenes,
    split_of,
)
from stitchvm.world.tokens import CONTEXT, clip_tokenizer, clip_vocabulary, encode
from stitchvm.world.train.common import Stage, replace_folder, step_rng, weights_folder

WIDTH = 96
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
FAMILIES, MEMBERS = 32, 4


def clip_config() -> dict[str, Any]:
    """Returns open_clip's model_cfg."""
    return {
        "embed_dim": WIDTH,
        "vision_cfg": {
            "image_size": 32,
            "layers": 6,
            "width": WIDTH,
            "head_width": 32,
            "patch_size": 4,
        },
        "text_cfg": {
            "context_length": CONTEXT,
            "vocab_size": len(clip_vocabulary()[0]),
            "width": WIDTH,
            "heads": 3,
            "layers": 3,
            "hf_tokenizer_name": ".",
        },
    }


def build_clip() -> open_clip.CLIP:
    """Returns an untrained CLIP."""
    config = {k: dict(v) if isinstance(v, dict) else v for k, v in clip_config().items()}
    return open_clip.CLIP(**config)


def write_open_clip(
    model: nn.Module,
    folder: Path,
    weights: bool = True,
    model_cfg: dict[str, Any] | None = None,
) -> None:
    """Writes an open_clip "local-dir:" folder: config, tokenizer and (fp16) safetensors."""
    preprocess = {
        "mean": list(MEAN),
        "std": list(STD),
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    config = {"model_cfg": model_cfg or clip_config(), "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    clip_tokenizer().save_pretrained(folder)
    if weights:
        tensors = {
            k: v.detach().half().contiguous().clone() for k, v in model.state_dict().items()
        }
        save_file(tensors, str(folder / "open_clip_model.safetensors"))


def load_clip() -> open_clip.CLIP:
    """Returns the trained retrieval CLIP, from which the other rewards are fine-tuned.

    Raises:
        FileNotFoundError: the clip stage has not been run.
    """
    path = weights_folder() / "clip" / "open_clip_model.safetensors"
    if not path.exists():
        raise FileNotFoundError(
            f"no {path}: run `python -m stitchvm.world.train --stage clip` first"
        )
    model = build_clip()
    model.load_state_dict({k: v.float() for k, v in load_file(str(path)).items()})
    return model


def normalise(pixels: Tensor) -> Tensor:
    """Returns pixels in [0, 1] as CLIP takes them."""
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def family_batch(
    rng: np.random.Generator, families: int, members: int, single_share: float = 0.1
) -> list[Scene]:
    """Returns families * members training scenes; members of a family differ in one attribute from the first."""
    singles, pairs = keys("train")
    scenes = []
    for _ in range(families):
        pool = singles if rng.random() < single_share else pairs
        key = pool[rng.integers(len(pool))]
        family = [key]
        while len(family) < members:
            other = mutate(key, rng)
            if split_of(other) == "train":
                family.append(other)
        scenes += [dress(k, rng) for k in family]
    return scenes


def contrastive(image: Tensor, text: Tensor, scale: Tensor, same: Tensor) -> Tensor:
    """Returns the symmetric cross-entropy of cosine similarities with targets spread over equal keys."""
    logits = scale * image @ text.T
    target = same / same.sum(dim=1, keepdim=True)
    return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))


def same_keys(scenes: list[Scene]) -> Tensor:
    """Returns a float (N, N) matrix, 1 where two scenes have the same key."""
    numbers = {k: i for i, k in enumerate(dict.fromkeys(s.key for s in scenes))}
    ids = torch.tensor([numbers[s.key] for s in scenes])
    return (ids[:, None] == ids).float()


def patch_labels(scenes: list[Scene], masks: np.ndarray) -> tuple[Tensor, Tensor]:
    """Returns the colour and shape (0 = background) of every 4x4 patch, each (N, 64)."""
    n = len(scenes)
    share = torch.from_numpy(masks).view(n, 2, 8, 4, 8, 4).mean(dim=(3, 5)).flatten(2)
    colours = torch.tensor([[t.colour for t in (*s.things, s.things[0])][:2] for s in scenes]) + 1
    shapes = torch.tensor([[t.shape for t in (*s.things, s.things[0])][:2] for s in scenes]) + 1
    top, which = share.max(dim=1)
    covered = top > 0.3
    return colours.gather(1, which) * covered, shapes.gather(1, which) * covered


class CLIPStage(Stage):
    """Trains the retrieval CLIP and writes weights/clip."""

    name = "clip"
    total_steps = 1000
    warmup = 150
    ema_decay = 0.998
    dense_until = 800

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        torch.manual_seed(seed)
        self.clip = build_clip()
        self.clip.visual.output_tokens = True
        self.heads = nn.Linear(WIDTH, 1 + len(COLOURS) + 1 + len(SHAPES))
        self.nets.update({"clip": self.clip, "heads": self.heads})
        decay = [p for p in self.nets.parameters() if p.ndim >= 2]
        plain = [p for p in self.nets.parameters() if p.ndim < 2]
        groups = [
            {"params": decay, "base_lr": 1e-3, "weight_decay": 0.05},
            {"params": plain, "base_lr": 1e-3, "weight_decay": 0.0},
        ]
        self.optimizers = [torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98))]
        self.start_ema()

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        scenes = family_batch(step_rng(self.seed, step), FAMILIES, MEMBERS)
        pixels, masks = render(scenes, with_masks=True)
        pooled, tokens = self.clip.visual(normalise(torch.from_numpy(pixels)))
        image = F.normalize(pooled, dim=-1)
        text = F.normalize(
            self.clip.encode_text(torch.tensor(encode([s.caption for s in scenes]))), dim=-1
        )
        scale = self.clip.logit_scale.clamp(max=4.6).exp()
        main = contrastive(image, text, scale, same_keys(scenes))
        weight = max(0.05, 1 - step / self.dense_until)
        colour, shape = patch_labels(scenes, masks)
        logits = self.heads(tokens).flatten(0, 1)
        split = 1 + len(COLOURS)
        dense = F.cross_entropy(logits[:, :split], colour.flatten())
        dense = dense + F.cross_entropy(logits[:, split:], shape.flatten())
        return main + weight * dense, {"contrastive": main.item(), "dense": dense.item()}

    def evaluate(self) -> dict[str, float]:
        self.clip.visual.output_tokens = False
        figures = retrieval_figures(self.clip, 512, 1)
        self.clip.visual.output_tokens = True
        return figures

    def export(self, folder: Path) -> None:
        replace_folder(lambda target: write_open_clip(self.clip, target), folder / "clip")


@torch.no_grad()
def retrieval_figures(
    model: open_clip.CLIP, n: int, seed: int, split: str = "test"
) -> dict[str, float]:
    """Returns R@1 both ways on n scenes of distinct unseen keys."""
    scenes = sample_scenes(split, n, [seed, 98], distinct=True)
    pixels = normalise(torch.from_numpy(render(scenes)))
    image = torch.cat([F.normalize(model.encode_image(p), dim=-1) for p in pixels.split(256)])
    text = F.normalize(
        model.encode_text(torch.tensor(encode([s.caption for s in scenes]))), dim=-1
    )
    similarity, right = image @ text.T, torch.arange(n)
    return {
        "clip/image_to_text_r1": (similarity.argmax(dim=1) == right).float().mean().item(),
        "clip/text_to_image_r1": (similarity.argmax(dim=0) == right).float().mean().item(),
    }
