"""The Mask2Former detector on a tiny checkpoint in transformers' format, and the colours by a tiny CLIP."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from jsonargparse import ArgumentParser
from PIL import Image
from torch import Tensor

from stitchvm.metrics.geneval import COLOURS, ColourClassifier, Detector, GenEval, Rules
from stitchvm.metrics.geneval_colours import CLIPColours, crops
from stitchvm.metrics.geneval_detectors import OBJECTS, Mask2FormerDetector, box_of, detections

LABELS = ("person", "mouse", "tvmonitor", "zebra", "lamp")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a Mask2Former of random weights whose masks and classes are decided, not all alike."""
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessor,
        SwinConfig,
    )

    stages = ["stage1", "stage2", "stage3", "stage4"]
    swin = SwinConfig(
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        image_size=32,
        out_features=stages,
    )
    width = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32}
    config = Mask2FormerConfig(
        backbone_config=swin,
        **width,
        encoder_feedforward_dim=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=16,
        num_queries=12,
        id2label=dict(enumerate(LABELS)),
        label2id={label: i for i, label in enumerate(LABELS)},
    )
    torch.manual_seed(3)
    network = Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        network.class_predictor.weight.mul_(3)
        for parameter in network.model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape))
    path = tmp_path_factory.mktemp("mask2former")
    network.save_pretrained(path)
    Mask2FormerImageProcessor(size={"height": 384, "width": 384}).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def detector(folder: Path) -> Mask2FormerDetector:
    return Mask2FormerDetector(str(folder), size=None)


def pictures(size: tuple[int, int], count: int = 2) -> Tensor:
    """Returns smooth random pictures in [0, 1]."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(count, 3, 6, 5, generator=generator)
    return F.interpolate(coarse, size, mode="bicubic").clamp(0, 1)


def brute_box(mask: Tensor) -> tuple[float, ...]:
    """Returns the box of a mask by looking at every pixel."""
    places = [
        (x, y) for y, row in enumerate(mask.tolist()) for x, there in enumerate(row) if there
    ]
    if not places:
        return (0.0, 0.0, 0.0, 0.0)
    xs, ys = [x for x, _ in places], [y for _, y in places]
    return (float(min(xs)), float(min(ys)), float(max(xs) + 1), float(max(ys) + 1))


def test_names(detector: Mask2FormerDetector) -> None:
    assert detector.label == "GenEval-HF" and isinstance(detector, Detector)
    assert detector.names == ["person", "computer mouse", "tv", "zebra", None]
    assert detector.classes == {"person", "computer mouse", "tv", "zebra"}
    assert len(set(OBJECTS)) == 80 and detector.classes < set(OBJECTS)
    assert not detector.train().network.training


def test_agrees_with_transformers_where_that_has_the_right_size(
    detector: Mask2FormerDetector,
) -> None:
    """On 384 × 384 images the post-processing of transformers is at the image's size too."""
    pixels = pictures((384, 384))
    inputs = detector.processor(list(pixels), do_rescale=False, return_tensors="pt")
    with torch.no_grad():
        outputs = detector.network(**inputs)
    theirs = detector.processor.post_process_instance_segmentation(
        outputs, threshold=0.05, target_sizes=[(384, 384)] * 2, return_binary_maps=True
    )
    kinds = set()
    for found, wanted in zip(detector.detect(pixels, 0.05), theirs, strict=True):
        rows = sorted(
            zip(wanted["segments_info"], wanted["segmentation"], strict=True),
            key=lambda row: -row[0]["score"],
        )
        rows = [row for row in rows if detector.names[row[0]["label_id"]] is not None]
        assert len(found) == len(rows) > 2
        for detection, (info, mask) in zip(found, rows, strict=True):
            assert detection.name == detector.names[info["label_id"]]
            assert detection.score == pytest.approx(info["score"], abs=2e-6)  # theirs is rounded
            assert detection.mask is not None and torch.equal(detection.mask, mask.bool())
            kinds.add((detection.name, bool(detection.mask.all())))
    assert len(kinds) > 1, "the tiny network finds one thing only: the test would see no mix-up"


def test_masks_and_boxes_are_the_images_own(folder: Path) -> None:
    """An image that is not square: the network's input is another size and shape."""
    detector = Mask2FormerDetector(str(folder), size=(64, 90))
    pixels = pictures((48, 120))
    found = [d for image in detector.detect(pixels, 0.0) for d in image]
    assert found
    for detection in found:
        assert detection.mask is not None and detection.mask.shape == (48, 120)
        assert detection.mask.dtype == torch.bool and detection.box == brute_box(detection.mask)
    scores = [d.score for d in detector.detect(pixels, 0.0)[0]]
    assert scores == sorted(scores, reverse=True)
    middle = scores[len(scores) // 2]
    assert [d.score for d in detector.detect(pixels, middle)[0]] == [
        s for s in scores if s > middle
    ]
    single = detector.detect(pixels[1:], 0.0)[0]
    assert [d.score for d in single] == pytest.approx(
        [d.score for d in detector.detect(pixels, 0.0)[1]], abs=1e-5
    )
    assert detector.detect(pixels[:0]) == []


def test_detections_by_hand() -> None:
    """Two queries, two classes; one mask lies in the upper left quarter, padding is cut away."""
    class_logits = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, -1.0]])
    mask_logits = torch.full((2, 8, 8), -4.0)
    mask_logits[0, :2, :2] = 4.0
    mask_logits[1, :, 4:] = 2.0  # to the right of what is the image
    args = ((8, 8), (4, 4), (4, 4))
    found = detections(class_logits, mask_logits, *args)
    p = class_logits.softmax(dim=-1)
    [(label, score, box, mask)] = [row for row in found if row[3].any()]
    # the second query's mask is empty in the image: its score is 0, and not above any threshold
    assert (label, box) == (0, (0.0, 0.0, 2.0, 2.0)) and mask.sum() == 4
    assert score == pytest.approx(float(p[0, 0] * torch.tensor(4.0).sigmoid()), abs=1e-5)
    assert detections(class_logits, mask_logits, *args, threshold=float(p[0, 0])) == []
    # without padding the second one is there, its box at twice the size
    found = detections(class_logits, mask_logits, (8, 8), (8, 8), (16, 16))
    assert [row[0] for row in found] == [1, 0] and found[0][2] == (8.0, 0.0, 16.0, 16.0)


@pytest.mark.parametrize("seed", range(20))
def test_box_of_a_mask(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(9, 13, generator=generator) < 0.15 * (seed % 4) / 3
    assert box_of(mask) == brute_box(mask)
    one = torch.zeros(9, 13, dtype=torch.bool)
    one[seed % 9, seed % 13] = True
    assert box_of(one) == brute_box(one)


def test_a_network_of_other_classes_is_refused(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = (tmp_path / "config.json").read_text()
    for label in LABELS:
        config = config.replace(f'"{label}"', f'"{label} x"')
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=r"none of COCO's classes but \['person x', "):
        Mask2FormerDetector(str(tmp_path))


@pytest.fixture(scope="module")
def colours(tiny_clip: Path) -> CLIPColours:
    return CLIPColours(f"local-dir:{tiny_clip}", None)


def test_crops_are_pils(colours: CLIPColours) -> None:
    """PIL composites on #999 and crops with rounded corners, black beyond the image."""
    rng = np.random.default_rng(0)
    array = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    image = torch.from_numpy(array).permute(2, 0, 1) / 255
    mask = torch.from_numpy(rng.random((20, 30)) < 0.5)
    boxes = [(2.0, 3.0, 11.0, 9.0), (1.5, 2.5, 7.5, 8.49), (-2.0, 4.0, 33.0, 22.0)]
    grey = Image.new("RGB", (30, 20), "#999")
    for masked in (mask, None):
        whole = Image.fromarray(array)
        if masked is not None:
            whole = Image.composite(whole, grey, Image.fromarray(masked.numpy()))
        for box, part in zip(boxes, crops(image, boxes, [masked] * 3), strict=True):
            wanted = torch.from_numpy(np.array(whole.crop(box))).permute(2, 0, 1) / 255
            assert torch.equal(part, wanted)
    assert crops(image, [(5.0, 5.0, 5.2, 5.4)], [None])[0].shape == (3, 1, 1)
    with pytest.raises(ValueError, match=r"mask of shape \(20, 29\) for an image of \(20, 30\)"):
        crops(image, boxes[:1], [mask[:, :29]])


def reference_colours(colours: CLIPColours, parts: list[Tensor], name: str) -> Tensor:
    """Returns the logits (N, 10) with the loops of a zero-shot classifier over separate texts and crops."""
    rows = []
    for colour in COLOURS:
        each = []
        for text in (
            f"a photo of a {colour} {name}",
            f"a photo of a {colour}-colored {name}",
            f"a photo of a {colour} object",
        ):
            e = colours.clip.text.encode_text(colours.clip.tokenizer([text]))[0]
            each.append(e / e.norm())
        mean = torch.stack(each).mean(dim=0)
        rows.append(mean / mean.norm())
    texts = torch.stack(rows)
    images = [colours.clip.embed(part[None]).image[0] for part in parts]
    return torch.stack([100 * texts @ (e / e.norm()) for e in images])


@torch.no_grad()
def test_colours_are_a_zero_shot_classification(colours: CLIPColours) -> None:
    image = pictures((40, 50), 1)[0]
    boxes = [(0.0, 0.0, 50.0, 40.0), (3.0, 5.0, 9.0, 30.0), (20.0, 1.0, 48.0, 12.0)]
    masks: list[Any] = [image[0] > 0.5, None, image[1] > 0.4]
    logits = reference_colours(colours, crops(image, boxes, masks), "hot dog")
    top = logits.topk(2, dim=1).values
    assert float((top[:, 0] - top[:, 1]).min()) > 1e-3, "no near ties in this test"
    wanted = [COLOURS[i] for i in logits.argmax(dim=1).tolist()]
    assert colours.classify_colors(image, boxes, masks, "hot dog") == wanted
    texts = colours.texts("hot dog")
    assert texts.shape[0] == 10 and torch.allclose(texts.norm(dim=-1), torch.ones(10))
    assert colours.classify_colors(image, [], [], "hot dog") == []


def test_all_together(detector: Mask2FormerDetector, colours: CLIPColours) -> None:
    """The evaluator over real parts: the verdict follows from what the parts say."""
    pixels = pictures((48, 48), 1)
    rules = Rules(threshold=0.02)  # random weights are never sure
    first = detector.detect(pixels, rules.threshold)[0]
    name, box, mask = first[0].name, first[0].box, first[0].mask
    [colour] = colours.classify_colors(pixels[0], [box], [mask], name)
    other = next(c for c in COLOURS if c != colour)
    evaluator = GenEval(detector, colours, rules)
    for asked, correct in ((colour, True), (other, False)):
        entry = {
            "tag": "colors",
            "include": [{"class": name, "count": 1, "color": asked}],
            "prompt": f"a photo of a {asked} {name}",
        }
        assert evaluator.evaluate(pixels, [entry])[0].correct is correct


def test_configs_build_the_parts(folder: Path, tiny_clip: Path) -> None:
    """A config names the parts by class_path; nothing is loaded before it is called for."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--detector", type=Callable[[], Detector])
    parser.add_argument("--colours", type=Callable[[], ColourClassifier])
    where = "stitchvm.metrics.geneval"
    given = {
        "detector": {
            "class_path": f"{where}_detectors.Mask2FormerDetector",
            "init_args": {"model": str(folder), "size": [64, 96]},
        },
        "colours": {
            "class_path": f"{where}_colours.CLIPColours",
            "init_args": {"model": f"local-dir:{tiny_clip}", "checkpoint": None},
        },
    }
    parts = parser.instantiate_classes(parser.parse_object(given))
    detector = parts.detector()
    assert isinstance(detector, Mask2FormerDetector) and detector.size == (64, 96)
    assert isinstance(parts.colours(), CLIPColours)
