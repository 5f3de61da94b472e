"""Settings, trainers and prompts that alignment refuses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy

from stitchvm.data.images import ImageFolder
from stitchvm.data.prompts import Prompts
from stitchvm.modules.alignment_checks import check_trainer
from stitchvm.modules.alignment_parts import AlignmentParts
from stitchvm.modules.held_out import Evaluation
from stitchvm.samplers.best_of_n import BestOfN
from stitchvm.samplers.fk import FKSteering
from tests.modules import alignment_runs as runs
from tests.modules.alignment_fakes import draft
from tests.modules.runs import write_images

BAD = [
    ({"group_size": 0}, "group_size = 0"),
    ({"micro_batch": 0}, "micro_batch = 0"),
    ({"max_skipped": 0}, "max_skipped = 0"),
    ({"lr": 0.0}, "lr = 0.0"),
    ({"clip": 0.0}, "clip = 0.0"),
    ({"betas": (0.9, 1.0)}, r"betas = \[0.9, 1.0\]: expected two numbers in \[0, 1\)"),
    ({"ema_limit": 1.5}, "ema_limit = 1.5"),
    ({"warmup_steps": -1}, "warmup_steps = -1"),
    ({"weight_decay": -0.1}, "weight_decay = -0.1"),
    ({"height": 64}, "height = 64, width = None"),
    ({"evaluation": Evaluation(sampler=FKSteering())}, "sampler is a FKSteering, which asks"),
    ({"evaluation": Evaluation(sampler=BestOfN())}, "sampler is a BestOfN, which asks a value"),
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


def test_devices_that_would_all_make_the_same_update():
    """Lightning's default strategy of that name shards nothing, and gives each device of a node all prompts."""

    def trainer(**sizes: Any) -> Any:
        strategy = ModelParallelStrategy(**sizes)
        return SimpleNamespace(precision="32-true", strategy=strategy, num_devices=4)

    check_trainer(trainer(data_parallel_size=4, tensor_parallel_size=1))
    for sizes in ({}, {"data_parallel_size": 1, "tensor_parallel_size": 4}):
        with pytest.raises(
            ValueError, match=r"tensor_parallel_size = 4, .*tensor_parallel_size: 1"
        ):
            check_trainer(trainer(**sizes))


def test_a_generator_that_is_fine_tuned_already():
    generator = SimpleNamespace(finetuned="runs/nft/lora")
    with pytest.raises(ValueError, match="finetuned = 'runs/nft/lora': fine-tuning begins at"):
        AlignmentParts.build(draft(generator=lambda: generator), torch.device("cpu"))


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


def test_data_without_prompts(tmp_path):
    data = ImageFolder(str(write_images(tmp_path, n=10)), val_size=2, num_workers=0, resolution=16)
    with pytest.raises(ValueError, match="from prompts, but ImageFolder gives ImageDataset: name"):
        runs.fit(draft(), tmp_path, data=data)
