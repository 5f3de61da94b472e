"""The moves between policy and copies, and their state: for LoRA adapters and for full fine-tuning."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

from stitchvm.adapters.full import PolicyWeights
from stitchvm.adapters.lora import PolicyAdapters
from stitchvm.adapters.policy import Policy
from stitchvm.objectives.nft import old_decay
from tests.tiny import SD3_CONFIG, randomize

COPIES = ("old", "ema")
INPUT = {
    "hidden_states": torch.ones(1, 4, 8, 8),
    "timestep": torch.tensor([300.0]),
    "encoder_hidden_states": torch.ones(1, 3, 32),
    "pooled_projections": torch.ones(1, 28),
    "return_dict": False,
}


def make(kind: str, copies: tuple[str, ...] = COPIES, **options: Any) -> Policy:
    torch.manual_seed(1)
    transformer = randomize(SD3Transformer2DModel(**{**SD3_CONFIG, "num_layers": 2}))
    if kind == "lora":
        return PolicyAdapters(transformer, r=2, copies=copies, **options)
    return PolicyWeights(transformer, copies=copies)


@pytest.fixture(params=["lora", "full"])
def policy(request: pytest.FixtureRequest) -> Policy:
    return make(request.param)


@torch.no_grad()
def perturb(policy: Policy, seed: int = 0) -> dict[str, Tensor]:
    """Moves the trained weights somewhere and returns them."""
    source = torch.Generator().manual_seed(seed)
    for p in policy.parameters().values():
        p.add_(0.1 * torch.randn(p.shape, generator=source))
    return policy.weights()


def output(policy: Policy) -> Tensor:
    return policy.transformer(**INPUT)[0]


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_zero_decay_copies_and_does_not_alias(policy):
    start = policy.weights("old")
    assert same(start, policy.weights())
    moved = perturb(policy)
    assert same(policy.weights("old"), start) and not same(moved, start)
    policy.decay_old(0.0)
    assert same(policy.weights("old"), moved) and same(policy.weights("ema"), start)
    perturb(policy, seed=1)
    assert same(policy.weights("old"), moved)
    policy.decay_old(1.0)
    assert same(policy.weights("old"), moved)


def test_moves_by_hand(policy):
    key, p = next(iter(policy.parameters().items()))
    weights = [policy.parameters(name)[key] for name in ("old", "ema")]
    with torch.no_grad():
        p.fill_(8.0)
        weights[0].fill_(4.0)
        weights[1].fill_(-2.0)
    policy.decay_old(0.75)
    policy.update_ema(0.9)
    assert torch.allclose(weights[0], torch.full_like(p, 5.0))
    assert torch.allclose(weights[1], torch.full_like(p, -1.0))
    assert torch.equal(p, torch.full_like(p, 8.0))
    # in place: what held the copies holds them still
    assert all(policy.parameters(name)[key] is w for name, w in zip(COPIES, weights, strict=True))


def test_the_old_policy_lags_behind_a_drift_by_rho_over_one_minus_rho(policy):
    key, p = next(iter(policy.parameters().items()))
    rho = 0.8
    with torch.no_grad():
        for _ in range(80):
            p += 1.0
            policy.decay_old(rho)
    lag = (p - policy.parameters("old")[key]).mean().item()
    assert lag == pytest.approx(rho / (1 - rho), rel=1e-4)


def test_the_schedule_starts_with_copies(policy):
    """DiffusionNFT's types 0 and 2 make the old policy the policy itself in early steps."""
    for kind in (0, 2):
        moved = perturb(policy, seed=kind)
        policy.decay_old(old_decay(1, kind))
        assert same(policy.weights("old"), moved)


def test_equal_weights_stay_equal(policy):
    """d·x + (1 − d)·x rounds; the move does not."""
    perturb(policy)
    policy.decay_old(0.0)
    before = policy.weights("old")
    for decay in (0.1, 0.3, 0.9, 0.999):
        policy.decay_old(decay)
    assert same(policy.weights("old"), before)


def test_distance(policy):
    assert policy.distance("old").item() == 0.0
    start, moved = policy.weights(), perturb(policy)
    expected = sum((moved[k] - start[k]).double().square().sum() for k in start) ** 0.5
    assert policy.distance("old").item() == pytest.approx(float(expected), rel=1e-5)


def test_contexts_run_the_copies_and_restore_every_bit(policy):
    start = output(policy).detach()
    moved = perturb(policy)
    trained = output(policy).detach()
    assert not torch.equal(trained, start)
    for fails in (False, True):
        try:
            with policy.use("old"):
                assert torch.equal(output(policy).detach(), start)
                with policy.use("ema"), policy.use("default"):
                    assert torch.equal(output(policy).detach(), trained)
                assert torch.equal(output(policy).detach(), start)
                if fails:
                    raise KeyError
        except KeyError:
            pass
        assert policy.active == "default" and same(policy.weights(), moved)
        assert torch.equal(output(policy).detach(), trained)
    assert all(p.requires_grad for p in policy.trainable())


@pytest.fixture
def ctrl_c():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_cuts_no_switch_in_two(policy, monkeypatch, ctrl_c):
    """On entering, and on leaving: the interrupt comes when all weights are switched, and nothing is lost."""
    start, moved = policy.weights("old"), perturb(policy)
    layers = "_layers" if isinstance(policy, PolicyAdapters) else "_local"

    class Interrupting(list):
        def __iter__(self):
            for k, x in enumerate(super().__iter__()):
                if k == 5 and policy.armed:
                    policy.armed = False
                    os.kill(os.getpid(), signal.SIGINT)
                yield x

    found = getattr(policy, layers)
    armed = Interrupting(found) if layers == "_layers" else lambda name: Interrupting(found(name))
    monkeypatch.setattr(policy, layers, armed)
    policy.armed = True
    with pytest.raises(KeyboardInterrupt), policy.use("old"):
        raise AssertionError("the interrupt came too late")
    assert not policy.armed and policy.active == "default"
    assert same(policy.weights(), moved) and same(policy.weights("old"), start)
    with pytest.raises(KeyboardInterrupt), policy.use("old"):
        policy.armed = True
    assert not policy.armed and policy.active == "default"
    assert same(policy.weights(), moved) and same(policy.weights("old"), start)


def test_state_goes_round_and_names_what_is_wrong(policy):
    perturb(policy)
    policy.update_ema(0.5)
    state = policy.state()
    assert set(state) == {f"{n}.{k}" for n in ("default", *COPIES) for k in policy.parameters()}
    assert not any(value.requires_grad for value in state.values())
    other = make("lora" if isinstance(policy, PolicyAdapters) else "full")
    holders = list(other.parameters("ema").values())
    other.load_state(state)
    assert same(other.state(), state) and torch.equal(output(other), output(policy))
    assert all(x is y for x, y in zip(holders, other.parameters("ema").values(), strict=True))
    # a rank that writes nothing keeps nothing
    assert policy.state(keep=False) == {} == policy.weights("ema", keep=False)
    # a state is no alias of the weights
    perturb(other, seed=5)
    assert same(policy.state(), state)

    key = next(iter(state))
    for change, message in (
        ({k: v for k, v in state.items() if k != key}, rf"missing \['{key}'\] \(1\)"),
        ({**state, "best.x": state[key]}, r"unknown \['best.x'\]"),
        ({**state, key: state[key][:1]}, rf"wrong shape \['{key} "),
    ):
        with pytest.raises(ValueError, match=message):
            other.load_state(change)


def test_nothing_is_moved_or_saved_while_a_copy_is_active(policy):
    with policy.use("old"):
        for action in (
            lambda: policy.decay_old(0.5),
            lambda: policy.state(),
            lambda: policy.distance("old"),
            lambda: policy.load_state({}),
        ):
            with pytest.raises(RuntimeError, match="while 'old' is active"):
                action()


def test_bad_moves(policy):
    for name, decay in (("old", 1.5), ("old", -0.1), ("default", 0.5)):
        with pytest.raises(ValueError, match="expected a copy and a decay"):
            policy.follow(name, decay)
    with pytest.raises(ValueError, match="no 'best'"):
        policy.follow("best", 0.5)
    only = make("lora" if isinstance(policy, PolicyAdapters) else "full", copies=("ema",))
    with pytest.raises(ValueError, match="no 'old'"):
        only.decay_old(0.5)


# Full fine-tuning alone.


def test_full_trains_everything_and_keeps_the_frozen_model_on_request():
    policy = make("full", copies=("old", "base"))
    assert sum(p.numel() for p in policy.trainable()) == policy.transformer.num_parameters()
    start = output(policy).detach()
    perturb(policy)
    policy.decay_old(0.0)
    with policy.off():
        assert torch.equal(output(policy).detach(), start)
        with policy.use("old"):
            assert not torch.equal(output(policy).detach(), start)
        assert torch.equal(output(policy).detach(), start)
    with pytest.raises(ValueError, match="does not follow"):
        policy.follow("base", 0.0)
    without = make("full")
    with pytest.raises(ValueError, match="keep it with copies"), without.off():
        pass
    assert without.active == "default"


def test_full_refuses_half_precision_and_frozen_weights():
    transformer = SD3Transformer2DModel(**{**SD3_CONFIG, "num_layers": 1}).bfloat16()
    with pytest.raises(ValueError, match=r"torch.bfloat16.*expected float32"):
        PolicyWeights(transformer)
    policy = make("full")
    policy.transformer.proj_out.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"proj_out.weight.*frozen past the policy"):
        policy.state()


def test_full_notices_an_exchange_between_forward_and_backward():
    policy = make("full")
    perturb(policy)
    loss = output(policy).square().sum()
    with policy.use("old"):
        pass
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    # what a checkpoint runs again saved no weights whose version could be compared
    loss = policy.checkpoint(output, policy).sum()
    with (
        pytest.raises(RuntimeError, match="run again in a backward pass while 'old'"),
        policy.use("old"),
    ):
        loss.backward()
    # old first, the policy last, then backward: as it is meant
    for p in policy.trainable():
        p.grad = None
    with torch.no_grad(), policy.use("old"):
        target = output(policy)
    (output(policy) - target).square().sum().backward()
    assert all(p.grad is not None for p in policy.trainable())
