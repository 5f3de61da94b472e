"""What should stand for the class token when a tail begins at block j > 1? Measured on a clean-image reward.

    python benchmarks/handover.py --reward world:clip --output results/world/handover.json

A. The frozen tail is given the exact patch tokens of test images, and only the class token (or an added
   positional embedding) is varied: cosine to the true embedding, and image-to-text R@1.
B. The tail is trained for a short while on patch tokens of images x_t = (1 − t) x + t ε against the embedding of
   the clean x, Eq. (78): a stand-in for what a stitching layer hands over, without a backbone. Held-out cosine.

docs/handover.md discusses the numbers. The images are scenes of the embedded world.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stitchvm.objectives.distill import representation_distillation
from stitchvm.results import check_free, read_results, write_results
from stitchvm.rewards.clip import CLIPReward
from stitchvm.rewards.clip_tail import CLIPTail
from stitchvm.world.render import render
from stitchvm.world.scenes import Scene, sample_scenes

LEVELS = (0.0, 0.25, 0.5, 0.75)


def pixels_of(scenes: list[Scene]) -> Tensor:
    """Returns rendered scenes with shape (N, 3, 32, 32) in [0, 1]."""
    return torch.from_numpy(render(scenes))


def cosine(e: Tensor, target: Tensor) -> float:
    """Returns the mean cosine similarity of two batches of embeddings."""
    return float(F.cosine_similarity(e, target).mean())


def recall(e: Tensor, text: Tensor) -> float:
    """Returns image-to-text R@1: the share of images whose own caption is nearest."""
    nearest = (F.normalize(e, dim=-1) @ text.T).argmax(1)
    return float((nearest == torch.arange(len(e))).float().mean())


def fit_readout(patches: Tensor, cls: Tensor) -> tuple[Tensor, Tensor]:
    """Returns intercept (D,) and matrix (D, D) of the class token on the mean patch token, ridge regression.

    Arguments:
        patches: Patch tokens of the probe images, with shape (N, D, h, w).
        cls: Their class tokens, with shape (N, D).
    """
    x, y = patches.mean((2, 3)).double(), cls.double()
    dx, dy = x - x.mean(0), y - y.mean(0)
    gram = dx.T @ dx + 1e-3 * dx.square().sum(0).mean() * torch.eye(
        x.shape[1], dtype=torch.float64
    )
    weights = torch.linalg.solve(gram, dx.T @ dy).T
    return (y.mean(0) - weights @ x.mean(0)).float(), weights.float()


def class_token_choices(
    reward: CLIPReward, j: int, h: Tensor, probe: tuple[Tensor, Tensor], cls: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns (patches, class token) for every choice of experiment A.

    Arguments:
        reward: The reward.
        j: The block of the hand-over.
        h: The exact patch tokens of the test images, with shape (B, D, h, w).
        probe: Patch tokens and class tokens of the probe images.
        cls: The true class tokens of the test images, with shape (B, D).
    """
    v = reward.visual
    position = v.positional_embedding
    grid = position[1:].T.unflatten(1, reward.grid)
    mean, start = probe[1].mean(0), reward.tail(j).class_token.detach()
    raw = v.class_embedding + position[0]
    intercept, weights = fit_readout(*probe)

    def all_of(token: Tensor) -> Tensor:
        return token.expand(len(h), -1)

    return {
        "true": (h, cls),
        "probe mean": (h, all_of(mean)),
        "linear read-out": (h, intercept + h.mean((2, 3)) @ weights.T),
        "ln_pre(cls + pos)": (h, all_of(start)),
        "cls + pos": (h, all_of(raw)),
        "probe mean, pos added again": (h + grid, all_of(mean + position[0])),
        "literal": (h + grid, all_of(raw)),
    }


TRAINED = (
    "probe mean, trainable",
    "probe mean, constant",
    "read-out from zero",
    "read-out, fitted",
    "literal",
)


def make_tail(reward: CLIPReward, j: int, choice: str, probe: tuple[Tensor, Tensor]) -> CLIPTail:
    """Returns a tail of experiment B, before training, from the probe's patch tokens and class tokens."""
    kinds = {"literal": "literal", "probe mean, constant": "constant"}
    kind = kinds.get(choice, "readout" if choice.startswith("read-out") else "trainable")
    tail = CLIPTail(reward.visual, j, kind)
    if choice == "read-out, fitted":
        tail.init_class_token(*fit_readout(*probe))
    else:
        tail.init_class_token(probe[1].mean(0))
    return tail


def noised(x: Tensor, t: Tensor, generator: torch.Generator) -> Tensor:
    """Returns x_t = (1 − t) x + t ε with ε around mid-grey, shape of x."""
    eps = 0.5 + 0.25 * torch.randn(x.shape, generator=generator)
    t = t.view(-1, 1, 1, 1)
    return (1 - t) * x + t * eps


def train(
    reward: CLIPReward,
    tail: CLIPTail,
    draw: Callable[[int], Tensor],
    steps: int,
    lr: float,
    seed: int,
) -> None:
    """Distils the tail on noised images, Eq. (78)."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(tail.parameters(), lr=lr, weight_decay=0.0)
    for step in range(steps):
        x = draw(step)
        t = torch.rand(len(x), generator=generator)
        with torch.no_grad():
            teacher = reward.embed(x)
            h = reward.prefix(noised(x, t, generator), tail.j)
        loss = representation_distillation(tail(h), teacher)["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:  # warm up over 20 steps, then down to zero
            group["lr"] = lr * min(1.0, (step + 1) / 20, (steps - step) / (0.5 * steps))
        optimizer.step()


def tables(records: list[dict[str, Any]]) -> str:
    """Returns both experiments as Markdown: cosine and, in brackets, image-to-text R@1."""
    cells: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    for r in (r for r in records if "experiment" in r):
        column = f"j = {r['j']}" if r["experiment"] == "A" else f"σ = {r['sigma']}"
        row = (
            r["choice"]
            if r["experiment"] == "A"
            else f"j = {r['j']}, {r['steps']} steps: {r['choice']}"
        )
        cell = cells.setdefault((r["experiment"], row, column), {})
        cell.setdefault(r["metric"], []).append(r["value"])
    answer = []
    for experiment in ("A", "B"):
        mine = {key[1:]: value for key, value in cells.items() if key[0] == experiment}
        columns = list(dict.fromkeys(column for _, column in mine))
        rows = sorted(dict.fromkeys(row for row, _ in mine), key=lambda row: " 0 steps" not in row)
        if not mine:
            continue
        answer.append(
            f"| {experiment} | " + " | ".join(columns) + " |\n|---" + "|---" * len(columns) + "|"
        )
        for row in rows:
            texts = []
            for column in columns:
                c, r1 = (mine[row, column][m] for m in ("cosine", "retrieval/image_to_text_r1"))
                texts.append(f"{sum(c) / len(c):.4f} ({sum(r1) / len(r1):.3f})")
            answer.append(f"| {row} | " + " | ".join(texts) + " |")
        answer.append("")
    return "\n".join(answer)


def main() -> None:
    """Runs both experiments and writes the records, or shows those of a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reward", default="world:clip", help="world:clip or local-dir:FOLDER")
    parser.add_argument("--output", type=Path, default=Path("results/world/handover.json"))
    parser.add_argument("--js", type=int, nargs="+", default=[2, 3, 4, 5, 6])
    parser.add_argument("--train-js", type=int, nargs="+", default=[4])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--probes", type=int, default=200)
    parser.add_argument("--tests", type=int, default=256)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument(
        "--show", action="store_true", help="print the tables of --output, run nothing"
    )
    args = parser.parse_args()
    if args.show:
        print(tables(read_results(args.output)["records"]))
        return
    check_free(args.output, overwrite=args.overwrite)

    reward = CLIPReward(args.reward)
    test_scenes = sample_scenes("test", args.tests, seed=1, distinct=True)
    probes, tests = pixels_of(sample_scenes("tune", args.probes, seed=2)), pixels_of(test_scenes)
    text = reward.encode_text([scene.caption for scene in test_scenes])
    records: list[dict[str, Any]] = []
    with torch.no_grad():
        probe, truth = reward.probe(probes, args.js), reward.probe(tests, args.js)
    clean = recall(truth.image, text)
    records.append(
        {"metric": "retrieval/image_to_text_r1", "choice": "whole tower", "value": clean}
    )
    print(f"whole tower: R@1 {clean:.3f}")

    for j in args.js:
        at_probe = probe.patches[j], probe.class_token[j]
        choices = class_token_choices(reward, j, truth.patches[j], at_probe, truth.class_token[j])
        variance = truth.class_token[j].var(0).sum() / truth.class_token[j].square().sum(1).mean()
        for choice, (h, cls) in choices.items():
            # "constant" tails put nothing on the tokens: what they are given is what block j sees
            with torch.no_grad():
                e = CLIPTail(reward.visual, j, "constant")(h, cls).image
            row = {
                "experiment": "A",
                "j": j,
                "choice": choice,
                "cls_variance_share": float(variance),
            }
            records.append({**row, "metric": "cosine", "value": cosine(e, truth.image)})
            records.append(
                {**row, "metric": "retrieval/image_to_text_r1", "value": recall(e, text)}
            )
            print(
                f"A j={j} {choice}: cosine {cosine(e, truth.image):.4f} R@1 {recall(e, text):.3f}"
            )

    for seed in args.seeds:
        for j in args.train_js:
            for choice in TRAINED:
                start = time.perf_counter()
                tail = make_tail(reward, j, choice, (probe.patches[j], probe.class_token[j]))

                def draw(step: int, seed: int = seed) -> Tensor:
                    return pixels_of(sample_scenes("train", args.batch, seed=[10 + seed, step]))

                for trained in (False, True):
                    if trained:
                        train(reward, tail, draw, args.steps, args.lr, seed)
                    for level in LEVELS:
                        generator = torch.Generator().manual_seed(100)
                        x_t = noised(tests, torch.full((len(tests),), level), generator)
                        with torch.no_grad():
                            e = tail(reward.prefix(x_t, j)).image
                        row = {"experiment": "B", "j": j, "choice": choice, "sigma": level}
                        row |= {"steps": args.steps * trained, "seed": seed}
                        values = {"cosine": cosine(e, truth.image)}
                        values["retrieval/image_to_text_r1"] = recall(e, text)
                        records += [{**row, "metric": m, "value": v} for m, v in values.items()]
                    means = [r["value"] for r in records[-2 * len(LEVELS) :: 2]]
                    print(
                        f"B seed {seed} j={j} {choice}, {args.steps * trained} steps: cosine at "
                        f"{LEVELS}: " + " ".join(f"{m:.4f}" for m in means),
                        f"({time.perf_counter() - start:.0f} s)",
                        flush=True,
                    )
    settings = {
        key: value for key, value in vars(args).items() if key not in ("output", "overwrite")
    }
    write_results(args.output, records, extra={"settings": settings}, overwrite=args.overwrite)
    print(tables(records))
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
