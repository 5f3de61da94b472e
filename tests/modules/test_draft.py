"""DRaFT's gradient against closed forms and an independent unrolled reference, and what it refuses."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from stitchvm.adapters.full import PolicyWeights
from stitchvm.modules.draft import DRaFT
from stitchvm.modules.held_out import Evaluation
from stitchvm.modules.rows import Rows
from stitchvm.path import FlowPath
from stitchvm.schedule import sigma_grid
from stitchvm.values.tweedie import TweedieFactory
from tests.modules import alignment_runs as runs
from tests.modules.alignment_fakes import Curved, Scale, Sum, TerminalSum, networks

CPU = torch.device("cpu")
Gradients = dict[str, Tensor]


def rows(n: int = 3, group_size: int = 1, update: int = 0) -> Rows:
    batch = {"index": torch.arange(n), "prompt": [f"prompt {i}" for i in range(n)]}
    return Rows.of(batch, group_size, 0, update, CPU)


def built(network: Any = Curved, value: Sum | None = None, **settings: Any) -> DRaFT:
    module = DRaFT(**({"num_steps": 5, "lam": 0.0} | networks(network, value) | settings))
    module.configure_model()
    return module


def gradients(module: DRaFT, update: int = 0, n: int = 3) -> Gradients:
    """The gradient of one update's loss, by weight."""
    for loss in module.micro_steps(rows(n, update=update), None):
        loss.backward()
    found = {
        key: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for key, p in module.policy.parameters().items()
    }
    for p in module.policy.parameters().values():
        p.grad = None
    return found


def close(one: Gradients, two: Gradients, rtol: float = 1e-4) -> bool:
    return all(torch.allclose(one[k], two[k], rtol=rtol, atol=1e-7) for k in one.keys() | two)


def contributions(module: DRaFT, stop: int, n: int = 3) -> list[Gradients]:
    """−dV(z_τ)/dθ through each single step, unrolled by hand with a copy of the weights for each step."""
    network, sigmas = module.generator.transformer, module.sigmas
    copies = [
        {k: p.detach().clone().requires_grad_() for k, p in network.named_parameters()}
        for _ in range(stop)
    ]
    z = module.noise(rows(n))
    for k in range(stop):
        t = sigmas[k].expand(n)
        z = z + (sigmas[k + 1] - sigmas[k]) * functional_call(network, copies[k], (z, t))
    loss = -((1 + sigmas[stop]) * 0.1 * z.flatten(1).sum(1)).mean()
    flat = [p for copy in copies for p in copy.values()]
    found = iter(torch.autograd.grad(loss, flat))
    return [{key: next(found) for key in copy} for copy in copies]


def total(parts: list[Gradients]) -> Gradients:
    return {key: torch.stack([part[key] for part in parts]).sum(0) for key in parts[0]}


@pytest.mark.parametrize("K", [1, 2, 3, None])
def test_the_gradient_is_the_sum_of_the_last_steps_contributions(K):
    module = built(backprop_steps=K, micro_batch=2)
    parts = contributions(module, stop=5)
    wanted = total(parts[-K:] if K else parts)
    assert close(gradients(module), wanted)
    assert not close(total(parts), total(parts[1:]), rtol=1e-2)  # each step counts


def test_all_steps_are_full_back_propagation():
    module = built(backprop_steps=5)
    assert close(gradients(module), gradients(built(backprop_steps=None)), rtol=0)
    z = module.walk(module.noise(rows()), torch.zeros(3, 1), 0, 5)  # no prefix at all
    (-(0.1 * z.flatten(1).sum(1)).mean()).backward()
    wanted = {k: p.grad for k, p in module.policy.parameters().items()}
    assert close(gradients(built(backprop_steps=5)), wanted, rtol=1e-5)


def test_a_prefix_without_graph_is_a_detached_one():
    """The values of the prefix are those of the trained policy, only its gradient is missing."""
    module = built(backprop_steps=2)
    z = module.walk(module.noise(rows()), torch.zeros(3, 1), 0, 3).detach()
    z = module.walk(z, torch.zeros(3, 1), 3, 5)
    (-(0.1 * z.flatten(1).sum(1)).mean()).backward()
    wanted = {k: p.grad for k, p in module.policy.parameters().items()}
    assert close(gradients(built(backprop_steps=2)), wanted, rtol=1e-5)


def test_a_linear_velocity_by_hand():
    """u = a·z: z_N = z_0·Π(1 + a·dt), dz_N/da = z_N·Σ dt/(1 + a·dt)."""
    module = built(partial(Scale, -0.3), backprop_steps=None, num_steps=4)
    dt = sigma_grid(4).diff()
    z = module.noise(rows()) * (1 - 0.3 * dt).prod()
    wanted = -(0.1 * z.flatten(1).sum(1)).mean() * (dt / (1 - 0.3 * dt)).sum()
    assert torch.allclose(gradients(module)["a"], wanted, rtol=1e-5)


def test_the_gradient_is_proportional_to_the_last_step():
    """The schedule trap: σ_last = .25 or .0089 at 10 steps, at nearly the same states."""
    found = {}
    for kind in ("single", "double"):
        value = Sum()
        module = built(partial(Scale, 0.0), value, num_steps=10, grid=kind)  # z stays where it is
        found[kind] = gradients(module)["a"]
    last = {kind: float(sigma_grid(10, kind=kind)[-2]) for kind in found}
    assert last["single"] == 0.25 and last["double"] == pytest.approx(0.00893, abs=1e-5)
    ratio = last["double"] / last["single"]
    assert torch.allclose(found["double"], ratio * found["single"], rtol=1e-5)
    assert found["single"].abs() > 0.01


def test_the_value_is_asked_at_the_stop_of_the_window():
    value = Sum()
    module = built(value=value, num_steps=10, stop=[3, 7], micro_batch=1)
    stops = []
    for update in range(40):
        value.asked.clear()
        gradients(module, update)
        levels = {float(t) for _, ts in value.asked for t in ts}
        assert len(levels) == 1 and len(value.asked) == 3  # one stop for all micro-batches
        stops.append(int((module.sigmas - levels.pop()).abs().argmin()))
        assert stops[-1] == module.window.draw(0, update)
    assert set(stops) == {3, 4, 5, 6, 7}


def test_the_stopped_gradient_is_that_of_the_value_at_tau():
    module = built(stop=[3, 3], backprop_steps=2)
    assert close(gradients(module), total(contributions(module, stop=3)[-2:]))


def test_calls_of_the_network():
    """One per step without guidance, and one of the frozen model where there is a gradient and λ > 0."""
    for lam, calls in ((0.0, 5), (0.1, 6)):
        module = built(backprop_steps=1, num_steps=5, lam=lam)
        gradients(module)
        assert module.generator.calls == [3] * calls


@pytest.fixture
def real(tiny_sd3, tiny_clip):
    """Makes DRaFT on the tiny SD3 with a LoRA that is not zero."""

    def make(perturbed: bool = True, **settings: Any) -> DRaFT:
        arguments = {
            "generator": runs.generator(tiny_sd3),
            "reward": runs.reward(tiny_clip),
            "policy": runs.policy(),
            "num_steps": 4,
        }
        module = DRaFT(**(arguments | settings))
        module.configure_model()
        module.generator.encode_ahead([f"prompt {i}" for i in range(3)])
        if perturbed:
            source = torch.Generator().manual_seed(2)
            with torch.no_grad():
                for p in module.policy.parameters().values():
                    p.add_(0.05 * torch.randn(p.shape, generator=source))
        return module

    return make


def test_the_regulariser_compares_the_same_states_and_is_zero_at_the_start(real):
    module, states = real(perturbed=False, backprop_steps=2, lam=1.0), []
    velocity = module.velocity

    def watched(z: Tensor, t: Any, cond: Any) -> Tensor:
        states.append((module.policy.active, float(t), z.detach().clone()))
        return velocity(z, t, cond)

    module.velocity = watched  # type: ignore[method-assign]
    start = gradients(module)
    assert [name for name, _, _ in states] == ["default"] * 2 + [None, "default"] * 2
    for frozen, trained in (states[2:4], states[4:6]):
        assert frozen[1] == trained[1] and torch.equal(frozen[2], trained[2])
    assert torch.equal(torch.cat(module._notes["regulariser"]), torch.zeros(3))
    plain = real(perturbed=False, backprop_steps=2, lam=0.0)
    assert close(start, gradients(plain), rtol=0)  # R has no gradient there
    moved, free = real(backprop_steps=2, lam=1.0), real(backprop_steps=2, lam=0.0)
    with_r, without = gradients(moved), gradients(free)
    assert torch.cat(moved._notes["regulariser"]).min() > 0
    assert not close(with_r, without, rtol=1e-2)


def test_checkpointing_changes_nothing(real):
    settings = {"backprop_steps": 2, "lam": 0.1}
    plain = gradients(real(**settings))
    again = gradients(real(gradient_checkpointing=True, **settings))
    assert close(plain, again, rtol=1e-5)
    # the last block's text stream ends unused
    assert sum(bool(g.any()) for g in plain.values()) > 0.9 * len(plain)


def test_a_stitched_value_on_the_trained_transformer_is_the_frozen_one(real, stitched):
    """Same value, same gradient as with a copy of the backbone; none of it goes into the LoRA of the value's prefix."""
    modules = [real(value=stitched(share), stop=[2, 3], lam=0.0) for share in (True, False)]
    shared, apart = (m._built.value.value_model.backbone.network for m in modules)
    assert shared is modules[0].generator.transformer and apart is not shared
    assert not any("lora" in name for name, _ in apart.named_parameters())
    z = torch.randn(3, 4, 8, 8).requires_grad_()
    found = []
    for module in (*modules, real(perturbed=False, value=stitched(True), stop=[2, 3])):
        v = module.score(rows(), z, 0.4)
        found.append((v.detach(), torch.autograd.grad(v.sum(), z, retain_graph=True)[0]))
        for p in module.policy.parameters().values():
            with pytest.raises(RuntimeError, match="not have been used"):
                torch.autograd.grad(v.sum(), p, retain_graph=True)
    for other in found[1:]:
        assert torch.equal(found[0][0], other[0]) and torch.equal(found[0][1], other[1])
    assert found[0][1].abs().min(dim=0).values.max() > 0
    assert close(*(gradients(m) for m in modules), rtol=1e-5)


def test_vision_towers_that_no_update_looks_through_are_freed(real, stitched, tiny_clip):
    def tower(**settings: Any) -> Any:
        reward: Any = real(perturbed=False, **settings)._built.value.reward
        assert not reward.parked or reward.visual is not None
        return reward.parked, reward.visual is not None

    judged = Evaluation(rewards={"clip": runs.reward(tiny_clip)})
    assert tower(value=stitched(True)) == (False, False)
    assert tower(value=stitched(True), evaluation=judged) == (True, True)  # waits for evaluations
    assert tower() == (False, True)  # the terminal reward looks at every update's images


def test_a_tweedie_value_is_that_of_the_frozen_model(real):
    """At the same z_τ a policy that moved is judged as one that did not, and its gradient is that of the roll-out."""
    module, base = (
        real(perturbed=p, value=TweedieFactory(velocity="prompt"), stop=[2, 2], lam=0.0)
        for p in (True, False)
    )
    some, ends = rows(), []
    score = module.score

    def watched(part: Rows, z: Tensor, tau: Any) -> Tensor:
        ends.append(z)
        return score(part, z, tau)

    module.score = watched  # type: ignore[method-assign]
    loss = module.losses(some, 2)
    z_tau = ends[0].detach().requires_grad_()
    clean = base.score(some, z_tau, base.sigmas[2])
    assert torch.equal(loss.detach(), -clean.detach())
    with torch.no_grad():
        assert not torch.allclose(score(some, z_tau, module.sigmas[2]), clean, atol=1e-4)
    (g,) = torch.autograd.grad(clean.sum(), z_tau)
    own = list(module.policy.parameters().values())
    expected = torch.autograd.grad(ends[0], own, -g, retain_graph=True, allow_unused=True)
    found = torch.autograd.grad(loss.sum(), own, allow_unused=True)
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_a_tweedie_value_runs_the_frozen_model_again_in_the_backward_pass(real):
    """By blocks, which remember it; as a whole it would be the policy's, and is refused."""
    found = {}
    for again in (False, True):
        value = TweedieFactory(velocity="prompt", checkpointing=again)
        module = real(value=value, stop=[2, 2], lam=0.0, gradient_checkpointing=again)
        found[again] = gradients(module)
    assert close(found[True], found[False], rtol=1e-3)
    with pytest.raises(ValueError, match=r"set model\.gradient_checkpointing to true"):
        real(value=TweedieFactory(checkpointing=True), stop=[2, 2], lam=0.0)


def test_full_fine_tuning_refuses_a_value_on_the_trained_transformer(real):
    with pytest.raises(ValueError, match="would change the value with the policy"):
        real(perturbed=False, policy=PolicyWeights, value=TweedieFactory(), stop=[2, 3], lam=0.0)


@pytest.fixture(scope="module")
def stitched(tiny_sd3, tiny_clip, tmp_path_factory):
    from stitchvm.values.stitched import StitchedFactory
    from tests.modules.sampling_runs import value_model

    folder = value_model(tiny_sd3, tiny_clip, tmp_path_factory.mktemp("values") / "model")
    return lambda share: StitchedFactory(str(folder), share_generator=share)


def test_redraws_average_over_repetitions_of_the_last_step():
    """DRaFT-LV: z_τ is detached before it is noised again."""
    module = built(redraws=2, stop=[3, 3])
    network, sigmas = module.generator.transformer, module.sigmas
    z = module.walk(module.noise(rows()), torch.zeros(3, 1), 0, 2).detach()
    t, tau = sigmas[2], sigmas[3]
    ends = [z + (tau - t) * network(z, t.expand(3))]
    for n in range(2):
        eps = rows().normal("redraw", tuple(z.shape[1:]), n)
        again = FlowPath.bridge(tau, t).interpolate(ends[0].detach(), eps)
        ends.append(again + (tau - t) * network(again, t.expand(3)))
    loss = -torch.stack([(1 + tau) * 0.1 * e.flatten(1).sum(1) for e in ends]).mean()
    wanted = torch.autograd.grad(loss, list(network.parameters()))
    found = gradients(module)
    assert close(found, dict(zip(found, wanted, strict=True)))
    assert not close(found, gradients(built(stop=[3, 3])), rtol=1e-2)


def test_a_ceiling_stops_the_gradient_of_what_is_above():
    free = built()
    values = [free.losses(rows(), 5).neg().detach()]
    c = float(values[0].median())
    module = built(ceiling=c)
    loss = module.losses(rows(), 5)
    assert torch.allclose(loss.detach(), (c - values[0]).clamp_min(0), atol=1e-6)
    assert float(module._notes["active"][0]) == pytest.approx(1 / 3)


def test_the_policy_moves_towards_the_reward(tmp_path):
    class Target(Sum):
        """−(V − 1)², V as `Sum`."""

        def score(self, image: Tensor, text: Tensor | None = None) -> Tensor:
            return -((image[:, 0] - 1.0) ** 2)

    class Watched(DRaFT):
        seen: ClassVar[list[float]] = []

        def losses(self, rows: Rows, stop: int) -> Tensor:
            loss = super().losses(rows, stop)
            self.seen.append(float(loss.detach().mean()))
            return loss

    arguments = networks(Curved, Target()) | {"num_steps": 4, "lam": 0.0, "lr": 0.1, "clip": None}
    runs.fit(Watched(backprop_steps=None, **arguments), tmp_path, max_steps=30)
    assert len(Watched.seen) == 30
    assert sum(Watched.seen[-5:]) < 0.2 * sum(Watched.seen[:5])


BAD = [
    ({"stop": [3, 11]}, "outside of a schedule of 5 steps"),
    ({"stop": [0, 3]}, "expected 1 ≤ low"),
    ({"stop": [4, 3]}, "expected 1 ≤ low"),
    ({"stop": [3]}, r"expected \[low, high\]"),
    ({"stop": [2, 4], "backprop_steps": 3}, "K = 3 with a roll-out that may stop after 2"),
    ({"backprop_steps": 6}, "K = 6 with a roll-out that may stop after 5"),
    ({"backprop_steps": 0}, "expected 1 ≤ K"),
    ({"lam": -1.0}, "lam = -1.0"),
    ({"redraws": -1}, "redraws = -1"),
    ({"grid": "cosine"}, "cosine"),
]


@pytest.mark.parametrize(("settings", "message"), BAD, ids=lambda x: str(x)[:30])
def test_bad_settings_are_refused_at_once(settings, message):
    with pytest.raises(ValueError, match=message):
        DRaFT(**({"num_steps": 5} | networks() | settings))


def test_bad_networks_are_refused_before_training():
    terminal = networks() | {"value": TerminalSum()}
    with pytest.raises(ValueError, match="terminal reward, which is defined at the end only"):
        DRaFT(num_steps=5, stop=[2, 4], lam=0.0, **terminal).configure_model()
    for several in ({"backprop_steps": 2}, {"redraws": 1}):
        with pytest.raises(ValueError, match="Set lam to 0, or backprop_steps to 1"):
            DRaFT(num_steps=5, **networks(), **several).configure_model()


def test_a_value_of_another_latent_space_is_refused_before_training(tiny_sd3):
    from stitchvm.values.stitched import StitchedFactory

    value = StitchedFactory("world:value_clip")
    module = DRaFT(
        generator=runs.generator(tiny_sd3), value=value, stop=[3, 7], policy=runs.policy()
    )
    with pytest.raises(ValueError, match="another latent space"):
        module.configure_model()
