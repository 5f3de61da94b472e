"""What the fine-tuning methods share: an update's arithmetic, skipped updates, LoRA on a transformer."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_only

from stitchvm.data.prompts import Prompts
from stitchvm.modules.draft import DRaFT
from stitchvm.modules.rows import Rows
from stitchvm.rewards.base import NotFiniteError
from tests.modules import alignment_runs as runs
from tests.modules.alignment_fakes import Broken, draft, evaluated

CPU = torch.device("cpu")


def test_micro_batches_change_nothing_but_rounding(tmp_path):
    found = []
    for micro_batch in (1, 3, None):
        module = draft(micro_batch=micro_batch)
        runs.fit(module, tmp_path, max_steps=3)
        found.append(module.policy.weights("ema"))
    for other in found[1:]:
        for key, value in found[0].items():
            torch.testing.assert_close(other[key], value, rtol=1e-4, atol=1e-5)


def test_one_step_of_adamw_by_hand(tmp_path):
    """The mean loss of the update's images, clipped; then the average that is evaluated."""
    module = draft(lam=0.0, clip=0.01, ema_limit=0.1, warmup_steps=4, weight_decay=0.1)
    module.configure_model()
    start = module.policy.weights()
    batch = {"index": torch.tensor(first_batch()), "prompt": [""] * 4}
    loss = module.losses(Rows.of(batch, 2, 0, 0, CPU), 3).mean()
    parameters = list(module.policy.parameters().values())
    gradients = torch.autograd.grad(loss, parameters)
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    assert norm > 0.02
    twin = [p.detach().clone().requires_grad_() for p in parameters]
    for p, g in zip(twin, gradients, strict=True):
        p.grad = g * 0.01 / norm
    torch.optim.AdamW(twin, lr=0.05 / 4, weight_decay=0.1).step()
    runs.fit(module, tmp_path, max_steps=1)
    after, ema = module.policy.weights(), module.policy.weights("ema")
    for (key, p), wanted in zip(after.items(), twin, strict=True):
        torch.testing.assert_close(p, wanted.detach(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(ema[key], 0.1 * start[key] + 0.9 * p, rtol=1e-5, atol=1e-7)
    assert module.trainer.optimizers[0].param_groups[0]["lr"] == 0.05 * 2 / 4


def first_batch() -> list[int]:
    data = Prompts(prompts=runs.PROMPTS, prompts_per_update=4)
    data.setup("fit")
    return next(iter(data.train_dataloader()))["index"].tolist()


@pytest.mark.parametrize("kind", ["error", "value", "gradient"])
def test_an_update_that_is_not_finite_is_skipped(kind, tmp_path):
    """Three micro-batches an update; the second of the second update fails."""
    value = Broken(kind, 4)
    module = draft(value, warmup_steps=10)
    seen = []

    class Watched(DRaFT):
        def after_step(self, step: int) -> None:
            seen.append((step, self.update, self.policy.weights("ema")))

    module.__class__ = Watched
    with pytest.warns(match="is not finite") if kind == "error" else nullcontext():
        runs.fit(module, tmp_path, max_steps=3)
    assert (module.skipped, module.skipped_in_a_row) == (1, 0)
    assert [step for step, *_ in seen] == [1, 2, 3]
    assert module.update == 4 and module.trainer.global_step == 3
    assert module.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.05 * 4 / 10)
    assert all(p.isfinite().all() for p in module.policy.state().values())
    levels = [len(z) for z, _ in value.asked]
    assert levels == [3, 3, 2] * 4  # also after the failure all ranks do the same work
    # the other updates are those of a run whose second update had no gradient at all
    twin = draft(cls=Frozen, warmup_steps=10)
    runs.fit(twin, tmp_path, max_steps=3)
    for key, p in module.policy.state().items():
        assert torch.equal(p, twin.policy.state()[key]), key


class Frozen(DRaFT):
    """Skips its second update on purpose."""

    def micro_steps(self, rows: Rows, rolled: None) -> Any:
        for loss in super().micro_steps(rows, rolled):
            yield loss * (torch.inf if rows.update == 1 else 1)


def test_whichever_rank_meets_a_reward_that_is_not_finite_says_so(monkeypatch):
    module = draft(Broken("error", 0))
    module.configure_model()
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    some = Rows.of({"index": torch.tensor([0]), "prompt": [""]}, 2, 0, 7, CPU)
    with pytest.warns(match="update 7: the reward is not finite"):
        assert module.score(some, module.noise(some), 0.0).isnan().all()


def test_too_many_skipped_updates_end_the_run(tmp_path):
    module = draft(Broken("value", *range(100)), max_skipped=3)
    with pytest.raises(NotFiniteError, match=r"3 updates in a row.*lower model\.lr"):
        runs.fit(module, tmp_path, max_steps=20)
    assert module.trainer.global_step == 0 and module.skipped == 3


def test_prompts_are_encoded_ahead_if_they_are_few(tmp_path):
    module = draft()
    runs.fit(module, tmp_path, max_steps=1)
    assert module.generator.encoded == runs.PROMPTS
    module = draft(prompts_ahead=7)
    runs.fit(module, tmp_path, max_steps=1)
    assert not hasattr(module.generator, "encoded")


def test_prompts_are_encoded_before_the_value_is_there(tmp_path):
    """The text encoders are the largest of all networks: those of the value need not lie beside them."""
    module, seen = draft(), []
    make, sources = module.value_factory, module.value_factory.sources

    class Late(type(make)):
        def __call__(self, parts):
            seen.append(parts.generator.encoded)
            return make(parts)

        def sources(self):
            return sources() | {"value_model": str(tmp_path / path)} if path else sources()

    module.value_factory, path = Late.__new__(Late), None
    runs.fit(module, tmp_path, max_steps=1)
    assert seen == [runs.PROMPTS]
    module.parts, path = None, "nowhere"
    with pytest.raises(FileNotFoundError, match="nowhere"):  # before anything is encoded
        runs.fit(module, tmp_path, max_steps=1)
    assert len(seen) == 1


def test_prompts_of_another_run_are_encoded_too(tmp_path):
    module, path = evaluated(), tmp_path / "held_out.txt"
    path.write_text("a blue square\na red circle\n")
    data = Prompts(prompts=runs.PROMPTS, prompts_per_update=4, val_path=str(path))
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False)
    trainer.validate(module, datamodule=data)
    assert sorted(module.generator.encoded) == ["a blue square", "a red circle"]  # held-out alone
    parts = module.parts
    runs.fit(module, tmp_path, max_steps=1, data=data)
    assert module.parts is parts and set(module.generator.encoded) >= set(runs.PROMPTS)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_lora_on_a_transformer_is_trained_and_exported(precision, tiny_sd3, tiny_clip, tmp_path):
    dtype = "bfloat16" if precision == "bf16-mixed" else "float32"
    module = DRaFT(
        generator=runs.generator(tiny_sd3, dtype=dtype),
        reward=runs.reward(tiny_clip),
        policy=runs.policy(),
        num_steps=2,
        lr=0.01,
    )
    runs.fit(module, tmp_path, max_steps=2, precision=precision)
    weights = module.policy.state()
    assert {p.dtype for p in weights.values()} == {torch.float32}
    moved = [
        key
        for key, p in weights.items()
        if key.startswith("default") and "lora_B" in key and p.any()
    ]
    assert len(moved) > 30
    frozen = {
        p.dtype for n, p in module.generator.transformer.named_parameters() if "lora" not in n
    }
    assert frozen == {getattr(torch, dtype)}
    from safetensors.torch import load_file

    exported = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    ema = module.policy.weights("ema")
    assert {f"transformer.{key}" for key in ema} == set(exported)
    for key, value in ema.items():
        assert torch.equal(exported[f"transformer.{key}"], value)
    cards = [(tmp_path / "lora" / "README.md").read_text()]
    module.guidance_scale, module.size = 3.5, (512, 256)
    cards.append((module.export(tmp_path / "again") / "README.md").read_text())
    with pytest.raises(FileExistsError, match="already holds LoRA weights"):
        module.export(tmp_path / "again", name="default")
    for card, call in zip(cards, ("1.0", "3.5, height=512, width=256"), strict=True):
        assert f'pipeline("a prompt", guidance_scale={call}).images' in card
