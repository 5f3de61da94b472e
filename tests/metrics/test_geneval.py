"""GenEval's rules on detections made by hand, for every task and at every edge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from stitchvm.metrics.geneval import (
    Box,
    ColourClassifier,
    Detection,
    Detector,
    GenEval,
    Rules,
    judge,
    relative_position,
)
from stitchvm.metrics.geneval_metadata import check_metadata, group_of, is_metadata

IMAGE = torch.zeros(3, 100, 100)
LEFT, RIGHT = (0.0, 40.0, 20.0, 60.0), (60.0, 40.0, 80.0, 60.0)


def entry(tag: str, *include: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"tag": tag, "include": list(include), "prompt": "a photo", **more}


def clause(name: str, count: int = 1, **more: Any) -> dict[str, Any]:
    return {"class": name, "count": count, **more}


class Painted(ColourClassifier):
    """Says of each box the colour that was written down for it, and notes what it was asked."""

    def __init__(self, colours: dict[Box, str]) -> None:
        self.colours = colours
        self.asked: list[tuple[str, list[Box]]] = []

    def classify_colors(
        self, image: Tensor, boxes: Sequence[Box], masks: Sequence[Tensor | None], name: str
    ) -> list[str]:
        self.asked.append((name, list(boxes)))
        return [self.colours[box] for box in boxes]


class Listed(Detector):
    """A detector that gives each image what was written down for it, and notes the threshold."""

    label = "GenEval-test"
    classes = frozenset({"dog", "cat"})

    def __init__(self, found: list[list[Detection]]) -> None:
        self.found = found
        self.thresholds: list[float] = []

    def detect(self, pixels: Tensor, threshold: float = 0.0) -> list[list[Detection]]:
        self.thresholds.append(threshold)
        return self.found


def test_single_object_needs_a_score_above_the_threshold() -> None:
    wanted = entry("single_object", clause("dog"))
    assert judge(wanted, [Detection("dog", 0.31, LEFT)], IMAGE) == (True, "")
    for found in ([], [Detection("dog", 0.3, LEFT)], [Detection("cat", 0.99, LEFT)]):
        assert judge(wanted, found, IMAGE) == (False, "expected dog>=1, found 0")


def test_two_objects_give_one_reason_each() -> None:
    wanted = entry("two_object", clause("dog"), clause("cat"))
    both = [Detection("cat", 0.5, LEFT), Detection("dog", 0.4, RIGHT)]
    assert judge(wanted, both, IMAGE).correct
    verdict = judge(wanted, [], IMAGE)
    assert verdict == (False, "expected dog>=1, found 0\nexpected cat>=1, found 0")


def test_counting_has_its_own_threshold_and_an_upper_bound() -> None:
    wanted = entry("counting", clause("dog", 2), exclude=[clause("dog", 3)])

    def count(sure: int, unsure: int) -> tuple[bool, str]:
        found = [Detection("dog", 0.91, (float(i), 0.0, i + 1.0, 1.0)) for i in range(sure)]
        return judge(wanted, found + [Detection("dog", 0.9, LEFT)] * unsure, IMAGE)

    assert count(2, 7) == (True, "")  # those of 0.9 do not count
    assert count(1, 7) == (False, "expected dog>=2, found 1")
    assert count(3, 0) == (False, "expected dog<3, found 3")
    assert count(4, 0) == (False, "expected dog<3, found 4")


def test_at_most_sixteen_of_a_class() -> None:
    found = [Detection("dog", 0.95, LEFT)] * 40
    wanted = entry("counting", clause("dog", 16), exclude=[clause("dog", 17)])
    assert judge(wanted, found, IMAGE).correct
    more = judge(entry("counting", clause("dog", 17)), found, IMAGE)
    assert more.reason == "expected dog>=17, found 16"
    assert not judge(wanted, found, IMAGE, rules=Rules(max_objects=20)).correct


def test_the_colour_is_that_of_the_surest() -> None:
    wanted = entry("colors", clause("dog", color="red"))
    painted = Painted({LEFT: "red", RIGHT: "blue"})
    found = [Detection("dog", 0.4, LEFT), Detection("dog", 0.8, RIGHT)]
    verdict = judge(wanted, found, IMAGE, painted)
    assert verdict == (False, "expected red dog>=1, found 0 red; and 1 blue")
    assert painted.asked == [("dog", [RIGHT])]
    swapped = [Detection("dog", 0.8, LEFT), Detection("dog", 0.4, RIGHT)]
    assert judge(wanted, swapped, IMAGE, painted).correct


def test_ties_keep_the_order_given() -> None:
    wanted = entry("colors", clause("dog", color="red"))
    painted = Painted({LEFT: "red", RIGHT: "blue"})
    for order, correct in (((LEFT, RIGHT), True), ((RIGHT, LEFT), False)):
        found = [Detection("dog", 0.5, box) for box in order]
        assert judge(wanted, found, IMAGE, painted).correct is correct


def test_colours_are_named_in_a_fixed_order() -> None:
    boxes = [(float(i), 0.0, i + 1.0, 1.0) for i in range(4)]
    painted = Painted(dict(zip(boxes, ["white", "red", "white", "orange"], strict=True)))
    wanted = entry("colors", clause("dog", 4, color="red"))
    verdict = judge(wanted, [Detection("dog", 0.9, b) for b in boxes], IMAGE, painted)
    assert verdict.reason == "expected red dog>=4, found 1 red; and 1 red, 1 orange, 2 white"


def test_the_colour_is_not_looked_at_when_the_count_is_wrong() -> None:
    wanted = entry("color_attr", clause("dog", color="red"), clause("cat", color="blue"))
    painted = Painted({LEFT: "blue"})
    verdict = judge(wanted, [Detection("cat", 0.9, LEFT)], IMAGE, painted)
    assert verdict == (False, "expected dog>=1, found 0")
    assert painted.asked == [("cat", [LEFT])]


def test_a_colour_without_a_classifier_is_an_error() -> None:
    with pytest.raises(ValueError, match="ask for a red dog, but there is no classifier"):
        judge(entry("colors", clause("dog", color="red")), [Detection("dog", 0.9, LEFT)], IMAGE)


def position(relation: str) -> dict[str, Any]:
    return entry("position", clause("cat"), clause("dog", position=[relation, 0]))


def test_position_reads_from_the_later_clause_to_the_earlier() -> None:
    found = [Detection("dog", 0.9, LEFT), Detection("cat", 0.9, RIGHT)]
    assert judge(position("left of"), found, IMAGE).correct
    verdict = judge(position("right of"), found, IMAGE)
    assert verdict == (False, "expected dog right of target, found left of target")
    close = [Detection("dog", 0.9, LEFT), Detection("cat", 0.9, LEFT)]
    assert (
        judge(position("above"), close, IMAGE).reason == "expected dog above target, found  target"
    )


def test_position_needs_a_target_that_matched() -> None:
    verdict = judge(position("left of"), [Detection("dog", 0.9, LEFT)], IMAGE)
    assert verdict.reason == "expected cat>=1, found 0\nno target for dog to be left of"
    wanted = entry("position", clause("cat", color="red"), clause("dog", position=["left of", 0]))
    found = [Detection("dog", 0.9, LEFT), Detection("cat", 0.9, RIGHT)]
    verdict = judge(wanted, found, IMAGE, Painted({RIGHT: "blue"}))
    assert verdict.reason.split("\n")[1] == "no target for dog to be left of"


def test_position_is_not_looked_at_when_the_colour_is_wrong() -> None:
    wanted = entry("position", clause("cat"), clause("dog", color="red", position=["right of", 0]))
    found = [Detection("dog", 0.9, LEFT), Detection("cat", 0.9, RIGHT)]
    verdict = judge(wanted, found, IMAGE, Painted({LEFT: "blue"}))
    assert verdict.reason == "expected red dog>=1, found 0 red; and 1 blue"


def test_every_pair_must_stand_so() -> None:
    wanted = entry("position", clause("cat", 2), clause("dog", position=["left of", 0]))
    dog = Detection("dog", 0.9, (40.0, 40.0, 50.0, 50.0))
    cats = [Detection("cat", 0.9, RIGHT), Detection("cat", 0.8, LEFT)]
    verdict = judge(wanted, [dog, *cats], IMAGE)
    assert verdict.reason == "expected dog left of target, found right of target"
    assert judge(wanted, [dog, cats[0], Detection("cat", 0.8, RIGHT)], IMAGE).correct


def test_relative_position_by_hand() -> None:
    # sizes 10 and 10: the centres must be more than 0.1 · 20 = 2 apart
    b = (100.0, 100.0, 110.0, 110.0)

    def at(dx: float, dy: float) -> list[str]:
        return relative_position((100 + dx, 100 + dy, 110 + dx, 110 + dy), b)

    assert at(0, 0) == [] and at(2, 0) == [] and at(-2, 2) == []
    assert at(2.0005, 0) == []  # 0.0005 is less than a thousandth
    # v = (o − 2)/o exceeds 1/2 from o = 4 on
    assert at(4, 0) == [] and at(4.01, 0) == ["right of"] and at(-4.01, 0) == ["left of"]
    assert at(0, 4.01) == ["below"] and at(0, -4.01) == ["above"]
    assert at(30, 30) == ["right of", "below"] and at(-30, -30) == ["left of", "above"]
    # o = (12, 5): ‖o‖ = 13, v = (10/13, 3/13)
    assert at(12, 5) == ["right of"]
    # o = (8, 6): ‖o‖ = 10, v = (0.6, 0.4); with a threshold of 0 it would be (0.8, 0.6)
    assert at(8, 6) == ["right of"]
    assert relative_position((108, 106, 118, 116), b, 0.0) == ["right of", "below"]


def test_the_size_counts_along_its_own_axis() -> None:
    wide, tall = (0.0, 0.0, 80.0, 10.0), (30.0, 30.0, 40.0, 110.0)
    # o = (5, −65); 0.1 · sizes = 9 along each: o' = (0, −56)
    assert relative_position(wide, tall) == ["above"]


def test_the_evaluator_asks_for_the_lowest_threshold_of_the_batch() -> None:
    counting = entry("counting", clause("dog"), exclude=[clause("dog", 2)])
    single = entry("single_object", clause("dog"))
    found = [Detection("dog", 0.95, LEFT), Detection("dog", 0.5, RIGHT)]
    detector = Listed([found, found])
    evaluator = GenEval(detector)
    verdicts = evaluator.evaluate(torch.zeros(2, 3, 8, 8), [counting, single])
    assert [verdict.correct for verdict in verdicts] == [True, True]
    evaluator.evaluate(torch.zeros(2, 3, 8, 8), [counting, counting])
    assert detector.thresholds == [0.3, 0.9] and evaluator.label == "GenEval-test"
    assert evaluator.evaluate(torch.zeros(0, 3, 8, 8), []) == []


def test_the_evaluator_refuses_what_it_cannot_judge() -> None:
    evaluator = GenEval(Listed([[]]))
    with pytest.raises(ValueError, match="asks for zebra, which the detector of GenEval-test"):
        evaluator.evaluate(IMAGE[None], [entry("single_object", clause("zebra"))])
    with pytest.raises(ValueError, match="1 images but 2 entries"):
        evaluator.evaluate(IMAGE[None], [entry("single_object", clause("dog"))] * 2)


def test_metadata_are_checked() -> None:
    good = entry(
        "position",
        clause("cat", color="red"),
        clause("dog", position=["above", 0]),
        exclude=[clause("cat", 2)],
    )
    check_metadata(good, "Line 1")
    assert is_metadata(good) and not is_metadata({"prompt": "x"}) and not is_metadata("x")
    assert group_of(good) == group_of(dict(reversed(good.items()))) < 2**63
    assert group_of(good) != group_of(good | {"prompt": "another"})
    for bad, message in [
        ("text", "Line 1 has no key 'tag', only str"),
        ({"tag": "counting", "prompt": "x"}, r"no key 'include', only \['prompt', 'tag'\]"),
        (entry("colours", clause("dog")), "tag 'colours': expected one of .*'colors'"),
        (entry("counting"), "not both empty"),
        (entry("counting", clause("dog", 0)), "'count' must be a whole number from 1, got 0"),
        (entry("counting", {"count": 1}), "expected an object with a 'class'"),
        (entry("colors", clause("dog", color="grey")), "'color' must be one of"),
        (entry("position", clause("dog", position=["above", 0])), "of which only 0 come before"),
        (entry("position", clause("dog", position=["above"])), "relation, number of an earlier"),
        (entry("position", clause("dog", position=["over", 0])), "relation must be one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            check_metadata(bad, "Line 1")
