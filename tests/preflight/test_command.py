"""The command: configurations composed as they are run, a table, an exit code; every shipped one on a whole cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from stitchvm.cli import main
from stitchvm.lightning_cli import StitchCLI
from stitchvm.preflight.compose import compose
from stitchvm.preflight.walk import check

pytestmark = pytest.mark.filterwarnings("ignore:.*args parameter is intended to run from within")
CONFIGS = Path(__file__).parents[2] / "configs"
REAL = sorted(p for p in CONFIGS.glob("*.yaml") if "world" not in p.stem)


def command(capsys, *argv):
    """Runs `stitchvm check` and returns exit code and output."""
    with pytest.raises(SystemExit) as exit_:
        main(["check", *map(str, argv)])
    return exit_.value.code, capsys.readouterr()


@pytest.mark.parametrize("path", REAL, ids=lambda p: p.stem)
def test_every_shipped_config_on_the_published_layouts(hub, path):
    """All is there but what other runs make; nothing is wrong, and all that is named was looked at."""
    found = check(compose([path]))
    missing = [f for f in found if f.state != "ok"]
    assert all(f.state == "missing" and f.what.startswith("runs/") for f in missing), missing
    looked_at = " ".join(f.what for f in found)
    assert (path.stem == "eval_geneval_hf") == ("facebook/mask2former" in looked_at)
    for name in ("stable-diffusion-3.5-medium", "FLUX.1-dev", "data/AVA", "drawbench.txt"):
        assert (name in yaml.safe_dump(compose([path]))) == (name in looked_at)


def test_exit_code_and_remedy(hub, capsys):
    path = CONFIGS / "plain_sd35m.yaml"
    code, said = command(capsys, "--config", path)
    assert code == 0 and " ok" in said.out.splitlines()[-1] and "missing" not in said.out
    code, said = command(capsys, "--config", path, "--data.path", "nowhere.txt")
    assert code == 1 and "no such file" in said.out and "1 missing" in said.out
    code, said = command(capsys, "--config", path, "--model.generator.path=./nowhere")
    assert code == 1 and "missing   ./nowhere" in said.out
    code, said = command(capsys, "--config", path, "--ckpt_path", "last")
    assert code == 0


def test_checkpoints(hub, tmp_path, capsys, monkeypatch):
    import torch

    path, file = CONFIGS / "plain_sd35m.yaml", tmp_path / "last.ckpt"
    code, said = command(capsys, "--config", path, "--ckpt_path", file)
    assert code == 1 and "no such checkpoint" in said.out
    for elsewhere in ("last", "s3://bucket/last.ckpt", "registry:mine"):
        assert command(capsys, "--config", path, "--ckpt_path", elsewhere)[0] == 0
    torch.save({"a": torch.zeros(1000)}, file)
    assert command(capsys, "--config", path, "--ckpt_path", file)[0] == 0
    monkeypatch.setenv("HOME", str(tmp_path))  # a run does not resolve a ~
    assert command(capsys, "--config", path, "--ckpt_path", "~/last.ckpt")[0] == 1
    file.write_bytes(file.read_bytes()[:2000])
    code, said = command(capsys, "--config", path, "--ckpt_path", file)
    assert code == 1 and "truncated" in said.out


def test_mistakes_on_the_command_line(tmp_path, capsys):
    code, said = command(capsys, "--config", tmp_path / "no.yaml")
    assert code == 1 and "there is no configuration" in said.err
    (tmp_path / "list.yaml").write_text("- a\n")
    code, said = command(capsys, "--config", tmp_path / "list.yaml")
    assert code == 1 and "no mapping" in said.err
    code, said = command(capsys, "--config", CONFIGS / "plain_sd35m.yaml", "--data.path")
    assert code == 1 and "has no value" in said.err


@pytest.mark.parametrize(
    ("run", "config", "flag"),
    [
        ("predict", "plain_sd35m", "--model.samplr=x"),
        ("predict", "plain_sd35m", "--modle.method=x"),
        ("fit", "nft_sd35m", "--data.prompts_per_updat=4"),
        ("fit", "distill_flux_aesthetic", "--model.lr=much"),
        ("test", "eval_samples", "--trainer.max_stops=1"),
        ("fit", "nft_sd35m", "--model.class_path=stitchvm.modules.nft.Nothing"),
        ("predict", "plain_sd35m", "--model=3"),
        ("predict", "plain_sd35m", "--model.class_path=unfinished.Mine"),
    ],
)
def test_what_a_run_refuses_is_refused_in_its_words(
    hub, capsys, tmp_path, monkeypatch, run, config, flag
):
    (tmp_path / "unfinished.py").write_text("class Mine(")
    monkeypatch.syspath_prepend(tmp_path)
    path = str(CONFIGS / f"{config}.yaml")
    code, said = command(capsys, "--config", path, flag)
    with pytest.raises(SystemExit) as exit_:
        main([run, "--config", path, flag])
    assert code == exit_.value.code == 2
    assert said.err == capsys.readouterr().err and "stitchvm: error: " in said.err
    assert not said.out


def test_a_misspelt_key_in_the_file_is_refused(hub, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("model: {init_args: {samplr: null}}")
    code, said = command(
        capsys, "--config", CONFIGS / "plain_sd35m.yaml", "--config", tmp_path / "mine.yaml"
    )
    assert code == 2 and "Option 'samplr' is not accepted; did you mean 'sampler'?" in said.err


def test_a_class_may_be_named_by_its_path_alone(hub, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("a cat\na dog\n")
    words = ["--data", "stitchvm.data.prompts.Prompts", "--data.path", tmp_path / "mine.txt"]
    code, said = command(capsys, "--config", CONFIGS / "plain_world.yaml", *words)
    assert code == 0 and "mine.txt (2 prompts)" in said.out
    with pytest.raises(ValueError, match="batch_size is 3, which has no keys below it"):
        compose(
            [CONFIGS / "plain_world.yaml"], [("data.batch_size", "3"), ("data.batch_size.a", "1")]
        )


@pytest.mark.parametrize("name", ["dps_stitched_sd35m", "distill_flux_aesthetic", "nft_sd35m"])
def test_composed_as_the_command_line_does(name, monkeypatch):
    """Nested files, an overlay and overrides come to what jsonargparse makes of them."""
    path, overlay = CONFIGS / f"{name}.yaml", CONFIGS / "trainer" / "ddp.yaml"
    keys = {"distill": "model.backbone.path", "dps": "model.generator.path"}
    key = keys.get(name.partition("_")[0], "model.generator.path")
    for method in ("instantiate_classes", "after_instantiate_classes"):
        monkeypatch.setattr(StitchCLI, method, lambda self: None)
    monkeypatch.setattr(StitchCLI, "_run_subcommand", lambda self, name: None)
    sub = "predict" if name.startswith("dps") else "fit"
    argv = ["--config", str(path), "--config", str(overlay), f"--{key}=./mine"]
    theirs = StitchCLI(args=[sub, *argv], command=sub).config[sub].as_dict()
    ours = compose([path, overlay], [(key, "./mine")])
    assert contained(ours["model"], theirs["model"]) and contained(ours["data"], theirs["data"])
    assert ours["trainer"]["strategy"] == theirs["trainer"]["strategy"] == "ddp"
    assert "./mine" in yaml.safe_dump(ours)


def contained(ours, theirs) -> bool:
    """Whether all that we have is in what the parser has (which adds defaults)."""
    if isinstance(ours, dict):
        # jsonargparse shortens the path of a class that a package exports
        kinds = [str(d.get("class_path")).rpartition(".")[2] for d in (ours, theirs)]
        rest = {k: v for k, v in ours.items() if k != "class_path"}
        return kinds[0] == kinds[1] and all(contained(v, theirs[k]) for k, v in rest.items())
    if isinstance(ours, list):
        return all(contained(a, b) for a, b in zip(ours, theirs, strict=True))
    return ours == theirs or float(ours) == float(theirs)  # 1 and 1.0
