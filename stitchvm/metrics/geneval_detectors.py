"""A detector for GenEval from transformers: Mask2Former. Its results are called "GenEval-HF".

**They cannot be compared with numbers of the paper or of others.** The official evaluator runs mmdet's own training
of Mask2Former (mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco), which today's torch cannot install; the weights on
the hub are another training, and the thresholds 0.3 and 0.9 were not chosen for their confidences. Compare such
numbers only with each other. For the official ones export the images (`stitchvm.data.geneval_layout`), run the
official evaluator where it can be installed and import its results (`stitchvm.metrics.geneval_official`).

From the network's logits for Q queries and C classes (+ 1 for "no object") to detections, as mmdet does: with
p = softmax(class logits) without the last class, take the Q highest of all Q·C entries p_qc; with m_q the mask logits
at the image's size (up to the network's input first, then to the image, bilinear),

    mask = m_q > 0,    score = p_qc · mean of sigmoid(m_q) over the mask,    box = the mask's extent

transformers' own post-processing does the same on 384 × 384 pixels whatever the image, gives no boxes, and
paints masks over each other unless asked for binary maps.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stitchvm.hub import resolve
from stitchvm.metrics.geneval import Box, Detection, Detector

__all__ = ["OBJECTS", "Detector", "Mask2FormerDetector", "box_of", "detections"]

# COCO's 80 classes in their order, by the names that GenEval's prompts use
OBJECTS = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat",
    "traffic light", "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog",
    "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella",
    "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite",
    "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich",
    "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch",
    "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "computer mouse",
    "tv remote", "computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink",
    "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier",
    "toothbrush",
)  # fmt: skip
# what COCO (or the older spelling of VOC) calls them otherwise
_ALIASES = {
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
    "hair dryer": "hair drier",
}


class Mask2FormerDetector(nn.Module, Detector):
    """transformers' Mask2Former for instances.

    Arguments:
        model: A folder or hub id in transformers' format.
        size: The (shortest, longest) side of the network's input in pixels, the aspect ratio kept up to rounding
            to multiples of 32; those of the official detector by default. None: the checkpoint's own, which on the
            hub is 384 × 384.
        dtype: The dtype of the network: "float32", "bfloat16" or "float16".

    Raises:
        FileNotFoundError: If there is no such folder or repository.
        ImportError: If scipy is not installed: transformers needs it to build the network.
        ValueError: If the network knows none of COCO's classes.
    """

    label = "GenEval-HF"

    def __init__(
        self,
        model: str = "facebook/mask2former-swin-small-coco-instance",
        size: tuple[int, int] | None = (800, 1333),
        dtype: str = "float32",
    ) -> None:
        super().__init__()
        from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation

        folder = resolve(model, allow_patterns=["*.json", "*.safetensors"])
        if not list(folder.glob("*.safetensors")):
            folder = resolve(model, allow_patterns=["*.json", "pytorch_model*.bin"])
        self.processor: Any = AutoImageProcessor.from_pretrained(folder)
        self.size = size
        self.network: Any = Mask2FormerForUniversalSegmentation.from_pretrained(
            folder, dtype=getattr(torch, dtype)
        )
        self.network.requires_grad_(False).eval()
        labels = [name.lower() for _, name in sorted(self.network.config.id2label.items())]
        names = [_ALIASES.get(label, label) for label in labels]
        # None: a class of other data sets, which no prompt of GenEval names
        self.names = [name if name in OBJECTS else None for name in names]
        self.classes = frozenset(name for name in self.names if name is not None)
        if not self.classes:
            raise ValueError(
                f"{model} knows none of COCO's classes but {labels[:5]}: give a Mask2Former trained for "
                "COCO's instances."
            )

    def train(self, mode: bool = True) -> Mask2FormerDetector:
        """Stays in eval mode: the detector is frozen."""
        super().train(False)
        return self

    @torch.no_grad()
    def detect(self, pixels: Tensor, threshold: float = 0.0) -> list[list[Detection]]:
        """Returns the detections of each image with a score above the threshold, the highest first.

        Arguments:
            pixels: Images in [0, 1], with shape (B, 3, H, W).
            threshold: The least score.
        """
        if len(pixels) == 0:
            return []
        size = {}
        if self.size is not None:
            size["size"] = {"shortest_edge": self.size[0], "longest_edge": self.size[1]}
        weight = next(self.network.parameters())
        inputs = self.processor(
            list(pixels.to(weight.device, torch.float32)),
            do_rescale=False,
            return_tensors="pt",
            input_data_format="channels_first",
            **size,
        )
        images = inputs["pixel_values"].to(weight.device, weight.dtype)
        outputs = self.network(
            pixel_values=images, pixel_mask=inputs["pixel_mask"].to(weight.device)
        )
        masks = outputs.masks_queries_logits.float()
        # all images have one size, so the part that is not padding is the same for all
        valid = inputs["pixel_mask"][0]
        padded, image = (images.shape[2], images.shape[3]), (pixels.shape[2], pixels.shape[3])
        part = int(valid.any(dim=1).sum()), int(valid.any(dim=0).sum())
        return [
            [
                Detection(name, score, box, mask.cpu())
                for label, score, box, mask in detections(
                    logits.float(), masks[i], padded, part, image, threshold
                )
                if (name := self.names[label]) is not None
            ]
            for i, logits in enumerate(outputs.class_queries_logits)
        ]


def detections(
    class_logits: Tensor,
    mask_logits: Tensor,
    padded: tuple[int, int],
    part: tuple[int, int],
    size: tuple[int, int],
    threshold: float = 0.0,
) -> list[tuple[int, float, Box, Tensor]]:
    """Returns (class index, score, box, mask (H, W)) of one image's objects, the highest scores first.

    Arguments:
        class_logits: With shape (Q, C + 1), "no object" last.
        mask_logits: With shape (Q, h, w).
        padded: The size (H', W') of the network's input.
        part: The size of what is no padding in it, from the upper left corner.
        size: The size (H, W) of the image.
        threshold: Only scores above it.
    """
    p = class_logits.softmax(dim=-1)[:, :-1]
    best, places = p.flatten().topk(len(p))
    places = places[best > threshold]  # the score is at most p: the rest needs no mask
    queries, labels = places // p.shape[1], places % p.shape[1]
    found = []
    # one at a time: a hundred masks of a large image take gigabytes
    for query, label in zip(queries.tolist(), labels.tolist(), strict=True):
        m = _resize(mask_logits[query], tuple(padded))[: part[0], : part[1]]
        m = _resize(m, tuple(size))
        mask = m > 0
        score = float(p[query, label] * (m.sigmoid() * mask).sum() / (mask.sum() + 1e-6))
        if score > threshold:
            found.append((label, score, box_of(mask), mask))
    return sorted(found, key=lambda entry: -entry[1])


def box_of(mask: Tensor) -> Box:
    """Returns the smallest box (x0, y0, x1, y1) around a mask (H, W), exclusive of x1 and y1; zeros if it is empty."""
    rows, columns = mask.any(dim=1).nonzero()[:, 0], mask.any(dim=0).nonzero()[:, 0]
    if len(rows) == 0:
        return (0.0, 0.0, 0.0, 0.0)
    ends = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    x0, y0, x1, y1 = (float(end) for end in ends)
    return x0, y0, x1, y1


def _resize(m: Tensor, size: tuple[int, ...]) -> Tensor:
    if tuple(m.shape) == tuple(size):
        return m
    return F.interpolate(m[None, None], size, mode="bilinear", align_corners=False)[0, 0]
