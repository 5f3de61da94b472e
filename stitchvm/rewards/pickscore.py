"""PickScore (Kirstain et al., arXiv 2305.01569): a CLIP ViT-H/14 fine-tuned on the preferences of Pick-a-Pic.

    score = exp(logit_scale)·cos(image, text)

with the checkpoint's own scale, about 100. Three conventions are in use:

    published   exp(logit_scale)·cos        20 to 24; the authors' code, and the tables of the paper (22.55)
    over_26     exp(logit_scale)·cos/26     about 0.85; the training reward of Flow-GRPO and DiffusionNFT
    cosine      cos                         about 0.22
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from stitchvm.rewards.open_clip_reward import OpenCLIPReward
from stitchvm.rewards.transformers_clip import load_transformers_clip

__all__ = ["PickScoreReward"]

PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
SCALES = ("published", "over_26", "cosine")


class PickScoreReward(OpenCLIPReward):
    """PickScore: the scaled cosine of image and prompt.

    Arguments:
        model: A hub id or folder of a `CLIPModel` of transformers: config.json and model.safetensors (or
            pytorch_model.bin).
        processor: A hub id or folder of tokenizer and preprocessing. None: `model` itself if it has a
            tokenizer, else the published laion/CLIP-ViT-H-14-laion2B-s32B-b79K.
        scale: "published", "over_26" or "cosine": what the cosine is multiplied by (see above).
        dtype: "float32", "bfloat16" or "float16".
        class_token: What tails with j > 1 do for a class token: "trainable", "constant", "readout" or
            "literal" (`CLIPTail`).
        gradient_checkpointing: Whether tails compute their blocks again in the backward pass.
        check_finite: Whether a score that is not finite is an error.

    Attributes:
        factor: What the cosine is multiplied by.

    Raises:
        FileNotFoundError: If a file, folder or hub repository is not there.
        ValueError: If the scale is unknown, or the checkpoint does not fit.
    """

    def __init__(
        self,
        model: str = "yuvalkirstain/PickScore_v1",
        processor: str | None = None,
        scale: str = "published",
        dtype: str = "float32",
        class_token: str = "trainable",
        gradient_checkpointing: bool = False,
        check_finite: bool = True,
    ) -> None:
        if scale not in SCALES:
            raise ValueError(f"PickScore scale {scale!r}: expected one of {', '.join(SCALES)}")
        loaded = load_transformers_clip(model, processor, PROCESSOR)
        clip: Any = loaded.model
        logit_scale = float(clip.logit_scale.detach().float().exp())  # before dtype rounds it
        super().__init__(
            loaded,
            id=model,
            dtype=dtype,
            class_token=class_token,
            gradient_checkpointing=gradient_checkpointing,
            check_finite=check_finite,
        )
        self.factor = {"published": logit_scale, "over_26": logit_scale / 26, "cosine": 1.0}[scale]
        self.init_args = {
            "model": model,
            "processor": processor,
            "scale": scale,
            "dtype": dtype,
            "class_token": class_token,
            "gradient_checkpointing": gradient_checkpointing,
            "check_finite": check_finite,
        }

    def _score(self, e: Tensor, text: Tensor | None) -> Tensor:
        return self.factor * super()._score(e, text)
