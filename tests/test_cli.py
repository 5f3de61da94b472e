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
