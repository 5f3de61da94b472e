"""What an update costs: FLOPs against those of a real update, the short run's arithmetic, `--print_cost`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel

from stitchvm.cli import main
from stitchvm.modules.cost import Prices, total
from stitchvm.modules.cost_flops import FlopCounter, counted_prices, no_checkpointing
from stitchvm.modules.cost_measure import measure, some_rows
from stitchvm.modules.cost_report import cost_records, counted, forwards_of, plan_of
from stitchvm.modules.draft import DRaFT
from stitchvm.modules.grpo import FlowGRPO
from stitchvm.modules.nft import DiffusionNFT
from stitchvm.values.stitched import StitchedFactory
from stitchvm.values.tweedie import TweedieFactory
from stitchvm.values.weighted import Term, WeightedFactory
from tests.modules import alignment_runs as runs
from tests.modules.alignment_fakes import networks
from tests.modules.sampling_runs import value_model

PROMPTS = runs.PROMPTS[:2]


@pytest.fixture(scope="module")
def stitched(tiny_sd3, tiny_clip, tmp_path_factory):
    """Two stitched values on the generator's blocks, run once for both."""
    folder = tmp_path_factory.mktemp("values")
    paths = [value_model(tiny_sd3, tiny_clip, folder / n) for n in ("a", "b")]
    terms = [Term(StitchedFactory(str(p), share_generator=True)) for p in paths]
    return WeightedFactory(terms)


@pytest.fixture
def made(tiny_sd3, tiny_clip):
    """Makes a method on the tiny SD3."""

    def make(cls: Any, **settings: Any) -> Any:
        arguments = {
            "generator": runs.generator(tiny_sd3),
            "reward": runs.reward(tiny_clip),
            "policy": runs.policy(),
            "num_steps": 4,
        }
        module = cls(**(arguments | settings))
        module.configure_model()
        return module

    return make


CASES = {
    "draft, terminal": (DRaFT, {"backprop_steps": 2}),
    "draft, redraws, checkpointing": (DRaFT, {"redraws": 1, "gradient_checkpointing": True}),
    "draft, stitched": (DRaFT, {"stop": [2, 3], "value": "stitched"}),
    "draft, guidance": (DRaFT, {"stop": [2, 2], "value": "stitched", "guidance_scale": 2.0}),
    "nft, tweedie": (DiffusionNFT, {"stop": [3, 3], "value": TweedieFactory(), "group_size": 2}),
    "nft, checkpointing": (DiffusionNFT, {"group_size": 2, "gradient_checkpointing": True}),
    "nft, no frozen model": (DiffusionNFT, {"group_size": 2, "lam": 0.0}),
    "grpo": (FlowGRPO, {"group_size": 2, "bounds": [0, 3], "window": 2, "kl": 0.1}),
}


SLOW = ("draft, guidance", "nft, checkpointing")


@pytest.mark.parametrize(
    "case", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in CASES]
)
def test_the_count_is_that_of_a_real_update(made, stitched, case):
    cls, settings = CASES[case]
    if settings.get("value") == "stitched":
        settings = settings | {"value": stitched}
    module = made(cls, **settings)
    plan, stop = plan_of(module), plan_of(module).window.high
    rows = some_rows(module, plan, PROMPTS[:1], None, stop)
    module.conditions(rows)  # text towers are left out
    module._built.value.bind(list(rows.prompts))
    with FlopCounter() as counter, sdpa_kernel(SDPBackend.MATH):
        found, rolled = counter.of(module.rollout, rows)
        for loss in module.micro_steps(rows, rolled):
            loss.backward()
        found = float(counter.get_total_flops())
    prices = counted_prices(module)
    expected = total(plan.work(stop).values()).at(prices)
    assert found == len(rows) * expected


@pytest.mark.slow
def test_fake_tensors_count_the_same(made, stitched):
    module = made(DRaFT, stop=[2, 3], value=stitched)
    assert counted_prices(module) == counted_prices(module, fake=True)


@pytest.mark.parametrize("fake", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiled_blocks_count_the_same(made, fake):
    module = made(DiffusionNFT, group_size=2)
    prices = counted_prices(module)
    module.generator.compile_blocks("aot_eager")
    assert counted_prices(module, fake) == prices


def test_what_is_run_again_is_no_work_of_the_model(made):
    module, plain = (made(DRaFT, gradient_checkpointing=again) for again in (True, False))
    model, run, why = counted(module, idle=True)
    assert why == "" and model == counted_prices(plain)
    assert run.forward == model.forward and run.value == model.value
    # all blocks, but for what embeds and projects
    assert 0.8 < (run.backward - model.backward) / model.forward <= 1
    assert module.generator.transformer.gradient_checkpointing
    with no_checkpointing(module.generator):
        assert not module.generator.transformer.gradient_checkpointing


def test_an_unknown_value_leaves_flops_out():
    module = DRaFT(num_steps=4, **networks())
    module.configure_model()
    module.generator.null = None
    model, run, why = counted(module, idle=True)
    assert model is None and run is None and "FLOPs of a Sum are not counted" in why
    record = cost_records(plan_of(module), forwards_of(module, model), run)[-1]
    # full fine-tuning: 4 + 1 frozen + 2 backward; values count nothing
    assert record["forwards"] == 7 and record["flops"] is None


class Rows:
    """A clock that goes by the rows the generator has run."""

    def __init__(self, module: Any) -> None:
        self.module, self.sums = module, {}

    def __call__(self, name: str) -> Rows:
        self.name, self.start = name, sum(self.module.generator.calls)
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: Any) -> None:
        gone = sum(self.module.generator.calls) - self.start
        self.sums[self.name] = self.sums.get(self.name, 0) + gone

    def seconds(self) -> dict[str, float]:
        found, self.sums = self.sums, {}
        return found


FAKES = {
    "draft": (DRaFT, {"stop": [3, 5], "backprop_steps": 1, "micro_batch": 2}),
    "nft": (DiffusionNFT, {"stop": [3, 5], "group_size": 4, "micro_batch": 3, "rollout_batch": 8}),
    "nft, inner steps": (DiffusionNFT, {"group_size": 4, "inner_steps": 2, "micro_batch": 2}),
    "grpo": (FlowGRPO, {"stop": [4, 5], "bounds": [0, 4], "group_size": 4, "micro_batch": 2}),
}


@pytest.mark.parametrize("losses", [2, None])
@pytest.mark.parametrize("case", FAKES)
def test_a_short_run_tells_the_whole_update(case, losses):
    """If every row took a second, the update would take as many as it has passes."""
    cls, settings = FAKES[case]
    module = cls(num_steps=5, **networks(), **settings)
    module.configure_model()
    module.stages = Rows(module)
    plan = plan_of(module)
    rows = some_rows(module, plan, ["one", "two", "three"], losses, plan.stops[0])
    passes = Prices(1, 1, 0, 0, 1, 0)  # a value runs nothing here, but its stage must count
    images = 12 * module.group_size
    before = torch.random.get_rng_state()
    weights = {k: v.clone() for k, v in module.policy.state().items()}
    found = measure(module, rows, plan, passes, total=images, losses=losses)
    for stage, work in plan.mean().items():
        forwards = images * (work.forward + work.frozen)
        assert found.seconds[stage] == pytest.approx(forwards)
    assert found.measured["rollout"] > 0
    assert found.stop == plan.stops[0] and found.images == settings["micro_batch"]
    if losses is None:
        assert found.rolled == len(rows) == 3 * module.group_size
        assert found.losses >= 2
    else:
        assert found.losses == 2
    # nothing has moved
    assert torch.equal(before, torch.random.get_rng_state()) and not module._notes
    assert all(p.grad is None for p in module.trained)
    for key, value in module.policy.state().items():
        assert torch.equal(value, weights[key])
    assert found.peak_gib >= found.resident_gib > 0
    assert found.optimiser_gib == 8 * (9 + 3) / 2**30  # a matrix and a bias


@pytest.fixture
def config(tiny_sd3, tiny_clip, tmp_path):
    """Writes the configuration of a tiny DRaFT; returns its path and the run's folder."""
    root = tmp_path / "run"
    content = runs.draft_config(tiny_sd3, tiny_clip, root, gradient_checkpointing=True)
    path = tmp_path / "draft.yaml"
    path.write_text(yaml.safe_dump(content))
    return path, root


def files(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_print_cost_prints_a_table_and_leaves_nothing(config, capsys):
    path, root = config
    main(["fit", "--config", str(path), "--print_cost"])
    printed = capsys.readouterr().out
    assert not root.exists()
    assert "DRaFT: 8 images an update, 2 for a prompt" in printed
    assert "an update on a device: 8 images, " in printed and " TFLOP\n" in printed
    assert "an update takes about" in printed and "AdamW adds" in printed
    rows = {line.split()[0]: line.split() for line in printed.splitlines() if line.strip()}
    # 3 passes and R's at K = 1; a backward pass is 1 and run again 1
    assert rows["rollout"][1:3] == ["3", "1"] and rows["rollout"][6] == "4"
    assert rows["update"][3] == "1" and float(rows["update"][6]) > 2
    assert float(rows["all"][8]) > 0  # seconds


def test_print_cost_leaves_a_run_as_it_is(config, capsys):
    path, root = config
    main(["fit", "--config", str(path), "--trainer.max_steps", "1"])
    before = files(root)
    assert before
    main(["fit", "--config", str(path), "--print_cost", "count", "--ckpt_path", "last"])
    assert files(root) == before
    assert "seconds" not in capsys.readouterr().out.split("per image")[-1]
    assert "print_cost:" not in (root / "config.yaml").read_text()


def test_print_cost_of_what_it_does_not_know(tiny_sd3, tiny_clip, tmp_path, capsys):
    from tests.modules.runs import distillation_config

    path = tmp_path / "distil.yaml"
    content = distillation_config(tiny_sd3, tiny_clip, tmp_path / "images", tmp_path / "run")
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(SystemExit) as exit_:
        main(["fit", "--config", str(path), "--print_cost", "count"])
    assert exit_.value.code == 1
    assert "not a StitchDistillation: leave it out" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit_:
        main(["fit", "--config", str(path), "--print_cost", "counts"])
    assert exit_.value.code == 2
    assert not (tmp_path / "run").exists()


def test_prompts_must_be_divided_among_devices():
    from stitchvm.data.prompts import Prompts
    from stitchvm.modules.cost_report import prompts_of

    class Two:
        num_devices, num_nodes = 2, 1

    every, here, devices = prompts_of(Prompts(prompts=runs.PROMPTS, prompts_per_update=4), Two())
    assert every == runs.PROMPTS and here == runs.PROMPTS[:2] and devices == 2
    for number in (3, 10):
        with pytest.raises(ValueError, match="a multiple of the number of devices"):
            prompts_of(Prompts(prompts=runs.PROMPTS, prompts_per_update=number), Two())
