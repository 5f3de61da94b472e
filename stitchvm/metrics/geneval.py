"""GenEval's rules (Ghosh, Hajishirzi, Schmidt 2023): does an image show the objects its prompt names?

An entry of the published evaluation_metadata.jsonl is

    {"tag": task, "prompt": text, "include": [{"class", "count", "color"?, "position"?}, …],
     "exclude"?: [{"class", "count"}, …]}

with "position" = [relation, number of an earlier clause]. From detections to a verdict, in the official order:

1. Of every class keep the detections with score > 0.3 (0.9 where the tag is "counting"), the highest
   scores first, at most 16. Overlapping ones stay: the official non-maximum suppression is off.
2. Every "include" clause, in order, takes the first `count` of its class. Too few: wrong. Only if there
   are enough its colour is looked at (all of them must have it), and only if that is right its position:
   each of them must stand in `relation` to each object of the earlier clause, which must have matched.
3. Every "exclude" clause is wrong when at least `count` of its class were kept.

Relative position: with c the centres and d the sizes of two boxes along an axis,

    o = c_A − c_B,   o' = sign(o)·max(|o| − 0.1·(d_A + d_B), 0),   v = o' / ‖o‖

and A is left of B where v_x < −1/2, right of it where v_x > 1/2, above and below likewise; both may hold. Boxes
that nearly coincide (|o'| < 0.001 along both axes) have no relation.

The reasons are the official evaluator's, word for word (the relations it found, which it names in an
arbitrary order, come in a fixed one). Detections and colours come from a `Detector` and a `ColourClassifier`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import hypot
from typing import Any, NamedTuple

from torch import Tensor

__all__ = [
    "COLOURS",
    "RELATIONS",
    "TASKS",
    "Box",
    "ColourClassifier",
    "Detection",
    "Detector",
    "GenEval",
    "Rules",
    "Verdict",
    "judge",
    "keep",
    "relative_position",
]

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLOURS = (
    "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white",
)  # fmt: skip
RELATIONS = ("left of", "right of", "above", "below")

Box = tuple[float, float, float, float]
Metadata = Mapping[str, Any]


class Detection(NamedTuple):
    """One object that a detector found.

    Attributes:
        name: Its class, as GenEval calls it (`stitchvm.metrics.geneval_detectors.OBJECTS`).
        score: The detector's confidence in [0, 1].
        box: (x0, y0, x1, y1) in pixels, x to the right and y down; the last pixel is x1 − 1, y1 − 1.
        mask: Where it is, bool with the image's shape (H, W); None if the detector gives boxes alone.
    """

    name: str
    score: float
    box: Box
    mask: Tensor | None = None


class Verdict(NamedTuple):
    """Whether an image is right, and why not: one line for each clause that failed."""

    correct: bool
    reason: str = ""


@dataclass(frozen=True)
class Rules:
    """The official evaluator's numbers.

    Attributes:
        threshold: Detections count above this score.
        counting_threshold: The same for prompts with the tag "counting".
        max_objects: The most detections of one class.
        position_threshold: How much of the two sizes together the centres must be apart.
    """

    threshold: float = 0.3
    counting_threshold: float = 0.9
    max_objects: int = 16
    position_threshold: float = 0.1

    def threshold_of(self, metadata: Metadata) -> float:
        """Returns the score above which detections count for a prompt."""
        return self.counting_threshold if metadata["tag"] == "counting" else self.threshold


class Detector(ABC):
    """Finds objects. (A base class and no protocol: the command line finds implementations by their base.)

    Attributes:
        label: What its results are called: "GenEval" is kept for the official detector.
        classes: The classes it can find, as GenEval calls them.
    """

    label: str
    classes: frozenset[str]

    @abstractmethod
    def detect(self, pixels: Tensor, threshold: float = 0.0) -> list[list[Detection]]:
        """Returns the detections of each image, at least all with a score above the threshold.

        Arguments:
            pixels: Images in [0, 1], with shape (B, 3, H, W).
            threshold: Detections below it may be left out.
        """


class ColourClassifier(ABC):
    """Names the colours of objects."""

    @abstractmethod
    def classify_colors(
        self, image: Tensor, boxes: Sequence[Box], masks: Sequence[Tensor | None], name: str
    ) -> list[str]:
        """Returns one of `COLOURS` for each object.

        Arguments:
            image: The image in [0, 1], with shape (3, H, W).
            boxes: The objects' boxes.
            masks: The objects' masks, each bool (H, W) or None.
            name: Their class.
        """


class GenEval:
    """The evaluator: a detector, a classifier of colours and the rules.

    Arguments:
        detector: Finds the objects.
        colours: Names their colours; None if no prompt asks for one.
        rules: The thresholds.
    """

    def __init__(
        self,
        detector: Detector,
        colours: ColourClassifier | None = None,
        rules: Rules | None = None,
    ) -> None:
        self.detector = detector
        self.colours = colours
        self.rules = rules or Rules()

    @property
    def label(self) -> str:
        """What the results are called: the detector's label."""
        return self.detector.label

    def evaluate(self, pixels: Tensor, metadata: Sequence[Metadata]) -> list[Verdict]:
        """Returns the verdict on each image.

        Arguments:
            pixels: Images in [0, 1], with shape (B, 3, H, W).
            metadata: The entry of each image's prompt, B of them.

        Raises:
            ValueError: If there are not as many entries as images, or one names a class that the
                detector does not know, or a colour when there is no classifier.
        """
        if len(pixels) != len(metadata):
            raise ValueError(f"{len(pixels)} images but {len(metadata)} entries: give one each.")
        for entry in metadata:
            clauses = [*entry.get("include", ()), *entry.get("exclude", ())]
            unknown = sorted({c["class"] for c in clauses} - self.detector.classes)
            if unknown:
                raise ValueError(
                    f"the prompt {entry['prompt']!r} asks for {', '.join(unknown)}, which the detector of "
                    f"{self.label} does not know: it has {len(self.detector.classes)} classes. Use one "
                    "trained on COCO's 80."
                )
        if not metadata:
            return []
        lowest = min(self.rules.threshold_of(entry) for entry in metadata)
        found = self.detector.detect(pixels, lowest)
        return [
            judge(entry, detections, image, self.colours, self.rules)
            for entry, detections, image in zip(metadata, found, pixels, strict=True)
        ]


def keep(
    detections: Sequence[Detection], metadata: Metadata, rules: Rules
) -> dict[str, list[Detection]]:
    """Returns the detections that count, by class, the highest scores first (ties in the given order)."""
    threshold = rules.threshold_of(metadata)
    kept: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=lambda d: -d.score):
        if detection.score > threshold:
            kept.setdefault(detection.name, []).append(detection)
    return {name: found[: rules.max_objects] for name, found in kept.items()}


def judge(
    metadata: Metadata,
    detections: Sequence[Detection],
    image: Tensor,
    colours: ColourClassifier | None = None,
    rules: Rules | None = None,
) -> Verdict:
    """Returns the verdict on one image.

    Arguments:
        metadata: The entry of its prompt.
        detections: What was found in it, in any order, below the threshold or not.
        image: The image in [0, 1], with shape (3, H, W), for the classifier of colours.
        colours: The classifier; asked only where the metadata name a colour and the count is right.
        rules: The thresholds; the official ones by default.

    Raises:
        ValueError: If a colour is asked for and there is no classifier.
    """
    rules = rules or Rules()
    objects = keep(detections, metadata, rules)
    reasons: list[str] = []
    matched: list[list[Detection] | None] = []
    for clause in metadata.get("include", ()):
        found = objects.get(clause["class"], [])[: clause["count"]]
        reason = _count(clause, found)
        if reason is None and "color" in clause:
            reason = _colour(clause, found, image, colours)
        if reason is None and "position" in clause:
            reason = _position(clause, found, matched, rules)
        if reason is not None:
            reasons.append(reason)
        matched.append(found if reason is None else None)
    for clause in metadata.get("exclude", ()):
        name, count, there = clause["class"], clause["count"], objects.get(clause["class"], [])
        if len(there) >= count:
            reasons.append(f"expected {name}<{count}, found {len(there)}")
    return Verdict(not reasons, "\n".join(reasons))


def relative_position(a: Box, b: Box, threshold: float = 0.1) -> list[str]:
    """Returns which of `RELATIONS` box `a` has to box `b`, in their order; none, one or two."""
    offset, revised = [], []
    for axis in (0, 1):
        o = (a[axis] + a[axis + 2] - b[axis] - b[axis + 2]) / 2
        reach = threshold * (abs(a[axis + 2] - a[axis]) + abs(b[axis + 2] - b[axis]))
        offset.append(o)
        revised.append(max(abs(o) - reach, 0.0) * (1 if o > 0 else -1))
    if max(abs(o) for o in revised) < 1e-3:
        return []
    x, y = (o / hypot(*offset) for o in revised)
    holds = (x < -0.5, x > 0.5, y < -0.5, y > 0.5)
    return [relation for relation, true in zip(RELATIONS, holds, strict=True) if true]


def _count(clause: Metadata, found: Sequence[Detection]) -> str | None:
    if len(found) >= clause["count"]:
        return None
    return f"expected {clause['class']}>={clause['count']}, found {len(found)}"


def _colour(
    clause: Metadata,
    found: Sequence[Detection],
    image: Tensor,
    classifier: ColourClassifier | None,
) -> str | None:
    name, count, colour = clause["class"], clause["count"], clause["color"]
    if classifier is None:
        raise ValueError(
            f"the metadata ask for a {colour} {name}, but there is no classifier of colours: give one "
            "(stitchvm.metrics.geneval_colours.CLIPColours)."
        )
    boxes, masks = [d.box for d in found], [d.mask for d in found]
    colours = classifier.classify_colors(image, boxes, masks, name)
    right = colours.count(colour)
    if right >= count:
        return None
    seen = ", ".join(f"{colours.count(c)} {c}" for c in COLOURS if c in colours)
    return f"expected {colour} {name}>={count}, found {right} {colour}; and {seen}"


def _position(
    clause: Metadata,
    found: Sequence[Detection],
    matched: Sequence[Sequence[Detection] | None],
    rules: Rules,
) -> str | None:
    relation, place = clause["position"]
    target = matched[place]
    if target is None:
        return f"no target for {clause['class']} to be {relation}"
    for a in found:
        for b in target:
            true = relative_position(a.box, b.box, rules.position_threshold)
            if relation not in true:
                return (
                    f"expected {clause['class']} {relation} target, "
                    f"found {' and '.join(true)} target"
                )
    return None
