"""The command line. This file imports the standard library only, so that `--help` and `--version` are quick."""

from __future__ import annotations

import difflib
import sys

from stitchvm._version import __version__

__all__ = ["main"]

COMMANDS = {
    "search": "Stage 1: measure every stitch point (i, j), write search.json and heat maps.",
    "fit": "Train what the config names, for example distil a value model (stage 2).",
    "validate": "Measure the validation losses of a checkpoint.",
    "test": "Measure values at several noise levels, or finished samples.",
    "predict": "Sample prompts: plain, best-of-N, FK steering or guidance; images and samples.jsonl as they come.",
    "check": "Are the files that a config names complete and right? In seconds, before anything is loaded.",
    "sweep": "Run predict for several settings of one parameter, such as a guidance strength, and compare them.",
    "curves": "Draw reward against cost of finished or running fits, and compare what they cost.",
}

HELP = f"""usage: stitchvm [--help] [--version] COMMAND [--config FILE] [--KEY VALUE ...]

Value models for noisy diffusion latents, stitched from clean-image rewards (arXiv 2605.19804).

commands:
{chr(10).join(f"  {name:<10}{text}" for name, text in COMMANDS.items())}

A run is a YAML file; every value can be overridden:
  stitchvm fit --config configs/distill_world.yaml --trainer.max_steps 100
  stitchvm fit --config configs/distill_world.yaml --ckpt_path last     (goes on where it stopped)
  stitchvm fit --config configs/nft_stitched_world.yaml --print_cost    (what an update costs, before any)
  stitchvm test --config configs/eval_world.yaml
  stitchvm predict --config configs/fks_stitched_world.yaml --data.num_prompts 16
                                   (interrupted, the same command goes on where it stopped)
  stitchvm COMMAND --help          all options of a command
  stitchvm COMMAND --config FILE --print_config      the composed configuration
"""


def main(args: list[str] | None = None) -> None:
    """Runs the command line `stitchvm` with `args`, or with the process's own arguments if None."""
    argv = sys.argv[1:] if args is None else list(args)
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP, end="")
        return
    if argv[0] == "--version":
        print(f"stitchvm {__version__}")
        return
    if argv[0] not in COMMANDS:
        near = difflib.get_close_matches(argv[0], COMMANDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        print(
            f"stitchvm: error: unknown command {argv[0]!r}{hint} Commands: {', '.join(COMMANDS)}",
            file=sys.stderr,
        )
        raise SystemExit(2)

    try:
        _dispatch(argv)
    except KeyboardInterrupt:  # while importing, too, which takes seconds
        print("stitchvm: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def _dispatch(argv: list[str]) -> None:
    """Imports what a command needs, and runs it."""
    if argv[0] == "check":
        from stitchvm.preflight import main as check

        check(argv[1:])
        return
    if argv[0] == "sweep":
        from stitchvm.sweep import main as sweep

        sweep(argv[1:])
        return
    if argv[0] == "curves":
        from stitchvm.curves import main as curves

        curves(argv[1:])
        return
    from stitchvm.lightning_cli import run

    run(argv)
