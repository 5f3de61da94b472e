"""A step of distillation by hand: which noise, level, student and teacher belong together; the optimiser's rates."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from stitchvm.backbones.sd3 import SD3Backbone
from stitchvm.modules.distillation import StitchDistillation
from stitchvm.objectives.distill import aesthetic_distillation, representation_distillation
from stitchvm.randomness import keyed_normal
from stitchvm.rewards.aesthetic import AestheticReward
from stitchvm.rewards.base import Embedding
from stitchvm.rewards.clip import CLIPReward
from stitchvm.schedule import Uniform
from stitchvm.vae import VAE
from tests.rewards.tiny import head_file

BATCH = {"index": torch.tensor([7, 2]), "epoch": 3}


@pytest.fixture
def build(tiny_sd3: Path, tiny_clip: Path, tmp_path: Path) -> Any:
    clip = f"local-dir:{tiny_clip}"

    def made(**options: Any) -> StitchDistillation:
        reward: Any = partial(CLIPReward, clip)
        if options.get("objective") == "aesthetic":
            head = str(head_file(tmp_path / "head.pth"))
            reward = partial(AestheticReward, clip, head=head)
        backbone = partial(SD3Backbone, str(tiny_sd3), dtype="float32", null_tokens=4)
        vae = partial(VAE, str(tiny_sd3))
        module = StitchDistillation(backbone, reward, vae, stitch_point=[2, 1], **options)
        module.configure_model()
        return module

    return made


@pytest.mark.parametrize("objective", ["representation", "aesthetic"])
def test_every_level_of_every_image_is_the_equation(build: Any, objective: str) -> None:
    weights = {"lambda_tok": 0.5}
    if objective == "aesthetic":
        weights |= {"lambda_emb": 2.0, "lambda_sc": 4.0}
    module = build(objective=objective, noise_levels=3, seed=5, **weights)
    pixels = torch.rand(2, 3, 16, 16)
    t = torch.tensor([[0.1, 0.4, 0.9], [0.2, 0.5, 1.0]])
    with torch.no_grad():
        terms = module.losses(BATCH | {"pixels": pixels}, t, epoch=3)
        for n, index in enumerate(BATCH["index"].tolist()):
            teacher = module.teacher.embed(pixels[n : n + 1])
            z_0 = module.vae.encode(pixels[n : n + 1])
            for k in range(3):
                eps = keyed_normal([(5, "eps", 3, index, k)], z_0.shape[1:])
                z_t = (1 - t[n, k]) * z_0 + t[n, k] * eps
                student = module.value_model(z_t, t[n, k : k + 1])
                wanted = loss(module, student, teacher, weights)
                for name, value in wanted.items():
                    torch.testing.assert_close(terms[name][3 * n + k], value[0])
    assert terms["loss"].unique().numel() == 6


def loss(
    module: StitchDistillation, student: Embedding, teacher: Embedding, weights: dict[str, float]
) -> dict[str, Tensor]:
    if module.objective == "representation":
        return representation_distillation(student, teacher, **weights)
    scores = [module.teacher.score(x.image) for x in (student, teacher)]
    return aesthetic_distillation(student, teacher, *scores, **weights)


def test_levels_of_an_image_are_of_its_strata_and_nobody_elses(
    build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = build(noise_levels=4, noise_law=Uniform())
    seen: list[Tensor] = []

    def noted(self: StitchDistillation, batch: Any, t: Tensor, epoch: int) -> dict[str, Tensor]:
        seen.append(t)
        return {"loss": t.sum()}

    monkeypatch.setattr(StitchDistillation, "losses", noted)
    monkeypatch.setattr(StitchDistillation, "log", lambda *_, **__: None)
    monkeypatch.setattr(StitchDistillation, "log_dict", lambda *_, **__: None)
    for batch in (BATCH, BATCH | {"index": BATCH["index"][1:]}, BATCH | {"epoch": 4}):
        module.training_step(batch, 0)
    first, alone, later = seen
    assert first.shape == (2, 4) and first.dtype == torch.float32
    strata = torch.arange(4) / 4
    for t in seen:
        assert ((strata <= t) & (t <= strata + 0.25)).all()
    assert torch.equal(alone, first[1:]) and not (later == first).any()


@pytest.mark.parametrize("decay", ["none", "linear"])
def test_rates_of_tail_and_stitch(build: Any, decay: str) -> None:
    module = build(lr=1e-2, stitch_lr_factor=3.0, warmup_steps=4, weight_decay=0.1, decay=decay)
    module._trainer = SimpleNamespace(estimated_stepping_batches=8)
    found = module.configure_optimizers()
    optimizer, scheduler = found["optimizer"], found["lr_scheduler"]["scheduler"]
    tail, stitch = optimizer.param_groups
    model = module.value_model
    assert [id(p) for p in tail["params"]] == [id(p) for p in model.tail.parameters()]
    assert [id(p) for p in stitch["params"]] == [id(p) for p in model.stitch.parameters()]
    assert tail["weight_decay"] == stitch["weight_decay"] == 0.1
    for step in range(9):
        wanted = min(1.0, (step + 1) / 4) * (1 - step / 8 if decay == "linear" else 1.0)
        assert [g["lr"] for g in (tail, stitch)] == pytest.approx([1e-2 * wanted, 3e-2 * wanted])
        optimizer.step()
        scheduler.step()
    assert found["lr_scheduler"]["interval"] == "step"
