"""One LightningCLI for every command; imported by `cli.py` once a command is known.

Differences from the stock one: only the asked command's parser is built; `search` is a command; the log folder *is*
`trainer.default_root_dir`; a folder that holds an earlier run is never written over; errors are one message.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
import warnings
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import (
    ArgsType,
    LightningArgumentParser,
    LightningCLI,
    SaveConfigCallback,
)
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden

from stitchvm.cli_parser import StitchParser, condensed
from stitchvm.interruption import exit_code
from stitchvm.modules.checkpoint_io import LeanCheckpointIO, check_checkpoint_file
from stitchvm.modules.epoch_bar import name_epochs
from stitchvm.modules.run_folder import check_folder, claimed

# Lightning 2.6 calls parser methods that jsonargparse renames in 5.0; users can do nothing about it
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")

__all__ = ["StitchCLI", "StitchTrainer", "parse", "run"]

# what a module must define for a command, and a configuration that does
HOOKS = {
    "fit": (("training_step",), "configs/distill_world.yaml"),
    "validate": (("validation_step",), "configs/distill_world.yaml"),
    "test": (("test_step",), "configs/eval_world.yaml"),
    "predict": (("predict_step", "forward"), "configs/plain_world.yaml"),
}
# what a command leaves in its run's folder
LEFT = {"search": ("search.json",), "fit": ("checkpoints", "value_model", "lora", "full")}


class StitchTrainer(Trainer):
    """Lightning's Trainer and stage 1."""

    def _run_stage(self) -> Any:
        """Lets a run that was interrupted after its last step leave its weights, though no step is left to be made."""
        results = super()._run_stage()
        if self.state.fn == TrainerFn.FITTING and self.fit_loop.restarting:  # nothing has run
            call._call_lightning_module_hook(self, "on_train_end")
        return results

    def search(self, model: LightningModule, datamodule: LightningDataModule) -> None:
        """Runs stage 1 over all stitch points and writes search.json and heat maps."""
        run_search = getattr(model, "run_search", None)
        if run_search is None:
            raise ValueError(
                f"{type(model).__name__} has no stage 1; `search` takes a distillation config, such as "
                "configs/distill_world.yaml"
            )
        self.strategy.connect(model)
        self.state.fn, self.state.status = TrainerFn.FITTING, TrainerStatus.RUNNING
        self._data_connector.attach_data(model, datamodule=datamodule)
        datamodule.prepare_data()
        datamodule.setup("validate")  # held-out images; of those to train on there may be few
        from stitchvm.search import CRITERIA
        from stitchvm.tables import records_to_text

        result = run_search()
        path = model.save_search(result)
        for criterion, key in CRITERIA.items():
            if all(record[key] is None for record in result.records):
                continue
            print(records_to_text(result.records, rows=("j",), column="i", value=key, digits=4))
            print(f"lowest {criterion} loss: (i, j) = {result.best(criterion)}\n")
        given = getattr(model, "stitch_point", None)
        how = (
            "goes on from here"
            if given is None
            else f"stitches at {tuple(given)}, which it names; --model.stitch_point null takes what was found here"
        )
        print(f"wrote {path}; next: stitchvm fit with the same config {how}")


class RunConfig(SaveConfigCallback):
    """Writes config.yaml; in the folder of an earlier run only when its checkpoint has been found to fit."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Writes it, unless a checkpoint is still to be read."""
        if not self.config.get("ckpt_path"):
            super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes it if that is still to be done; every process must come here or none."""
        if self.config.get("ckpt_path"):
            super().setup(trainer, pl_module, "fit")


class StitchCLI(LightningCLI):
    """The command line over LightningModules and LightningDataModules named by `class_path`."""

    def __init__(self, args: ArgsType = None, command: str | None = None, **kwargs: Any) -> None:
        self.command = command
        super().__init__(
            LightningModule,
            LightningDataModule,
            trainer_class=StitchTrainer,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},  # our own check comes first
            parser_class=StitchParser,
            load_from_checkpoint_support=False,
            args=args,
            **kwargs,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Adds `search` to Lightning's commands."""
        return {**LightningCLI.subcommands(), "search": {"model", "datamodule"}}

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        """Builds the parser of the asked command only: each takes a good part of a second."""
        every = self.subcommands()
        wanted = {self.command: every[self.command]} if self.command in every else every
        self.subcommands = lambda: wanted  # type: ignore[method-assign]
        super()._add_subcommands(parser, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds `--print_cost` to `fit`; a run's config.yaml does not have it."""
        if self.command == "fit":
            parser.add_argument(
                "--print_cost",
                nargs="?",
                const="measure",
                default=argparse.SUPPRESS,
                choices=("measure", "count"),
                help="Print what an update of a fine-tuning costs and exit; `count` measures nothing.",
            )

    @property
    def prints_cost(self) -> str | None:
        """What `--print_cost` asks for: "measure" or "count"."""
        return self.config[self.subcommand].get("print_cost")

    def _parse_ckpt_path(self) -> None:
        """Does nothing: checkpoints hold no hyperparameters, for which Lightning would read the whole file."""

    def before_instantiate_classes(self) -> None:
        """Refuses a checkpoint that is none, and a folder that holds an earlier run, before anything is built."""
        config = self.config[self.subcommand]
        folder = Path(config.trainer.default_root_dir or ".")
        _check_checkpoint(config.get("ckpt_path"))
        check_folder(str(config.trainer.default_root_dir or "."))
        if self.subcommand not in ("fit", "search") or self.prints_cost:
            return
        if config.trainer.fast_dev_run or config.get("ckpt_path"):
            return
        left = next(
            (folder / name for name in LEFT[self.subcommand] if (folder / name).exists()), None
        )
        if left is not None:
            goes_on = left.name == "checkpoints"
            how = "go on from it with --ckpt_path last" if goes_on else "delete it"
            raise FileExistsError(
                f"{left} is left from an earlier run: {how}, or choose another folder with --trainer.default_root_dir"
            )

    def after_instantiate_classes(self) -> None:
        """Refuses a module of another command; hands the configuration to modules that keep it with their results."""
        self._check_command()
        if hasattr(self.model, "run_config"):
            self._dump_config()
            self.model.run_config = yaml.safe_dump(self.config_dump)

    def _check_command(self) -> None:
        """Raises ValueError if the module does not define what the command runs."""
        takes = commands_of(self.model)
        if self.subcommand in HOOKS and self.subcommand not in takes:
            raise ValueError(
                f"`stitchvm {self.subcommand}` cannot run {type(self.model).__name__}, which is for "
                f"{' and '.join(takes)}: give it a config such as {HOOKS[self.subcommand][1]}"
            )

    def _run_subcommand(self, subcommand: str) -> None:
        """Runs the command; of an interrupted one says how to go on, and exits as shells expect."""
        if self.prints_cost:
            from stitchvm.modules.cost_report import print_cost

            print_cost(self.model, self.datamodule, self.trainer, self.prints_cost)
            return
        writes = subcommand in ("fit", "search", "predict") and self.trainer.is_global_zero
        root = self.trainer.default_root_dir
        try:
            with claimed(root) if writes else nullcontext():
                super()._run_subcommand(subcommand)
        except SystemExit as exit_:  # what Lightning makes of an interrupt
            interrupt, how = exit_.__context__, getattr(self.model, "how_to_go_on", None)
            if not isinstance(interrupt, KeyboardInterrupt):
                raise
            if self.trainer.is_global_zero:
                rest = "" if how is None else f"; {how()}"
                print(f"stitchvm: interrupted{rest}", file=sys.stderr)
            raise SystemExit(exit_code(interrupt)) from None

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Logs into `default_root_dir` itself, so that one run is one folder."""
        trainer_config = self._get(self.config_init, "trainer", default={})
        root = trainer_config.get("default_root_dir") or "."
        if self.prints_cost:
            kwargs["logger"] = False
            self.save_config_callback = None
        elif trainer_config.get("logger") in (None, True) and self.subcommand == "fit":
            from lightning.pytorch.loggers import TensorBoardLogger

            kwargs["logger"] = TensorBoardLogger(save_dir=root, name="", version="")
        elif trainer_config.get("logger") in (None, True):
            kwargs["logger"] = False
        if self.subcommand != "fit":
            self.save_config_callback = None
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (TypeError, ValueError) as error:  # Lightning has no one class for wrong settings
            if _ours(error):
                raise
            raise MisconfigurationException(str(error)) from error
        name_epochs(trainer)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # no plugin of the user's
            trainer.strategy.checkpoint_io = LeanCheckpointIO()
        return trainer


class ParsedCLI(StitchCLI):
    """The command line as far as it is parsed: nothing is looked for, built or run."""

    def _set_seed(self) -> None: ...

    def before_instantiate_classes(self) -> None:
        """Does nothing."""

    def instantiate_classes(self) -> None:
        """Does nothing."""

    def after_instantiate_classes(self) -> None:
        """Does nothing."""

    def _run_subcommand(self, subcommand: str) -> None: ...


def commands_of(module: LightningModule | type) -> list[str]:
    """Returns the commands whose hooks a module, or a class of one, defines."""
    return [
        name
        for name, (hooks, _) in HOOKS.items()
        if any(is_overridden(hook, module, LightningModule) for hook in hooks)
    ]


def parse(argv: list[str], class_path: Any = None) -> None:
    """Parses what follows a command as a run does, and exits as it does where something is no option of it.

    Arguments:
        argv: The command line after the command.
        class_path: The module's class, which tells which command it is for; `fit` if it cannot be told.
    """
    quiet()
    place, _, name = str(class_path).rpartition(".")
    try:
        command = commands_of(getattr(import_module(place), name))[0]
    except Exception:  # no class, or a module that cannot be imported: the parser has words for it
        command = "fit"
    ParsedCLI(args=[command, *argv], command=command)


def _check_checkpoint(path: str | None) -> None:
    """Raises an error if `path` is a local path without a whole checkpoint; words such as "last" are Lightning's."""
    words = ("last", "best", "hpc", "registry")
    if path is None or "://" in path or path in words or path.startswith("registry:"):
        return
    if not Path(path).exists():
        raise FileNotFoundError(
            f"--ckpt_path {path}: no such file; expected a checkpoint such as RUN/checkpoints/last.ckpt, or `last`"
        )
    if Path(path).is_file():
        check_checkpoint_file(path)


def quiet() -> None:
    """Silences warnings about what this project does on purpose."""
    for text in (
        ".*args parameter is intended to run from within Python.*",  # `main(args)` is our API
        ".*module.s. in eval mode at the start of training.*",  # the frozen networks
        ".*isinstance.treespec, LeafSpec.* is deprecated.*",  # inside Lightning
        ".*Checkpoint directory .* exists and is not empty.*",  # resuming: checked before
        ".*does not have many workers.*",
    ):
        warnings.filterwarnings("ignore", message=text)
    advice = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    advice.addFilter(lambda record: "Tip: For seamless cloud" not in record.getMessage())


def run(argv: list[str]) -> None:
    """Parses `argv` and runs its command; a user's mistake ends in one message and exit code 1 or 2."""
    quiet()
    try:
        args = None if argv == sys.argv[1:] else argv
        StitchCLI(args=args, command=argv[0], save_config_callback=RunConfig)
        from stitchvm.modules.ranks import leave

        leave()
    except (ValueError, OSError, MemoryError) as error:
        wrapped = str(error).startswith(
            "Does not validate against"
        )  # by the parser, while building
        named = isinstance(error, OSError) and error.filename is not None  # a full disk, no rights
        if os.environ.get("STITCHVM_DEBUG") or not (wrapped or named or _ours(error)):
            raise
        message = condensed(str(error)) if wrapped else str(error)
        print(f"stitchvm: error: {message}", file=sys.stderr)
        raise SystemExit(1) from error
    except MisconfigurationException as error:  # of the trainer's settings, in Lightning's words
        if os.environ.get("STITCHVM_DEBUG"):
            raise
        print(f"stitchvm: error: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    except KeyboardInterrupt as interrupt:
        print("stitchvm: interrupted before the work began", file=sys.stderr)
        raise SystemExit(exit_code(interrupt)) from None


def _ours(error: BaseException) -> bool:
    """Whether the error was raised by this package, or by Lightning about `ckpt_path`: then its message is enough."""
    frames = traceback.extract_tb(error.__traceback__)
    package = Path(__file__).parent
    last = Path(frames[-1].filename) if frames else Path()
    return package in last.parents or last.name == "checkpoint_connector.py"
