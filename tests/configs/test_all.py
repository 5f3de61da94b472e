"""Every file in configs/ parses, by the command it is meant for, without building or downloading anything."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from stitchvm.lightning_cli import StitchCLI

CONFIGS = Path(__file__).parents[2] / "configs"
RUNS = sorted(p for p in CONFIGS.glob("*.yaml"))
OVERLAYS = sorted((CONFIGS / "trainer").glob("*.yaml"))
PAIRS = [
    f"distill_{backbone}_{reward}"
    for backbone in ("sd35m", "sd35l", "flux", "vae_sd35", "vae_flux")
    for reward in ("clip", "dfn_clip", "hpsv2", "aesthetic")
]
SAMPLINGS = [
    f"{method}_{model}"
    for method in ("plain", "bon", "fks", "fks_stitched", "dps", "dps_stitched")
    for model in ("world", "sd35m", "sd35l", "flux")
]


def parse(path: Path, *more: str, monkeypatch: pytest.MonkeyPatch) -> StitchCLI:
    """Parses as the command line does and stops before anything is built."""
    monkeypatch.setattr(StitchCLI, "instantiate_classes", lambda self: None)
    monkeypatch.setattr(StitchCLI, "after_instantiate_classes", lambda self: None)
    monkeypatch.setattr(StitchCLI, "_run_subcommand", lambda self, name: None)
    command = "predict" if path.stem in SAMPLINGS else "fit"
    command = "test" if path.name.startswith("eval_") else command
    return StitchCLI(args=[command, "--config", str(path), *more], command=command)


@pytest.mark.parametrize("path", RUNS, ids=lambda p: p.stem)
def test_parses(path, monkeypatch):
    cli = parse(path, monkeypatch=monkeypatch)
    config = cli.config[cli.subcommand]
    assert config.model.class_path.startswith("stitchvm.modules.")
    folder = config.trainer.default_root_dir
    assert folder == f"runs/{path.stem}", "a run's folder is named after its file"


def test_every_pair_of_the_issue_has_a_config():
    assert set(PAIRS) | {"distill_world"} <= {p.stem for p in RUNS}


@pytest.mark.parametrize("name", PAIRS)
def test_papers_hyperparameters(name, monkeypatch):
    """Appendix D.1: lr 1e-5, five times that on the stitch, no decay, 100 warm-up steps, batch 128."""
    config = parse(CONFIGS / f"{name}.yaml", monkeypatch=monkeypatch).config.fit
    model, data, trainer = config.model.init_args, config.data.init_args, config.trainer
    assert (model.lr, model.stitch_lr_factor, model.weight_decay) == (1e-5, 5.0, 0.0)
    assert (model.warmup_steps, model.num_probes, model.search_js) == (100, 200, [1, 2, 3, 4])
    assert data.batch_size * trainer.accumulate_grad_batches * trainer.devices == 128
    assert trainer.max_epochs == (15 if "vae" in name else 5)
    assert model.objective == ("aesthetic" if name.endswith("aesthetic") else "representation")


@pytest.mark.parametrize("name", SAMPLINGS)
def test_papers_sampling_settings(name, monkeypatch):
    """Appendix D.2: steps, guidance, LinearSDE, the window of resampling, N = 4, M = 2, the cross-backbone value."""
    config = parse(CONFIGS / f"{name}.yaml", monkeypatch=monkeypatch).config.predict
    model, (method, network) = config.model.init_args, name.rsplit("_", 1)
    sampler, flux = model.sampler.init_args, network == "flux"
    steps = 100 if method.startswith("dps") else 28 if flux else 40
    assert sampler.num_steps == steps and sampler.guidance_scale is None
    assert model.generator.init_args.guidance_scale == (3.5 if flux else 4.5)
    assert sampler.nu == ("ode" if method in ("plain", "bon") else "linear_sde")
    if method.startswith("fks"):
        window = (sampler.resample_from, sampler.resample_to, sampler.resample_every)
        assert window == ((6, 22, 4) if flux else (8, 32, 4))
        assert (sampler.particles, sampler.proposals) == (4, 2 if "stitched" in method else 1)
        assert sampler.proposal_share == 0.4
    if method == "bon":
        assert sampler.particles == 4
    if (
        network != "world"
    ):  # gradients in bfloat16, what particles are weighed and images judged by in float32
        generator, reward = model.generator.init_args, model.reward and model.reward.init_args
        assert generator.dtype == "bfloat16"
        assert generator.vae_dtype == ("bfloat16" if method == "dps" else "float32")
        assert not reward or reward.dtype == ("bfloat16" if method == "dps" else "float32")
        assert model.rewards["hpsv2"].init_args.dtype == "float32"
        if "stitched" in method:
            wanted = "bfloat16" if method == "dps_stitched" else "float32"
            assert model.value.init_args.dtype == wanted
    if method.startswith("dps") and network != "world":
        low, high = (0.5, 7.0) if "stitched" in method else (0.01, 0.5)
        assert low <= sampler.strength <= high
    value = model.value and model.value.class_path.rsplit(".", 1)[1]
    steered = {"fks": "TweedieFactory", "dps": "TweedieFactory"}
    assert value == (steered | dict.fromkeys(("plain", "bon"))).get(method, "StitchedFactory")
    if value == "StitchedFactory":
        own = {"sd35l": "sd35m"}.get(network, network)  # Table 6: Medium's value on Large
        world = network == "world"
        path = "world:value_hps" if world else f"runs/distill_{own}_hpsv2/value_model"
        assert model.value.init_args.path == path and model.value.init_args.share_generator
    if network != "world":
        assert (model.height, model.width) == (1024, 1024)
        assert {"imagereward", "aesthetic", "hpsv2", "pickscore", "clip"} == set(model.rewards)


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda p: p.stem)
def test_overlays_go_on_top_of_a_run(overlay, monkeypatch):
    cli = parse(
        CONFIGS / "distill_sd35l_clip.yaml", "--config", str(overlay), monkeypatch=monkeypatch
    )
    wanted = yaml.safe_load(overlay.read_text())["trainer"]
    assert cli.config.fit.trainer.devices == wanted["devices"]
    assert cli.config.fit.model.init_args.lr == 1e-5


def test_a_wrong_key_in_a_file_is_named(tmp_path, capsys, monkeypatch):
    config = yaml.safe_load((CONFIGS / "eval_world.yaml").read_text())
    config["model"]["init_args"]["sigma"] = [0.5]
    for key in ("reward", "generator"):
        config["model"]["init_args"][key] = str(CONFIGS / config["model"]["init_args"][key])
    (tmp_path / "eval_wrong.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit) as exit_:
        parse(tmp_path / "eval_wrong.yaml", monkeypatch=monkeypatch)
    assert exit_.value.code == 2 and "sigma" in capsys.readouterr().err


def test_parsing_imports_no_model_library():
    """diffusers, transformers and open_clip are imported when a model is built, not before.

    What Lightning's own command line imports is not counted."""
    code = (
        "import sys, lightning.pytorch.cli; before = set(sys.modules)\n"
        "from stitchvm.cli import main\n"
        "try: main(['fit', '--config', 'configs/distill_world.yaml', '--print_config'])\n"
        "except SystemExit: pass\n"
        "new = {name.split('.')[0] for name in sys.modules.keys() - before}\n"
        "assert 'stitchvm' in new\n"
        "assert not new & {'diffusers', 'transformers', 'open_clip', 'peft', 'matplotlib', 'scipy'}, new"
    )
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        cwd=CONFIGS.parent,
        capture_output=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
