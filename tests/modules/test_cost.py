"""What fine-tuning costs: counted by hand."""

from __future__ import annotations

import pytest

from stitchvm.modules.cost import Work, draft_plan, grpo_plan, nft_plan, rough, total
from stitchvm.objectives.stopping import StopWindow


def forwards(plan, prices=None):
    """A whole sample."""
    return total(plan.mean().values()).at(prices or rough(0.0))


def test_a_full_sample_of_diffusion_nft_costs_121_forwards():
    plan = nft_plan(StopWindow(25, 25))
    by_stage = {stage: work.at(rough(0.0)) for stage, work in plan.mean().items()}
    assert by_stage == {"rollout": 25, "value": 0, "update": 24 * 4}
    assert forwards(plan) == 25 + 24 * (3 + 1) == 121
    assert plan.mean_losses() == 24
    # without the regulariser, and with classifier-free guidance
    assert forwards(nft_plan(StopWindow(25, 25), lam=0.0)) == 25 + 24 * 3
    assert forwards(plan, rough(0.0, branches=2)) == 2 * 121


def test_stopped_at_12_to_17_it_costs_72_and_a_half():
    every = nft_plan(StopWindow(12, 17), fraction=1.0)
    assert forwards(every) == 14.5 + 14.5 * 4 == 72.5
    assert 121 / forwards(every) == pytest.approx(1.67, abs=0.005)
    # as the reference leaves out one level of 25, one of each stop is left out
    one_less = nft_plan(StopWindow(12, 17))
    assert one_less.mean_losses() == 13.5
    assert forwards(one_less) == 14.5 + 13.5 * 4 == 68.5


def test_a_value_and_its_gradient():
    # a prefix of 4 of 24 blocks and a tail of a tenth of a pass
    prices = rough(4 / 24 + 0.1)
    stopped = nft_plan(StopWindow(12, 17), fraction=1.0)
    assert forwards(stopped, prices) == pytest.approx(72.5 + 4 / 24 + 0.1)
    draft = draft_plan(StopWindow(3, 7))
    assert forwards(draft, prices) == pytest.approx(5 + 1 + 1 + 2 * (4 / 24 + 0.1))
    assert forwards(draft, rough(0.5, value_backward=0.75)) == 5 + 1 + 1 + 0.5 + 0.75


@pytest.mark.parametrize(
    ("K", "lam", "expected"),
    [(1, 0.01, 10 + 1 + 1), (1, 0.0, 10 + 1), (3, 0.01, 10 + 3 + 3), (None, 0.01, 10 + 10 + 10)],
)
def test_draft_to_the_end(K, lam, expected):
    plan = draft_plan(StopWindow(10, 10), backprop_steps=K, lam=lam)
    assert forwards(plan) == expected
    # only the first of the K backward passes ends in the transformer
    update = plan.mean()["update"]
    assert (update.ends, update.backward) == (1, (K or 10) - 1)
    assert plan.mean_losses() == 1 and not plan.ahead


def test_redraws_repeat_the_last_step_and_the_value():
    plan = draft_plan(StopWindow(10, 10), redraws=2)
    assert plan.mean()["rollout"] == Work(forward=12, frozen=3)
    assert plan.mean()["update"] == Work(ends=3, value_backward=3)
    assert forwards(plan, rough(0.5)) == 12 + 3 + 3 + 3 * 2 * 0.5


@pytest.mark.parametrize(
    ("steps", "kl", "expected"),
    [(3, 0.0, 10 + 3 * 2), (3, 0.1, 10 + 3 * 3), (None, 0.0, 10 + 9 * 2)],
)
def test_flow_grpo(steps, kl, expected):
    plan = grpo_plan(StopWindow(10, 10), steps=steps, kl=kl)
    assert forwards(plan) == expected
    assert plan.mean_losses() == (steps or 9)


def test_conventions_of_a_backward_pass():
    plan = nft_plan(StopWindow(25, 25))
    assert forwards(plan, rough(0.0, again=True)) == 25 + 24 * (3 + 2)
    assert forwards(plan, rough(0.0, trained=True)) == 25 + 24 * (3 + 2)
    assert forwards(plan, rough(0.0, trained=True, again=True)) == 25 + 24 * (3 + 3)
