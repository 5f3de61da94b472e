"""`python -m stitchvm.world.train.values`: ships the world's stitched value models as `world:value_REWARD`.

Takes the value models of `benchmarks/world_values.py`, or with `--run` that of another `stitchvm fit`, such as one with
`--data.generated`; writes them with int8 matrices (`stitchvm.packing`), and puts into each card what was measured:
results/world/values_REWARD.json of all seeds or what the run was trained on, and the rounding's own effect on the tune
split.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml

from stitchvm.data.world import WorldAesthetic, WorldPreference, WorldRetrieval
from stitchvm.modules.evaluation import ValueEvaluation
from stitchvm.packing import pack
from stitchvm.results import read_results
from stitchvm.spec import build
from stitchvm.tables import records_to_markdown
from stitchvm.vae import VAE
from stitchvm.value_model import StitchedValueModel, model_card
from stitchvm.values.stitched import StitchedFactory
from stitchvm.world.train.common import weights_folder

DATA = {"clip": WorldRetrieval, "aesthetic": WorldAesthetic, "hps": WorldPreference}
SHOWN = ("_text_r1", "_image_r1", "aesthetic/srcc", "preference/hpdv2")


def ship(source: Path, target: Path, card: str, overwrite: bool) -> None:
    """Writes a value model with int8 matrices."""
    if (target / "config.json").exists() and not overwrite:
        raise SystemExit(
            f"{target} is there already: results were measured on it; pass --overwrite"
        )
    model = StitchedValueModel.from_pretrained(source)
    config = json.loads((source / "config.json").read_text())
    shutil.rmtree(target, ignore_errors=True)
    model.save_pretrained(target, state=pack(model.trainable()), config=config, card=card)
    for file in target.iterdir():
        file.chmod(0o644)


def rounding(name: str, source: Path, target: Path, images: int) -> list[dict[str, Any]]:
    """Returns the metric of the model as it was trained and as it is shipped, on the tune split."""
    import lightning.pytorch as pl

    reward = json.loads((source / "config.json").read_text())["reward"]
    spec = {key: reward[key] for key in ("class_path", "init_args")}
    module = ValueEvaluation(
        {"float32": StitchedFactory(str(source)), "int8": StitchedFactory(str(target))},
        reward=lambda: build(spec),
        vae=lambda: VAE("world:sd3"),
        clean=False,
        overwrite=True,
        plot=False,
        write_cards=False,
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=source.parent / "rounding",
    )
    trainer.test(module, DATA[name](num_images=images, split="tune"), verbose=False)
    return [r for r in module.records if r["metric"].endswith(SHOWN)]


def measured(results: Path, steps: int) -> str:
    """Returns the table of the kept results, or "" before there are any of so many steps."""
    content: dict[str, Any] = read_results(results) if results.is_file() else {"steps": None}
    if content["steps"] != steps:
        return ""
    shown = [
        r
        for r in content["records"]
        if r["metric"].endswith(SHOWN) and r["estimator"] in ("clean", "stitched")
    ]
    table = records_to_markdown(shown, rows=("metric", "estimator"))
    seeds = ", ".join(map(str, content["seeds"]))
    text = f"Test split, {shown[0]['n']} images, {content['steps']} steps, mean over seeds {seeds}"
    return f"{text} (this is seed {content['seeds'][0]}):\n\n{table}"


def trained_on(run: Path) -> str:
    """Returns what a run's images were, from its config.yaml."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    data, steps = config["data"]["init_args"], config["trainer"]["max_steps"]
    text = f"One seed, {steps} steps of {data['batch_size']} images"
    if data["generated"]:
        text += (
            f"; {data['generated_share']:.0%} of them from {data['generated']} images of the world's generator\n"
            f"(`--data.generated {data['generated']}`), which is what its values are asked about when it steers"
        )
    return f"{text}."


def main() -> None:
    """Ships the value models that are there."""
    parser = argparse.ArgumentParser(prog="python -m stitchvm.world.train.values")
    parser.add_argument("--rewards", nargs="+", choices=list(DATA), default=list(DATA))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=512, help="of the comparison, per level")
    parser.add_argument("--run", type=Path, help="the run of the one reward that is given")
    parser.add_argument("--overwrite", action="store_true", help="replace what is shipped")
    args = parser.parse_args()
    if args.run is not None and len(args.rewards) != 1:
        parser.error("--run is the run of one reward: name it with --rewards")
    torch.set_num_threads(1)
    for name in args.rewards:
        run = args.run or Path(f"runs/world_values/{name}/stitched_{args.steps}_seed{args.seed}")
        source, target = run / "value_model", weights_folder() / f"value_{name}"
        config = json.loads((source / "config.json").read_text())
        ship(source, target, model_card(config), args.overwrite)
        table = (
            measured(Path(f"results/world/values_{name}.json"), args.steps)
            if args.run is None
            else trained_on(run)
        )
        if args.images:
            compared = rounding(name, source, target, args.images)
            text = f"As trained and as shipped (int8 matrices), tune split, {args.images} images:"
            found = records_to_markdown(compared, rows=("metric", "estimator"))
            table = f"{table}\n\n{text}\n\n{found}".strip()
        card = model_card(config, table)
        (target / "README.md").write_text(card.replace("path/or/hub-id", f"world:value_{name}"))
        print(f"{target.name}: {sum(p.stat().st_size for p in target.iterdir())} bytes\n{table}\n")


if __name__ == "__main__":
    main()
