"""HPSv2 (Wu et al., arXiv 2306.09341): a CLIP ViT-H/14 fine-tuned on human preferences; the score is the cosine.

The published files fit open_clip's ViT-H-14 key by key. Images are scaled by their longer side and padded with black
before normalisation. The paper does not say which version it used; its scores (0.35) are in the range of v2.1.
"""

from __future__ import annotations

from stitchvm.rewards.checkpoint import load_clip
from stitchvm.rewards.open_clip_reward import OpenCLIPReward

__all__ = ["HPSv2Reward"]

FILES = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}


class HPSv2Reward(OpenCLIPReward):
    """The human preference score v2: the cosine of image and prompt, usually 0.2 to 0.4.

    Arguments:
        model: `ViT-H-14`, `local-dir:FOLDER` or `world:hps`.
        checkpoint: A local file or `org/name/file` on the hub. None: the file of `version` in the hub's
            xswu/HPSv2 for an architecture name, the folder's own weights for a folder.
        version: "v2.1" or "v2.0"; which file is taken if `checkpoint` is None.
        dtype: "float32", "bfloat16" or "float16".
        class_token: What tails with j > 1 do for a class token: "trainable", "constant", "readout" or
            "literal" (`CLIPTail`).
        gradient_checkpointing: Whether tails compute their blocks again in the backward pass.
        check_finite: Whether a score that is not finite is an error.

    Raises:
        FileNotFoundError: If a file, folder or hub repository is not there.
        ValueError: If the version is unknown or the checkpoint does not fit the architecture.
    """

    def __init__(
        self,
        model: str = "ViT-H-14",
        checkpoint: str | None = None,
        version: str = "v2.1",
        dtype: str = "float32",
        class_token: str = "trainable",
        gradient_checkpointing: bool = False,
        check_finite: bool = True,
    ) -> None:
        if version not in FILES:
            raise ValueError(f"HPSv2 version {version!r}: expected one of {', '.join(FILES)}")
        built_in = ":" not in model
        file = f"xswu/HPSv2/{FILES[version]}" if checkpoint is None and built_in else checkpoint
        super().__init__(
            # the published weights were trained with GELU; a folder says so itself
            load_clip(model, file, quick_gelu=False),
            id=model if file is None else f"{model}/{file}",
            dtype=dtype,
            resize_mode="pad",
            class_token=class_token,
            gradient_checkpointing=gradient_checkpointing,
            check_finite=check_finite,
        )
        self.init_args = {
            "model": model,
            "checkpoint": checkpoint,
            "version": version,
            "dtype": dtype,
            "class_token": class_token,
            "gradient_checkpointing": gradient_checkpointing,
            "check_finite": check_finite,
        }
