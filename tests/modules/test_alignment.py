"""What the fine-tuning methods share: updates, skipped ones, evaluation, checkpoints, and what is refused."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from stitchvm.data.prompts import Prompts
from stitchvm.modules.alignment_checks import check_trainer
from stitchvm.modules.draft import DRaFT
from stitchvm.modules.held_out import Evaluation, picture_grid
from stitchvm.modules.rows import Rows
from stitchvm.modules.stages import Stages
from stitchvm.rewards.base import NotFiniteError
from stitchvm.samplers.plain import PlainSampler
from tests.modules import alignment_runs as runs
from tests.modules.alignment_fakes import Curved, Sum, networks
from tests.values.fakes import FakeReward

CPU = torch.device("cpu")


def draft(value: Sum | None = None, cls: type[DRaFT] = DRaFT, **settings: Any) -> DRaFT:
    defaults = {"num_steps": 3, "lam": 0.1, "lr": 0.05, "micro_batch": 3, "group_size": 2}
    return cls(**(networks(Curved, value) | defaults | settings))


def save_every_step(root: Any) -> dict[str, Any]:
    callback = ModelCheckpoint(root, "{step}", every_n_train_steps=1, save_top_k=-1)
    return {"enable_checkpointing": True, "callbacks": [callback]}


def load(path: Any) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


# -- rows ----------------------------------------------------------------------------------------------


def test_rows_are_groups_on_one_device_with_random_numbers_of_their_own():
    batch = {"index": torch.tensor([7, 3]), "prompt": ["a", "b"]}
    rows = Rows.of(batch, 3, seed=1, update=4, device=CPU)
    assert rows.index == (7, 7, 7, 3, 3, 3) and rows.number == (0, 1, 2) * 2
    assert rows.prompts == ("a",) * 3 + ("b",) * 3
    z = rows.normal("z_1", (2, 2))
    assert z.shape == (6, 2, 2) and len({float(x[0, 0]) for x in z}) == 6
    parts = list(rows.split(4))
    assert [part.positions.tolist() for part in parts] == [[0, 1, 2, 3], [4, 5]]
    assert torch.equal(torch.cat([part.normal("z_1", (2, 2)) for part in parts]), z)
    alone = Rows.of({"index": torch.tensor([3]), "prompt": ["b"]}, 3, 1, 4, CPU)  # another device
    assert torch.equal(alone.normal("z_1", (2, 2)), z[3:])
    others = [
        rows.normal("eps", (2, 2)),
        rows.normal("z_1", (2, 2), 1),
        Rows.of(batch, 3, 1, 5, CPU).normal("z_1", (2, 2)),
        Rows.of(batch, 3, 2, 4, CPU).normal("z_1", (2, 2)),
    ]
    assert not any(torch.equal(z, other) for other in others)
    assert torch.equal(rows.groups, torch.tensor([7, 7, 7, 3, 3, 3]))


# -- updates -------------------------------------------------------------------------------------------


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


class Broken(Sum):
    """Fails in one way or the other when it is asked for the n-th time, counted from 0."""

    def __init__(self, kind: str, *when: int) -> None:
        super().__init__()
        self.kind, self.when = kind, when

    def score(self, image: Tensor, text: Tensor | None = None) -> Tensor:
        v = image[:, 0]
        if len(self.asked) - 1 not in self.when:
            return v
        if self.kind == "error":
            raise NotFiniteError("the reward is not finite")
        if self.kind == "value":
            return torch.where(torch.arange(len(v)) == 0, torch.nan, v)
        return v + (0 * v).sqrt()  # finite, but not its gradient


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


def test_too_many_skipped_updates_end_the_run(tmp_path):
    module = draft(Broken("value", *range(100)), max_skipped=3)
    with pytest.raises(NotFiniteError, match=r"3 updates in a row.*lower model\.lr"):
        runs.fit(module, tmp_path, max_steps=20)
    assert module.trainer.global_step == 0 and module.skipped == 3


# -- checkpoints ---------------------------------------------------------------------------------------


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path):
    """Also after a skipped update, and in the middle of the second epoch of two updates."""
    value = Broken("value", 4)
    runs.fit(
        draft(value, warmup_steps=3), tmp_path, max_steps=5, **save_every_step(tmp_path / "a")
    )
    whole = load(tmp_path / "a" / "step=5.ckpt")
    assert whole["alignment"]["skipped"] == 1
    middle = tmp_path / "a" / "step=2.ckpt"
    assert load(middle)["alignment"]["skipped"] == 1
    module = draft(warmup_steps=3)
    runs.fit(module, tmp_path, max_steps=5, ckpt_path=middle, **save_every_step(tmp_path / "b"))
    runs.assert_same(whole, load(tmp_path / "b" / "step=5.ckpt"))
    assert not torch.equal(
        whole["policy"]["default.W"], load(tmp_path / "a" / "step=4.ckpt")["policy"]["default.W"]
    )


@pytest.fixture
def saved(tmp_path):
    runs.fit(draft(), tmp_path, max_steps=1, **save_every_step(tmp_path / "saved"))
    return tmp_path / "saved" / "step=1.ckpt"


def test_a_checkpoint_holds_the_policy_and_nothing_pretrained(saved):
    state = load(saved)
    assert state["state_dict"] == {}
    assert set(state["policy"]) == {
        f"{name}.{key}" for name in ("default", "ema", "base") for key in ("W", "b")
    }
    assert state["alignment"]["method"] == "DRaFT"
    assert len(state["optimizer_states"][0]["state"]) == 2


class OtherMethod(DRaFT):
    pass


def test_checkpoints_of_something_else_are_refused(saved, tmp_path):
    with pytest.raises(ValueError, match=r"method DRaFT \(here OtherMethod\)"):
        runs.fit(draft(cls=OtherMethod), tmp_path, ckpt_path=saved)
    with pytest.raises(ValueError, match=r"copies \['ema', 'base'\] \(here \['ema'\]\)"):
        runs.fit(draft(lam=0.0), tmp_path, ckpt_path=saved)
    state = load(saved)
    state["alignment"]["policy"] = {"class": "PolicyAdapters", "r": 4, "layers": ["x"] * 9}
    torch.save(state, tmp_path / "lora.ckpt")
    with pytest.raises(
        ValueError, match=r"class PolicyAdapters \(here PolicyWeights\).*layers 9 of them.*r 4 \("
    ):
        runs.fit(draft(), tmp_path, ckpt_path=tmp_path / "lora.ckpt")
    del state["alignment"]
    torch.save(state, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="of no alignment run, DRaFT cannot go on from it"):
        runs.fit(draft(), tmp_path, ckpt_path=tmp_path / "other.ckpt")


# -- evaluation ----------------------------------------------------------------------------------------


def evaluated(**settings: Any) -> DRaFT:
    sampler = PlainSampler(num_steps=2, guidance_scale=1.0, grid="single")
    rewards = {"fake": partial(FakeReward, uses_text=False)}
    return draft(evaluation=Evaluation(rewards, sampler=sampler, pictures=3), **settings)


def scalars(root: Any) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(root))
    return found.Reload()


def test_held_out_prompts_are_scored_with_the_average_and_logged(tmp_path):
    module = evaluated(ema_limit=1.0)  # (1 + s)/(10 + s): the average lags behind
    logger = TensorBoardLogger(tmp_path, name="", version="")
    runs.fit(
        module,
        tmp_path,
        max_steps=2,
        logger=logger,
        limit_val_batches=None,
        num_sanity_val_steps=-1,
        log_every_n_steps=1,
    )
    log = scalars(tmp_path)
    tags = set(log.Tags()["scalars"])
    assert {
        "val/fake",
        "val/image/saturation",
        "val/image/colour_entropy",
        "train/reward",
        "train/regulariser",
        "train/grad_norm",
        "train/skipped",
        "train/distance_ema",
        "seconds/rollout",
        "seconds/value",
        "seconds/update",
        "samples/s",
    } <= tags
    before, after = log.Scalars("val/fake")
    assert before.step == 0 and before.value != after.value
    assert log.Tags()["images"] == ["val/samples"] and len(log.Images("val/samples")) == 2

    def by_hand(name: str) -> float:
        held_out = module._built.held_out
        with torch.no_grad(), module.policy.use(name):
            for start in (0, 5):  # other batches, the same means
                index = torch.arange(start, min(start + 5, 8))
                held_out.add({"index": index, "prompt": [runs.PROMPTS[i] for i in index]})
        return held_out.finish()[0]["fake"]

    assert by_hand("base") == pytest.approx(before.value, rel=1e-5)
    assert by_hand("ema") == pytest.approx(after.value, rel=1e-5)
    assert by_hand("default") != pytest.approx(after.value, rel=1e-5)


def test_a_checkpoint_is_validated_with_its_own_average(tmp_path):
    trained = evaluated(ema_limit=0.5)
    runs.fit(trained, tmp_path, max_steps=2, **save_every_step(tmp_path / "saved"))
    module = evaluated()
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=str(tmp_path)
    )
    data = Prompts(prompts=runs.PROMPTS, batch_size=8)
    (found,) = trainer.validate(module, data, ckpt_path=tmp_path / "saved" / "step=2.ckpt")
    held_out = trained._built.held_out
    with torch.no_grad(), trained.policy.use("ema"):
        held_out.add({"index": torch.arange(8), "prompt": runs.PROMPTS})
    wanted = held_out.finish()[0]
    assert found["val/fake"] == pytest.approx(wanted["fake"], rel=1e-6)


def test_early_stopping_on_a_held_out_reward(tmp_path):
    module = evaluated(lr=1e-9)  # no improvement, ever
    stop = EarlyStopping("val/fake", mode="max", patience=2, min_delta=0.01)
    runs.fit(
        module,
        tmp_path,
        max_steps=50,
        limit_val_batches=None,
        val_check_interval=1,
        check_val_every_n_epoch=None,
        callbacks=[stop],
    )
    assert module.trainer.global_step == 3


def test_a_grid_of_pictures():
    images = [torch.full((3, 2, 3), value, dtype=torch.uint8) for value in (10, 20, 30, 40, 50)]
    picture = picture_grid(images)
    assert picture.shape == (3, 6, 6) and picture.dtype == torch.uint8  # two columns
    assert picture[0, 0].tolist() == [10] * 3 + [20] * 3
    assert picture[0, 4].tolist() == [50] * 3 + [255] * 3
    assert picture_grid([torch.zeros(3, 512, 256, dtype=torch.uint8)]).shape == (3, 256, 128)


def test_prompts_are_encoded_ahead_if_they_are_few(tmp_path):
    module = draft()
    runs.fit(module, tmp_path, max_steps=1)
    assert module.generator.encoded == runs.PROMPTS
    module = draft(prompts_ahead=7)
    runs.fit(module, tmp_path, max_steps=1)
    assert not hasattr(module.generator, "encoded")


def test_stages_add_up():
    stages = Stages(CPU)
    for _ in range(2):
        with stages("value"):
            torch.randn(1000).sum()
    found = stages.seconds()
    assert set(found) == {"value"} and found["value"] > 0 and stages.seconds() == {}


# -- on a transformer ----------------------------------------------------------------------------------


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


# -- bad input -----------------------------------------------------------------------------------------


BAD = [
    ({"group_size": 0}, "group_size = 0"),
    ({"micro_batch": 0}, "micro_batch = 0"),
    ({"max_skipped": 0}, "max_skipped = 0"),
    ({"lr": 0.0}, "lr = 0.0"),
    ({"clip": 0.0}, "clip = 0.0"),
    ({"ema_limit": 1.5}, "ema_limit = 1.5"),
    ({"height": 64}, "height = 64, width = None"),
]


@pytest.mark.parametrize(("settings", "message"), BAD, ids=lambda x: str(x)[:30])
def test_bad_settings_are_refused_at_once(settings, message):
    with pytest.raises(ValueError, match=message):
        draft(**settings)


def test_trainers_that_cannot_be():
    def trainer(precision: str, kind: str) -> Any:
        return SimpleNamespace(precision=precision, strategy=type(kind, (), {})())

    check_trainer(trainer("bf16-mixed", "DDPStrategy"))
    with pytest.raises(ValueError, match=r"precision = 16-mixed: expected one of 32-true, bf16-m"):
        check_trainer(trainer("16-mixed", "DDPStrategy"))
    with pytest.raises(ValueError, match="is a FSDPStrategy: expected one device, ddp, or Model"):
        check_trainer(trainer("32-true", "FSDPStrategy"))


def test_prompts_that_cannot_be_divided():
    data = Prompts(prompts=runs.PROMPTS, prompts_per_update=6)
    data.trainer = SimpleNamespace(distributed_sampler_kwargs={"rank": 0, "num_replicas": 4})
    with pytest.raises(ValueError, match=r"6 on 4 devices.*Take 3 devices, or 8 prompts"):
        data.setup("fit")
    data.trainer.distributed_sampler_kwargs["num_replicas"] = 3
    data.trainer.callbacks = []
    data.setup("fit")
    assert data.train_dataloader().batch_sampler.batch_size == 2
    with pytest.raises(ValueError, match="prompts_per_update = 0"):
        Prompts(prompts=runs.PROMPTS, prompts_per_update=0)


def test_more_prompts_in_an_update_than_there_are(tmp_path):
    data = Prompts(prompts=runs.PROMPTS, prompts_per_update=16)
    with pytest.raises(ValueError, match="8 samples, fewer than one global batch of 16"):
        runs.fit(draft(), tmp_path, data=data)
