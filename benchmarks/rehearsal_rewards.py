"""Writes rewards in their published layouts: CLIP, HPSv2, LAION's head, PickScore, ImageReward, and a detector."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from rehearsal_facts import Reward
from rehearsal_hub import repository
from rehearsal_shapes import Shapes, imagereward_shapes, open_clip_shapes, shapes_of
from rehearsal_tiny import ARCHITECTURES
from rehearsal_tokenizers import write_bert_tokenizer, write_clip_tokenizer
from rehearsal_weights import random_tensors, write_safetensors

__all__ = ["architecture", "reward_shapes", "write_reward"]

OPENAI = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}

MASK2FORMER_PROCESSOR = {
    "image_processor_type": "Mask2FormerImageProcessor",
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "ignore_index": 255,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "num_labels": 80,
    "resample": 2,
    "size": {"height": 384, "width": 384},
    "size_divisor": 32,
}


def architecture(name: str, scale: str) -> dict[str, Any]:
    """Returns the model_cfg of one of open_clip's architectures, or its small namesake."""
    if scale == "tiny":
        return ARCHITECTURES[name]
    import open_clip

    config: dict[str, Any] = open_clip.get_model_config(name)
    return config


def reward_shapes(reward: Reward, scale: str) -> Shapes:
    """Returns names and shapes of a reward's tensors; none if it has no weights."""
    config = reward.config
    if reward.kind in ("open_clip", "hpsv2"):
        return open_clip_shapes(architecture(config["name"], scale))
    if reward.kind == "pickscore":
        return shapes_of("CLIPModel", config) | {
            f"{tower}.embeddings.position_ids": (1, length)  # as transformers 4 saved it
            for tower, length in (
                ("text_model", config["text_config"]["max_position_embeddings"]),
                ("vision_model", 1 + (config["vision_config"]["image_size"] // 14) ** 2),
            )
        }
    if reward.kind == "imagereward":
        return imagereward_shapes(**config)
    if reward.kind == "mask2former":
        return shapes_of("Mask2FormerForUniversalSegmentation", _mask2former(config))
    if reward.kind == "aesthetic":
        widths = config["widths"]
        pairs = zip((0, 2, 4, 6, 7), widths[:-1], widths[1:], strict=True)
        shapes: Shapes = {}
        for place, into, out in pairs:
            shapes |= {f"layers.{place}.weight": (out, into), f"layers.{place}.bias": (out,)}
        return shapes
    return {}


def write_reward(root: Path, reward: Reward, scale: str) -> None:
    """Writes a reward with random weights into ROOT's hub cache, the aesthetic head into the library's."""
    shapes = reward_shapes(reward, scale)
    if reward.kind == "aesthetic":
        (root / "cache").mkdir(parents=True, exist_ok=True)
        torch.save(random_tensors(shapes, "float32"), root / "cache" / reward.files[0])
        return
    folder = repository(root, reward.id)
    for name in reward.files:
        if name.endswith(".safetensors"):
            write_safetensors(folder / name, shapes, "float32")
        else:
            half = reward.kind == "hpsv2"
            state = random_tensors(shapes, "float16" if half else "float32")
            torch.save({"state_dict": state} if half else state, folder / name)
    if reward.kind == "open_clip":
        model_cfg = architecture(reward.config["name"], scale)
        _json(folder / "open_clip_config.json", {"model_cfg": model_cfg, "preprocess_cfg": {}})
    elif reward.kind == "pickscore":
        _json(folder / "config.json", reward.config)
    elif reward.kind == "imagereward":
        _json(folder / "med_config.json", reward.config["med"])
    elif reward.kind == "mask2former":
        _json(folder / "config.json", _mask2former(reward.config))
        _json(folder / "preprocessor_config.json", MASK2FORMER_PROCESSOR)
    elif reward.kind == "bert":
        write_bert_tokenizer(folder, reward.config["tokens"])
    elif reward.kind == "processor":
        write_clip_tokenizer(folder)
        size = reward.config["size"]
        settings = {"crop_size": size, "do_center_crop": True, "do_normalize": True, "resample": 3}
        _json(folder / "preprocessor_config.json", settings | {"size": size} | OPENAI)


def _mask2former(config: dict[str, Any]) -> dict[str, Any]:
    """Returns config.json of a Mask2Former for COCO's instances."""
    from transformers import Mask2FormerConfig

    from stitchvm.metrics.geneval_detectors import OBJECTS

    labels = dict(enumerate(OBJECTS))
    made: dict[str, Any] = Mask2FormerConfig(**config, id2label=labels).to_dict()
    return made | {"architectures": ["Mask2FormerForUniversalSegmentation"]}


def _json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
