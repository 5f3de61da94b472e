"""The distillation module in this process: what it builds, trains, saves and refuses."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest
import torch
import yaml
from safetensors.torch import load_file

from stitchvm.cli import main
from stitchvm.data.images import ImageFolder
from stitchvm.modules.distillation import StitchDistillation
from stitchvm.modules.stage_one import read_stitch_point
from stitchvm.search import _noised
from stitchvm.stitch import up
from stitchvm.vae import VAE
from stitchvm.value_model import StitchedValueModel
from tests.modules import runs

STRATIFIED = {
    "class_path": "stitchvm.schedule.CenterBiased",
    "init_args": {"stratified": True},
}


def message(capsys: pytest.CaptureFixture[str]) -> str:
    """What the command line said on stderr, from its error on."""
    said = capsys.readouterr().err
    return said[said.index("stitchvm: error") :]


@pytest.fixture
def config(tiny_sd3, tiny_clip, tmp_path):
    images = runs.write_images(tmp_path / "images")

    def write(name: str = "run", trainer=None, data=None, **model):
        made = runs.distillation_config(tiny_sd3, tiny_clip, images, tmp_path / name, **model)
        made["trainer"] |= trainer or {}
        made["data"]["init_args"] |= data or {}
        return runs.write_config(made, tmp_path / f"{name}.yaml"), tmp_path / name

    return write


def test_fit_searches_distils_and_leaves_a_value_model(config):
    path, root = config(stitch_point=None)
    main(["fit", "--config", str(path)])
    found = json.loads((root / "search.json").read_text())
    assert {(r["i"], r["j"]) for r in found["records"]} == {
        (i, j) for i in range(1, 6) for j in (1, 2)
    }
    assert (root / "search.png").stat().st_size > 1000
    state = runs.checkpoint(root)
    assert state["stitch_point"] == found["stitch_point"]
    assert not any(
        key.startswith(("teacher.", "vae.", "value_model.backbone."))
        for key in state["state_dict"]
    )
    model = StitchedValueModel.from_pretrained(root / "value_model")
    assert [model.i, model.j] == found["stitch_point"]
    own = model.trainable()
    assert {f"value_model.{key}" for key in own} == set(state["state_dict"])
    for key, value in own.items():
        assert torch.equal(value, state["state_dict"][f"value_model.{key}"]), key
    assert {p.name for p in (root / "value_model").iterdir()} == {
        "config.json",
        "model.safetensors",
        "README.md",
    }
    assert list(root.glob("events.out.tfevents*")) and (root / "config.yaml").is_file()


def test_search_command_then_fit_goes_on_from_it(config, capsys):
    path, root = config(stitch_point=None, trainer={"max_steps": 2})
    main(["search", "--config", str(path)])
    output = capsys.readouterr().out
    assert "lowest feature loss" in output and "lowest embedding loss" in output
    assert output.endswith("fit with the same config goes on from here\n")
    before = (root / "search.json").read_text()
    with pytest.raises(SystemExit) as refused:
        main(["search", "--config", str(path)])
    assert refused.value.code == 1 and "search.json" in message(capsys)
    main(["fit", "--config", str(path)])
    assert (root / "search.json").read_text() == before
    capsys.readouterr()
    main(["validate", "--config", str(path), f"--ckpt_path={root / 'checkpoints/last.ckpt'}"])
    assert "val/loss" in capsys.readouterr().out  # at the point of search.json


@pytest.mark.parametrize(("part", "key"), [("reward", "model"), ("backbone", "path")])
def test_a_search_of_another_network_is_not_taken(config, capsys, part, key):
    path, root = config(stitch_point=None, trainer={"max_steps": 2})
    main(["search", "--config", str(path)])
    found = root / "search.json"
    content = json.loads(found.read_text())
    content["config"]["model"]["init_args"][part]["init_args"][key] = "another"
    found.write_text(json.dumps(content))
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main(["fit", "--config", str(path)])
    said = message(capsys)
    assert exit_.value.code == 1 and f"{found} was measured for the {part}" in said
    assert "another, this run has" in said and "set model.stitch_point" in said
    assert not (root / "checkpoints").exists()


def test_a_search_says_that_a_fit_will_not_take_what_it_found(config, capsys):
    path, _ = config(stitch_point=[2, 1])
    main(["search", "--config", str(path)])
    last = capsys.readouterr().out.splitlines()[-1]
    assert "stitches at (2, 1), which it names; --model.stitch_point null takes" in last


def test_a_search_is_read_by_the_runs_own_criterion(tmp_path):
    path = tmp_path / "search.json"
    with pytest.raises(ValueError, match="not what `stitchvm search` writes"):
        path.write_text("{}")
        read_stitch_point(path)
    records = [
        {"i": i, "j": j, "feature_loss": feature, "embedding_error": embedding}
        for i, j, feature, embedding in [(1, 1, 0.1, 0.9), (2, 1, 0.2, 0.4), (1, 2, 0.3, None)]
    ]
    found = {"stitch_point": [1, 1], "criterion": "feature", "records": records}
    path.write_text(json.dumps(found))
    assert read_stitch_point(path) == read_stitch_point(path, "feature") == (1, 1)
    assert read_stitch_point(path, "embedding") == (2, 1)
    assert read_stitch_point(path, "feature", (2, 3)) == (1, 2)
    with pytest.raises(ValueError, match="no embedding loss of a reward block j in"):
        read_stitch_point(path, "embedding", (2,))


def test_the_start_is_the_closed_form_fit(config, tmp_path):
    """Before the first step the student's hand-over features are the least-squares ones of the probe images."""
    path, root = config(lr=0.0, trainer={"max_steps": 1})
    main(["fit", "--config", str(path)])
    model = StitchedValueModel.from_pretrained(root / "value_model")
    data = ImageFolder(str(tmp_path / "images"), val_size=8, resolution=16, num_workers=0)
    data.setup("fit")
    (probes,) = data.probe_dataloader(4)
    z_0 = VAE(model.backbone.id).encode(probes["pixels"])
    h = model.backbone(*_noised(z_0, 0, seed=0), model.i)
    x, y = (
        tokens.flatten(2).transpose(1, 2).flatten(0, 1).double()
        for tokens in (up(h, model.stitch.grid), model.reward.prefix(probes["pixels"], model.j))
    )
    x = torch.cat([x, torch.ones(len(x), 1)], 1)
    fitted = x @ torch.linalg.lstsq(x, y, driver="gelsd").solution
    got = model.stitch(h).flatten(2).transpose(1, 2).flatten(0, 1).double()
    torch.testing.assert_close(got, fitted, rtol=1e-3, atol=1e-3 * float(y.std()))
    assert len(x) > x.shape[1] and float((fitted - y).square().mean()) > 1e-3 * float(y.var())


def test_the_loss_falls(config):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    path, root = config(trainer={"max_steps": 60, "val_check_interval": 20}, lr=3e-3)
    main(["fit", "--config", str(path)])
    events = EventAccumulator(str(root))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/embedding", "train/tokens", "images/s", "val/loss_sigma_0.8-1"} <= tags
    losses = [e.value for e in events.Scalars("val/loss")]
    assert losses[-1] < 0.95 * losses[0]


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"objective": "l2"}, "Eq. 78"),
        ({"noise_levels": 0}, "at least 1"),
        ({"stitch_point": [9, 1]}, "5"),
        ({"stitch_point": [2, 40]}, "40"),
        ({"stitch_point": None, "num_probes": 5000}, "probe images"),
        ({"search_criterion": "best"}, "criterion"),
        ({"stitch_point": None, "num_held_out": 0}, "num_held_out = 0"),
        ({"num_probes": 0}, "num_probes = 0"),
        ({"num_end_probes": -1}, "num_end_probes = -1"),
        ({"objective": "aesthetic"}, "reads no text"),
        ({"lambda_sc": 0.5}, "lambda_sc = 0.5"),
        ({"noise_law": STRATIFIED}, "stratified"),
        ({"lr": -1e-3}, "lr = -0.001: expected a finite number of at least 0"),
        ({"stitch_point": None, "betas": [0.9, 1.0]}, "betas = [0.9, 1.0]: expected two numbers"),
        ({"warmup_steps": -4}, "warmup_steps = -4"),
        ({"lambda_tok": -1.0}, "lambda_tok = -1.0"),
    ],
)
def test_wrong_settings_end_at_once_with_one_message(config, capsys, change, expected):
    path, root = config(**change)
    with pytest.raises(SystemExit) as exit_:
        main(["fit", "--config", str(path)])
    error = message(capsys)
    assert exit_.value.code in (1, 2) and expected in error and "Traceback" not in error
    assert not (root / "checkpoints").exists()


def test_latents_of_another_vae_are_refused(config, capsys, tiny_sd3, tmp_path):
    shutil.copytree(tiny_sd3 / "vae", tmp_path / "vae")
    settings = json.loads((tmp_path / "vae/config.json").read_text())
    settings["scaling_factor"] *= 2
    (tmp_path / "vae/config.json").write_text(json.dumps(settings))
    path, root = config(
        vae={"class_path": "stitchvm.vae.VAE", "init_args": {"path": str(tmp_path / "vae")}}
    )
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(path)])
    assert "have scale, shift (1.5, 0.1), those of the VAE " in message(capsys)
    assert not (root / "checkpoints").exists()


def test_a_vae_stitch_notes_whose_latents_it_reads(config):
    latents = {"class_path": "stitchvm.backbones.latent.LatentBackbone"}
    path, root = config(
        backbone=latents | {"init_args": {"channels": 4}}, stitch_point=[0, 1], name="first"
    )
    main(["fit", "--config", str(path)])
    made = json.loads((root / "value_model/config.json").read_text())["backbone"]
    assert made["init_args"] == {"channels": 4, "scale": 1.5, "shift": 0.1}
    assert StitchedValueModel.from_pretrained(root / "value_model").backbone.scaling == (1.5, 0.1)
    main(["validate", "--config", str(path), f"--ckpt_path={root}/checkpoints/last.ckpt"])
    other = latents | {"init_args": {"channels": 4, "scale": 1.0}}
    path, _ = config(backbone=other, stitch_point=[0, 1], name="second")
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(path)])


def test_prompts_are_no_images(config, capsys):
    path, _ = config()
    made = yaml.safe_load(path.read_text())
    made["data"] = {
        "class_path": "stitchvm.data.prompts.Prompts",
        "init_args": {"prompts": ["a red circle"], "batch_size": 1},
    }
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(runs.write_config(made, path))])
    assert "takes its probe images from a stitchvm.data DataModule, got Prompts" in message(capsys)


def test_unknown_key_is_an_error_that_names_it(config, capsys):
    path, _ = config(stich_point=[2, 1])
    with pytest.raises(SystemExit) as exit_:
        main(["fit", "--config", str(path)])
    assert exit_.value.code == 2
    assert "stich_point" in message(capsys)


def test_checkpoint_of_another_stitch_point_is_refused(config, capsys):
    path, root = config(trainer={"max_steps": 2})
    main(["fit", "--config", str(path)])
    other, _ = config(stitch_point=[3, 1])
    last = root / "checkpoints/last.ckpt"
    words = ["fit", "--config", str(other), "--ckpt_path", str(last)]
    with pytest.raises(SystemExit):
        main(words)
    assert "set model.stitch_point to [2, 1]" in message(capsys)
    state = runs.checkpoint(root)
    del state["stitch_point"]  # as of a fine-tuning
    torch.save(state, last)
    with pytest.raises(SystemExit):
        main(words)
    assert "the checkpoint is of no distillation" in message(capsys)


def test_a_checkpoint_with_nothing_that_says_where_is_refused_before_stage_1(config, capsys):
    path, root = config(trainer={"max_steps": 2})
    main(["fit", "--config", str(path), "--model.stitch_point=[2,1]"])
    before = sorted(p.name for p in root.iterdir())
    words = ["--ckpt_path", "last", "--trainer.max_steps=3", "--model.stitch_point=null"]
    with pytest.raises(SystemExit) as exit_:
        main(["fit", "--config", str(path), *words])
    said = message(capsys)
    assert exit_.value.code == 1 and f"there is no {root / 'search.json'}" in said
    assert "--ckpt_path last" in said and "set model.stitch_point" in said
    left = sorted(p.name for p in root.iterdir() if "tfevents" not in p.name)
    assert left == [name for name in before if "tfevents" not in name]  # no search.json


def test_checkpoint_of_another_reward_is_refused_and_its_value_model_stays(config, capsys):
    path, root = config(trainer={"max_steps": 2})
    main(["fit", "--config", str(path)])
    before = (root / "value_model/model.safetensors").read_bytes()
    settings = (root / "config.yaml").read_text()
    state = runs.checkpoint(root)
    assert sorted(state["fingerprints"]) == ["backbone", "reward"]
    state["fingerprints"]["reward"] = "0" * 16  # as if another had been stitched
    last = root / "checkpoints/last.ckpt"
    torch.save(state, last)
    words = ["--ckpt_path", "last", "--trainer.max_steps=3"]
    with pytest.raises(SystemExit) as exit_:
        main(["fit", "--config", str(path), *words])
    assert exit_.value.code == 1 and "of another reward than this run's" in message(capsys)
    assert (root / "value_model/model.safetensors").read_bytes() == before
    assert (root / "config.yaml").read_text() == settings  # what the message says to use
    del state["fingerprints"]  # of a version that wrote none
    torch.save(state, last)
    main(["fit", "--config", str(path), *words])
    assert (root / "value_model/model.safetensors").read_bytes() != before
    assert "max_steps: 3" in (root / "config.yaml").read_text()


@pytest.mark.parametrize("decay", ["none", "linear"])  # which counts the steps first
def test_cached_latents_are_what_it_trains_on(config, monkeypatch, tmp_path, decay):
    encode, losses = VAE.encode, StitchDistillation.losses
    encoded, cached = [], []

    def counted(self, pixels, *args):
        encoded.append(len(pixels))
        return encode(self, pixels, *args)

    def noted(self, batch, t, epoch):
        if epoch >= 0:  # no validation
            cached.append("latents" in batch)
        return losses(self, batch, t, epoch)

    monkeypatch.setattr(VAE, "encode", counted)
    monkeypatch.setattr(StitchDistillation, "losses", noted)
    trainer = {"max_steps": -1, "max_epochs": 2, "limit_train_batches": 2, "limit_val_batches": 0}
    path, _ = config(decay=decay, latent_cache=str(tmp_path / "latents"), trainer=trainer)
    main(["fit", "--config", str(path)])
    assert cached == [True] * 4
    assert sum(encoded) == 4 + 32  # of stage 1, and every training image once


def test_a_rate_that_falls_to_no_end_is_refused_before_stage_1(config, capsys):
    trainer = {"max_steps": -1, "max_time": {"hours": 1}}
    path, root = config(trainer=trainer, decay="linear", stitch_point=None)
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(path)])
    assert "trainer.max_steps or trainer.max_epochs" in message(capsys)
    assert not (root / "search.json").exists()


def test_validating_no_checkpoint_says_so(config):
    path, root = config()
    main(["fit", "--config", str(path)])
    with pytest.warns(UserWarning, match="without --ckpt_path an untrained stitch is measured"):
        main(["validate", "--config", str(path)])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="without --ckpt_path")
        main(["validate", "--config", str(path), f"--ckpt_path={root}/checkpoints/last.ckpt"])


def test_no_steps_are_no_error(config):
    path, root = config(trainer={"max_steps": 0}, decay="linear")
    main(["fit", "--config", str(path)])
    assert not (root / "checkpoints").exists()


def test_a_batch_larger_than_the_data_is_said_before_networks_are_loaded(config, capsys):
    path, root = config(stitch_point=None, data={"batch_size": 100})
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(path)])
    assert "fewer than one global batch of 100" in message(capsys)
    assert not (root / "search.json").exists()  # not even stage 1 has run
    main(["search", "--config", str(path)])  # which trains on none
    assert (root / "search.json").exists()


def test_an_interrupted_run_says_how_to_go_on_and_does(config, capsys, monkeypatch):
    def training_step(self, batch, batch_idx):
        if self.global_step == 2:
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    step = StitchDistillation.training_step
    path, root = config(trainer={"max_steps": 4})
    with monkeypatch.context() as patch:
        patch.setattr(StitchDistillation, "training_step", training_step)
        with pytest.raises(SystemExit) as exit_:
            main(["fit", "--config", str(path)])
    last = root / "checkpoints/last.ckpt"
    assert exit_.value.code == 130
    expected = (
        f"stitchvm: interrupted; the same command with --ckpt_path last goes on from {last}\n"
    )
    assert capsys.readouterr().err.endswith(expected)
    assert runs.checkpoint(root)["global_step"] == 2
    main(["fit", "--config", str(path), "--ckpt_path", "last"])
    assert runs.checkpoint(root)["global_step"] == 4


def test_a_run_that_is_interrupted_after_its_last_step_still_leaves_its_value_model(
    config, monkeypatch
):
    def interrupted(self):
        raise KeyboardInterrupt

    path, root = config(trainer={"max_steps": 2})
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(StitchDistillation, "on_train_end", interrupted)
        main(["fit", "--config", str(path)])
    assert not (root / "value_model").exists()
    main(["fit", "--config", str(path), "--ckpt_path", "last"])
    made = load_file(root / "value_model/model.safetensors")
    trained = runs.checkpoint(root)["state_dict"]
    assert all(torch.equal(trained[f"value_model.{key}"], x) for key, x in made.items())
