"""GenEval's classifier of colours: CLIP's zero-shot classification of each object's crop.

An object is laid over flat grey #999 by its mask, cropped to its box, and compared with ten colours c, each the
normalised mean of the normalised embeddings of three texts about its class X:

    "a photo of a c X",   "a photo of a c-colored X",   "a photo of a c object"

The official evaluator uses open_clip's ViT-L-14 with OpenAI's weights, that is the architecture with QuickGELU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.v2.functional import crop

from stitchvm.metrics.geneval import COLOURS, Box, ColourClassifier
from stitchvm.rewards.clip import CLIPReward

__all__ = ["BACKGROUND", "TEMPLATES", "CLIPColours", "crops"]

TEMPLATES = (
    "a photo of a {c} {name}",
    "a photo of a {c}-colored {name}",
    "a photo of a {c} object",
)
BACKGROUND = 0x99 / 255


class CLIPColours(nn.Module, ColourClassifier):
    """The colours of objects by a CLIP.

    Arguments:
        model: An architecture name of open_clip, or a folder (see `CLIPReward`).
        checkpoint: A tag of open_clip or a file (see `CLIPReward`).
        dtype: The dtype of the network.

    Raises:
        FileNotFoundError: If a file, folder or hub repository is not there.
        ValueError: If the checkpoint does not fit the architecture or its activation.
    """

    def __init__(
        self,
        model: str = "ViT-L-14-quickgelu",
        checkpoint: str | None = "openai",
        dtype: str = "float32",
    ) -> None:
        super().__init__()
        self.clip = CLIPReward(model, checkpoint, dtype)

    @torch.no_grad()
    def classify_colors(
        self, image: Tensor, boxes: Sequence[Box], masks: Sequence[Tensor | None], name: str
    ) -> list[str]:
        """Returns one of the ten colours for each object.

        Arguments:
            image: The image in [0, 1], with shape (3, H, W).
            boxes: The objects' boxes.
            masks: The objects' masks, each bool (H, W), or None to crop alone.
            name: Their class, for the texts.
        """
        if not boxes:
            return []
        resize = self.clip.preprocessing.resize
        parts = torch.cat([resize(part[None]) for part in crops(image, boxes, masks)])
        e = F.normalize(self.clip.embed(parts).image.float(), dim=-1)
        best = (e @ self.texts(name).T).argmax(dim=1)
        return [COLOURS[i] for i in best.tolist()]

    @torch.no_grad()
    def texts(self, name: str) -> Tensor:
        """Returns the unit embeddings of the ten colours for a class, with shape (10, E)."""
        prompts = [t.format(c=colour, name=name) for colour in COLOURS for t in TEMPLATES]
        e = self.clip.encode_text(prompts).float()  # of unit length, and kept for the next object
        return F.normalize(e.unflatten(0, (len(COLOURS), len(TEMPLATES))).mean(dim=1), dim=-1)


def crops(image: Tensor, boxes: Sequence[Box], masks: Sequence[Tensor | None]) -> list[Tensor]:
    """Returns each object on #999, cropped to its box (rounded to pixels, at least one; black outside the image).

    Arguments:
        image: The image in [0, 1], with shape (3, H, W).
        boxes: The objects' boxes.
        masks: The objects' masks, each bool (H, W), or None to leave the image behind the object.

    Raises:
        ValueError: If a mask does not have the image's size.
    """
    parts = []
    for (x0, y0, x1, y1), mask in zip(boxes, masks, strict=True):
        whole = image.float()
        if mask is not None:
            if mask.shape != image.shape[1:]:
                raise ValueError(
                    f"a mask of shape {tuple(mask.shape)} for an image of {tuple(image.shape[1:])}: "
                    "expected the same height and width."
                )
            whole = torch.where(mask.to(image.device), whole, BACKGROUND)
        left, top = round(x0), round(y0)
        width, height = max(round(x1) - left, 1), max(round(y1) - top, 1)
        parts.append(crop(whole, top, left, height, width))
    return parts
