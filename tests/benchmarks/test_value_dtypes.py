"""What bfloat16 costs a value on the embedded world: bounds of what the shipped configs rely on."""

from __future__ import annotations

import math

import pytest

from benchmarks.value_dtypes import TWEEDIE, Dtypes, compare, latents, stitched, tweedie

SIGMA, DRAWS = 0.5, 2


@pytest.mark.parametrize(
    ("build", "parts"),
    [(stitched, Dtypes(tail="bfloat16")), (tweedie, Dtypes(vae="bfloat16", reward="bfloat16"))],
)
def test_gradients_stand_bfloat16_and_values_differ_a_little(build, parts: Dtypes) -> None:
    prompts, noisy = latents(2, DRAWS, [SIGMA])
    variants = {"parts": parts, "generator": TWEEDIE["generator"], "nothing": Dtypes()}
    found = {r["bfloat16"]: r for r in compare(build, variants, prompts, noisy, DRAWS)}
    ours, generator, nothing = (found[name] for name in variants)
    assert ours["n"] == 4 and ours["sigma"] == SIGMA
    assert ours["lowest"] > 0.995
    # the transformer runs in bfloat16 anyway: what the other parts add is less
    assert 0 < ours["relative"] < generator["relative"] < 0.1
    assert 0 < ours["value"] < 0.5
    assert nothing["relative"] == nothing["value"] == 0
    assert math.isclose(nothing["cosine"], 1, abs_tol=1e-12)
