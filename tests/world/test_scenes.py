from __future__ import annotations

import numpy as np
import pytest

from stitchvm.world.checker import check, check_batch, pass_rate, read
from stitchvm.world.render import render
from stitchvm.world.scenes import (
    SPLITS,
    keys,
    mutate,
    parse,
    sample_scenes,
    scene_from_key,
    split_of,
)
from stitchvm.world.scores import aesthetic_score, match, preference_groups, preference_score
from stitchvm.world.tokens import CONTEXT, encode


def test_every_key_is_in_exactly_one_split() -> None:
    every = [set(singles) | set(pairs) for singles, pairs in map(keys, SPLITS)]
    assert sum(map(len, every)) == len(set.union(*every)) == 24 * 20 * 2 * 4 + 24 * 4
    assert len(every[2]) >= 512
    assert all(
        split_of(k) == name for name, found in zip(SPLITS, every, strict=True) for k in found
    )


def test_caption_parses_back_and_both_wordings_share_a_key() -> None:
    for scene in sample_scenes("train", 300, 0):
        assert parse(scene.caption).key == scene.key
        assert len(encode([scene.caption])[0]) == CONTEXT
    one = parse("a red circle left of a blue square on a dark background")
    other = parse("a blue square right of a red circle on a dark background")
    assert one.key == other.key
    assert one.key != parse("a red circle right of a blue square on a dark background").key


@pytest.mark.parametrize(
    "caption", ["", "a dog", "a red circle", "a red circle on a pink background"]
)
def test_caption_outside_the_grammar_is_named(caption: str) -> None:
    with pytest.raises(ValueError, match="grammar"):
        parse(caption)


def test_sampling_is_seeded_and_distinct() -> None:
    assert sample_scenes("tune", 20, 3) == sample_scenes("tune", 20, 3)
    assert sample_scenes("tune", 20, 3) != sample_scenes("tune", 20, 4)
    found = [s.key for s in sample_scenes("test", 512, 0, distinct=True)]
    assert len(set(found)) == 512
    with pytest.raises(ValueError, match="distinct"):
        sample_scenes("test", 10_000, 0, distinct=True)
    with pytest.raises(ValueError, match="split"):
        sample_scenes("validation", 1, 0)


def test_checker_reads_renders_and_rejects_other_captions() -> None:
    scenes = sample_scenes("test", 400, 1, distinct=True)
    images = render(scenes)
    assert images.shape == (400, 3, 32, 32) and images.dtype == np.float32
    assert pass_rate(check_batch(images, [s.caption for s in scenes])) >= 0.995
    assert pass_rate(check_batch(images, scenes[1:] + scenes[:1])) < 0.01


def test_checker_reads_place_and_radius() -> None:
    for scene in sample_scenes("test", 60, 2):
        seen, _ = read(render([scene])[0])
        assert seen is not None
        for a in scene.things:
            b = next(t for t in seen.things if t.colour == a.colour)
            assert abs(a.x - b.x) < 1 and abs(a.y - b.y) < 1 and abs(a.radius - b.radius) < 1.2


def test_one_changed_attribute_fails_and_is_named() -> None:
    rng = np.random.default_rng(0)
    for scene in sample_scenes("test", 60, 3):
        result = check(render([scene])[0], scene_from_key(mutate(scene.key, rng)))
        assert not result.whole
        assert min(result.attributes.values()) < 1


def test_checker_rejects_blank_noise_and_wrong_shapes() -> None:
    caption = "a red circle on a dark background"
    assert not check(np.full((3, 32, 32), 0.2, np.float32), caption).whole
    noise = np.random.default_rng(0).random((3, 32, 32), dtype=np.float32)
    assert not check(noise, caption).whole
    with pytest.raises(ValueError, match="shape"):
        check(noise[:, :16], caption)
    with pytest.raises(ValueError, match="captions"):
        check_batch(noise[None], [caption, caption])


def test_true_scores() -> None:
    scores = np.array([aesthetic_score(s) for s in sample_scenes("train", 2000, 0)])
    assert 4.7 < scores.mean() < 5.4 and 1.2 < scores.std() < 1.6
    rng = np.random.default_rng(0)
    for scene in sample_scenes("train", 50, 1):
        other = scene_from_key(mutate(scene.key, rng))
        assert match(scene, scene) == pytest.approx(1.0)
        assert match(other, scene) < 0.95
        assert preference_score(scene, scene) == preference_score(scene.caption, scene)


def test_preference_groups_are_ranked_within_their_split() -> None:
    for group in preference_groups("test", 20, 0):
        assert all(split_of(s.key) == "test" for s in group.scenes)
        ordered = [s for _, s in sorted(zip(group.ranks, group.scores, strict=True))]
        assert ordered == sorted(group.scores, reverse=True)
        assert min(abs(np.diff(ordered))) >= 0.25
