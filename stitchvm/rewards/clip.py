"""CLIP as a reward: the cosine of image and text embedding. OpenAI CLIP, DFN-CLIP, any ViT of open_clip.

    OpenAI CLIP ViT-L/14@336    model: ViT-L-14-336-quickgelu    (tag openai)
    DFN5B-CLIP ViT-H/14@378     model: ViT-H-14-378-quickgelu    (tag dfn5b)
    the embedded world's        model: world:clip

The paper's tables show DFN-CLIP's cosine as it is and CLIP's times 100; here it is always the cosine.
"""

from __future__ import annotations

from stitchvm.rewards.checkpoint import load_clip
from stitchvm.rewards.open_clip_reward import OpenCLIPReward

__all__ = ["CLIPReward"]


class CLIPReward(OpenCLIPReward):
    """The cosine similarity of a CLIP's image and text embeddings.

    Arguments:
        model: An architecture name of open_clip, `local-dir:FOLDER`, `hf-hub:ORG/NAME` or `world:clip`.
        checkpoint: A tag of open_clip, a local file, or `org/name/file` on the hub. None: the folder's own
            weights, or the architecture's only tag.
        dtype: "float32", "bfloat16" or "float16".
        resize_mode: "shortest", "squash", "longest" or "pad"; the checkpoint's own if None.
        class_token: What tails with j > 1 do for a class token: "trainable", "constant", "readout" or
            "literal" (`CLIPTail`).
        gradient_checkpointing: Whether tails compute their blocks again in the backward pass.
        check_finite: Whether a score that is not finite is an error.

    Raises:
        FileNotFoundError: If a file, folder or hub repository is not there.
        ValueError: If the checkpoint does not fit the architecture or its activation.
    """

    def __init__(
        self,
        model: str = "ViT-L-14-336-quickgelu",
        checkpoint: str | None = None,
        dtype: str = "float32",
        resize_mode: str | None = None,
        class_token: str = "trainable",
        gradient_checkpointing: bool = False,
        check_finite: bool = True,
    ) -> None:
        super().__init__(
            load_clip(model, checkpoint),
            id=model if checkpoint is None else f"{model}/{checkpoint}",
            dtype=dtype,
            resize_mode=resize_mode,
            class_token=class_token,
            gradient_checkpointing=gradient_checkpointing,
            check_finite=check_finite,
        )
        self.init_args = {
            "model": model,
            "checkpoint": checkpoint,
            "dtype": dtype,
            "resize_mode": resize_mode,
            "class_token": class_token,
            "gradient_checkpointing": gradient_checkpointing,
            "check_finite": check_finite,
        }
