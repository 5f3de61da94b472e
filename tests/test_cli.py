"""The command line's quick answers, and that they import nothing heavy."""

import subprocess
import sys

import pytest

from stitchvm import __version__
from stitchvm.cli import main


def test_help_and_version(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"stitchvm {__version__}\n"
    main([])
    bare = capsys.readouterr().out
    main(["--help"])
    assert capsys.readouterr().out == bare
    assert all(name in bare for name in ("search", "fit", "validate", "test", "predict"))


def test_help_imports_no_torch():
    code = (
        "import sys; from stitchvm.cli import main; main(['--help']);"
        "assert not {'torch', 'lightning', 'numpy'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_module_entry_point():
    command = [sys.executable, "-m", "stitchvm", "--version"]
    assert (
        __version__ in subprocess.run(command, check=True, capture_output=True, text=True).stdout
    )


def test_unknown_command_names_the_nearest(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["serach"])
    assert exit_.value.code == 2
    assert "did you mean 'search'" in capsys.readouterr().err


def test_a_trainer_that_cannot_be_is_one_message(capsys, tmp_path):
    config = "configs/distill_world.yaml"
    with pytest.raises(SystemExit) as exit_:
        main(
            [
                *("fit", "--config", config, f"--trainer.default_root_dir={tmp_path}"),
                "--trainer.fast_dev_run=-5",
            ]
        )
    assert exit_.value.code == 1
    error = capsys.readouterr().err
    assert "stitchvm: error: fast_dev_run=-5 is not a valid configuration" in error
    assert "Traceback" not in error


DISTIL, PLAIN = "configs/distill_world.yaml", "configs/plain_world.yaml"
PROMPTS = "stitchvm.data.prompts.Prompts"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["fit", DISTIL, "--trainer.devices=-3"], "should be an int > 0"),
        (["fit", DISTIL, "--trainer.accelerator=tpuu"], "invalid accelerator name"),
        (["fit", DISTIL, "--trainer.strategy=dpp"], "invalid strategy name"),
        (["fit", DISTIL, "--model.lrr=1"], "Option 'lrr' is not accepted; did you mean 'lr'?"),
        (["fit", DISTIL, "--data.roots=x"], "Option 'roots' is not accepted; expected one of"),
        (["fit", DISTIL, "--modle.lr=1"], "did you mean --model.lr?"),
        (["fit", DISTIL, "--trainer.max_stops=1"], "did you mean --trainer.max_steps?"),
        (["predict", PLAIN, f"--data={PROMPTS}", "--data.prompts=a dog"], "Got value: a dog"),
        (["test", DISTIL], "`stitchvm test` cannot run StitchDistillation, which is for fit and"),
        (["predict", DISTIL], "give it a config such as configs/plain_world.yaml"),
        (["validate", PLAIN], "cannot run Sampling, which is for predict"),
        (["fit", PLAIN], "give it a config such as configs/distill_world.yaml"),
        (["fit", DISTIL, "--ckpt_path=nowhere.ckpt"], "--ckpt_path nowhere.ckpt: no such file"),
        (["fit", DISTIL, "--ckpt_path=best"], "not configured to save the best model"),
        (["predict", PLAIN, "--ckpt_path=README.md"], "README.md is not a checkpoint"),
        (["fit", DISTIL, "--model.lr=-1"], "lr = -1.0: expected a finite number of at least 0"),
    ],
)
def test_a_careless_command_is_one_message(capsys, tmp_path, words, expected):
    command, config, *flags = words
    root = tmp_path / "run"
    with pytest.raises(SystemExit) as exit_:  # any other exception would be a trace
        main([command, "--config", config, f"--trainer.default_root_dir={root}", *flags])
    error = capsys.readouterr().err
    assert exit_.value.code in (1, 2)
    assert "stitchvm: error: " in error and expected in error
    assert not (root / "checkpoints").exists() and not (root / "images").exists()


@pytest.mark.parametrize("nested", [False, True])
def test_a_mistake_in_yaml_names_its_file_and_line(capsys, tmp_path, nested):
    broken, whole = tmp_path / "broken.yaml", tmp_path / "whole.yaml"
    broken.write_text("path: [world:sd3,\ndtype: float32\n")
    whole.write_text(
        "model:\n  class_path: stitchvm.modules.draft.DRaFT\n"
        f"  init_args:\n    generator: {broken}\n"
    )
    with pytest.raises(SystemExit) as exit_:
        main(["fit", "--config", str(whole if nested else broken)])
    assert exit_.value.code == 2
    found = capsys.readouterr().err
    assert "broken.yaml, line 3, column 1" in found and "unicode string" not in found
    assert "JSONARGPARSE_DEBUG=true" in found  # jsonargparse refuses 1
    with pytest.raises(SystemExit):
        main(["fit", "--config", "path: [" + "long, " * 100])  # it takes YAML for a path, and back
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "left", "how"),
    [
        ("fit", "checkpoints", "go on from it with --ckpt_path last"),
        ("fit", "value_model", "delete it"),  # without checkpoints, if none were to be
        ("fit", "lora", "delete it"),
        ("fit", "full", "delete it"),
        ("search", "search.json", "delete it"),
    ],
)
def test_what_an_earlier_run_has_left_is_not_written_over(capsys, tmp_path, command, left, how):
    (tmp_path / left).mkdir()
    with pytest.raises(SystemExit) as exit_:
        main([command, "--config", DISTIL, f"--trainer.default_root_dir={tmp_path}"])
    assert exit_.value.code == 1
    error = capsys.readouterr().err
    assert f"{tmp_path / left} is left from an earlier run: {how}, or choose another" in error
    assert [path.name for path in tmp_path.iterdir()] == [left]


@pytest.mark.parametrize("command", [("fit", DISTIL), ("predict", PLAIN), ("search", DISTIL)])
def test_a_run_folder_that_cannot_be_is_said_before_the_work(capsys, tmp_path, command):
    (tmp_path / "file").write_text("mine")
    name, config = command
    for root in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(SystemExit) as exit_:
            main([name, "--config", config, f"--trainer.default_root_dir={root}"])
        error = capsys.readouterr().err
        assert exit_.value.code == 1
        assert f"{tmp_path / 'file'} is a file" in error and "--trainer.default_root_dir" in error
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.filterwarnings("ignore:.*args parameter is intended to run from within Python.*")
@pytest.mark.parametrize(
    ("flags", "expected"),
    [([], "LeanCheckpointIO"), (["--trainer.plugins=AsyncCheckpointIO"], "AsyncCheckpointIO")],
)
def test_checkpoint_files_are_read_and_written_as_the_user_says(
    monkeypatch, tmp_path, flags, expected
):
    from stitchvm.lightning_cli import StitchCLI

    monkeypatch.setattr(StitchCLI, "_run_subcommand", lambda self, name: None)
    demos = "lightning.pytorch.demos.boring_classes"
    words = [f"--model={demos}.BoringModel", f"--data={demos}.BoringDataModule", *flags]
    words += [f"--trainer.default_root_dir={tmp_path}", "--trainer.accelerator=cpu"]
    cli = StitchCLI(args=["fit", *words], command="fit")
    assert type(cli.trainer.strategy.checkpoint_io).__name__ == expected


def test_two_runs_do_not_share_a_folder(capsys, tmp_path):
    from stitchvm.modules.run_folder import claimed

    root = tmp_path / "run"
    words = ["--config", PLAIN, "--data.num_prompts=0", f"--trainer.default_root_dir={root}"]
    with claimed(root), pytest.raises(SystemExit) as exit_:
        main(["predict", *words])
    assert exit_.value.code == 1
    assert f"another run is writing into {root}" in capsys.readouterr().err
    for _ in range(2):  # given back, also after an error
        with pytest.raises(SystemExit):
            main(["predict", *words])
        assert "num_prompts must be at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["fit", "check", "sweep", "curves"])
def test_an_interrupt_while_importing_is_one_message(command, capsys, monkeypatch):
    def interrupt(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr("stitchvm.cli._dispatch", interrupt)
    with pytest.raises(SystemExit) as exit_:
        main([command])
    assert exit_.value.code == 130 and capsys.readouterr().err == "stitchvm: interrupted\n"


@pytest.mark.filterwarnings("ignore:.*args parameter is intended to run from within Python.*")
def test_an_interrupted_command_that_keeps_nothing_exits_as_shells_expect(
    monkeypatch, tmp_path, capsys
):
    from lightning.pytorch.cli import LightningCLI

    from stitchvm.lightning_cli import StitchCLI

    def interrupted(self, name):  # as Lightning's Trainer ends
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as interrupt:
            raise SystemExit(1) from interrupt

    monkeypatch.setattr(LightningCLI, "_run_subcommand", interrupted)
    demos = "lightning.pytorch.demos.boring_classes"
    words = [f"--model={demos}.BoringModel", f"--data={demos}.BoringDataModule"]
    words += [f"--trainer.default_root_dir={tmp_path}", "--trainer.accelerator=cpu"]
    with pytest.raises(SystemExit) as exit_:
        StitchCLI(args=["test", *words], command="test")
    assert exit_.value.code == 130 and capsys.readouterr().err.endswith("stitchvm: interrupted\n")
