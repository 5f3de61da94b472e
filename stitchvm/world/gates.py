"""`python -m stitchvm.world.gates`: measures every gate on the shipped weights and writes results/world/gates.json.

Everything is loaded from the package's folders by the classes a user would use (diffusers, open_clip), in
float32, and measured on test scenes, whose keys no network was trained on.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from stitchvm.results import write_results

GATES = {
    "vae/checker": 0.95,
    "clip/image_to_text_r1": 0.85,
    "clip/text_to_image_r1": 0.85,
    "aesthetic/srcc": 0.9,
    "hps/pair_accuracy": 0.9,
    "sd3/whole": 0.75,
    "sd3_large/whole": 0.75,
}
GUIDANCE = {"sd3": 4.5, "sd3_large": 4.5, "flux": 4.0}
STEPS = 24


def load_pipeline(name: str) -> Any:
    """Returns the diffusers pipeline of a shipped generator in float32."""
    import torch
    from diffusers import FluxPipeline, StableDiffusion3Pipeline

    from stitchvm.world.train.common import weights_folder

    cls = FluxPipeline if name == "flux" else StableDiffusion3Pipeline
    pipeline = cls.from_pretrained(weights_folder() / name, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(
    pipeline: Any, captions: list[str], seed: int, guidance: float, steps: int = STEPS
) -> np.ndarray:
    """Returns images (N, 3, 32, 32) in [0, 1] that a pipeline makes of captions."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    length = 16 if "Flux" in type(pipeline).__name__ else 1
    outs = []
    for start in range(0, len(captions), 64):
        outs.append(
            pipeline(
                captions[start : start + 64],
                height=32,
                width=32,
                num_inference_steps=steps,
                guidance_scale=guidance,
                max_sequence_length=length,
                generator=generator,
                output_type="np",
            ).images
        )
    return np.concatenate(outs).transpose(0, 3, 1, 2)


def record(metric: str, value: float, seed: int, n: int, **more: Any) -> dict[str, Any]:
    """Returns one record; the standard error is that of a share."""
    stderr = math.sqrt(max(value * (1 - value), 0.0) / n) if 0 <= value <= 1 else None
    found = {
        "metric": metric,
        "value": round(value, 5),
        "stderr": stderr,
        "n": n,
        "seed": seed,
        **more,
    }
    if metric in GATES:
        found |= {"gate": GATES[metric], "passed": value >= GATES[metric]}
    return found


def vae_records(seed: int, n: int) -> list[dict[str, Any]]:
    """Returns the VAE's records (the copy in weights/sd3)."""
    from stitchvm.world.train.latents import load_vae
    from stitchvm.world.train.vae import vae_figures

    return [record(k, v, seed, n) for k, v in vae_figures(load_vae(), n, seed).items()]


def clip_records(seed: int, n: int) -> list[dict[str, Any]]:
    """Returns retrieval on n distinct keys, at most 512."""
    from stitchvm.world.train.clip import load_clip, retrieval_figures

    n = min(n, 512)
    return [
        record(k, v, seed, n) for k, v in retrieval_figures(load_clip().eval(), n, seed).items()
    ]


def aesthetic_records(seed: int, n: int) -> list[dict[str, Any]]:
    """Returns the rank correlation of the aesthetic reward with the true score."""
    import open_clip
    import torch

    from stitchvm.world.render import render
    from stitchvm.world.scenes import sample_scenes
    from stitchvm.world.scores import aesthetic_score
    from stitchvm.world.train.aesthetic import Head, spearman
    from stitchvm.world.train.clip import normalise
    from stitchvm.world.train.common import weights_folder

    folder = weights_folder() / "aesthetic"
    clip, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    head = Head()
    head.load_state_dict(torch.load(folder / "aesthetic.pth", weights_only=True))
    scenes = sample_scenes("test", n, [seed, 96])
    with torch.no_grad():
        image = clip.eval().encode_image(normalise(torch.from_numpy(render(scenes))))
        scores = head(torch.nn.functional.normalize(image, dim=-1)).numpy()
    truth = np.array([aesthetic_score(s) for s in scenes])
    return [record("aesthetic/srcc", spearman(scores, truth), seed, n)]


def hps_records(seed: int, n: int) -> list[dict[str, Any]]:
    """Returns the pair accuracy of the preference reward on n test groups of four images."""
    import torch

    from stitchvm.world.train.clip import build_clip
    from stitchvm.world.train.common import weights_folder
    from stitchvm.world.train.hps import pair_accuracy

    model = build_clip()
    state = torch.load(weights_folder() / "hps" / "hps.pt", weights_only=True)["state_dict"]
    model.load_state_dict({k: v.float() for k, v in state.items()})
    groups = n // 2
    return [
        record("hps/pair_accuracy", pair_accuracy(model.eval(), groups, seed), seed, groups * 6)
    ]


def sample_records(name: str, seed: int, n: int) -> list[dict[str, Any]]:
    """Returns the checker's verdicts on samples of a generator."""
    from stitchvm.world.checker import check_batch, pass_rate
    from stitchvm.world.scenes import sample_scenes

    scenes = sample_scenes("test", n, [seed, 97])
    images = draw(load_pipeline(name), [s.caption for s in scenes], seed, GUIDANCE[name])
    results = check_batch(images, scenes)
    more = {"guidance": GUIDANCE[name], "steps": STEPS}
    pairs = [r for r, s in zip(results, scenes, strict=True) if s.relation is not None]
    found = [
        record(f"{name}/whole", pass_rate(results), seed, n, **more),
        record(f"{name}/whole_pairs", pass_rate(pairs), seed, len(pairs), **more),
    ]
    if seed == 1 and name != "flux":  # how much classifier-free guidance does
        images = draw(load_pipeline(name), [s.caption for s in scenes], seed, 1.0)
        plain = pass_rate(check_batch(images, scenes))
        metric = f"{name}/whole_without_guidance"
        found.append(record(metric, plain, seed, n, guidance=1.0, steps=STEPS))
    for attribute in results[0].attributes:
        value = float(np.mean([r.attributes[attribute] for r in results]))
        found.append(record(f"{name}/{attribute}", value, seed, n, **more))
    return found


PARTS: dict[str, Callable[[int, int], list[dict[str, Any]]]] = {
    "vae": vae_records,
    "clip": clip_records,
    "aesthetic": aesthetic_records,
    "hps": hps_records,
    "sd3": lambda seed, n: sample_records("sd3", seed, n),
    "sd3_large": lambda seed, n: sample_records("sd3_large", seed, n),
    "flux": lambda seed, n: sample_records("flux", seed, n),
}


def training_records() -> list[dict[str, Any]]:
    """Returns what every stage measured of itself while it was trained, from the states on this machine."""
    import torch

    from stitchvm.world.train.common import runs_folder

    found = []
    for path in sorted(runs_folder().glob("*/state.pt")):
        history = torch.load(path, map_location="cpu", weights_only=True)["history"]
        for line in history:
            figures = {k: v for k, v in line.items() if k not in ("step", "seconds")}
            for metric, value in figures.items():
                more = {"step": line["step"], "training_seconds": line["seconds"]}
                found.append(
                    {"method": path.parent.name, "metric": metric, "value": value, **more}
                )
    return found


def main() -> None:
    """Measures, prints and writes gates.json and, where there are training states, training.json."""
    parser = argparse.ArgumentParser(prog="python -m stitchvm.world.gates", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--n", type=int, default=512, help="scenes per seed")
    parser.add_argument("--samples", type=int, default=256, help="generated images per seed")
    parser.add_argument("--output", type=Path, default=Path("results/world/gates.json"))
    arguments = parser.parse_args()

    from stitchvm.world.train.common import folder_hash, weights_folder

    kept = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    records = [
        r for r in kept.get("records", []) if r["metric"].split("/")[0] not in arguments.parts
    ]
    earlier = str(kept["command"]) if records else None
    for part in arguments.parts:
        place = weights_folder() / {"vae": "sd3/vae"}.get(part, part)
        if not place.exists():
            print(f"{part}: no {place}; run `python -m stitchvm.world.train --stage {part}`")
            continue
        for seed in range(1, arguments.seeds + 1):
            begun = time.monotonic()
            n = arguments.samples if part in GUIDANCE else arguments.n
            found = PARTS[part](seed, n)
            for r in found:
                r["seconds"] = round(time.monotonic() - begun, 1)
                r["weights_sha256"] = folder_hash(place)
                verdict = (
                    "" if "gate" not in r else ("  passed" if r["passed"] else "  NOT PASSED")
                )
                print(
                    f"{r['metric']:28s} seed {seed}  {r['value']:.4f}  n {r['n']}{verdict}",
                    flush=True,
                )
            records += found
    command = " ".join(["python -m stitchvm.world.gates", *sys.argv[1:]])
    if earlier is not None and earlier != command:  # other parts were kept
        command = f"{earlier}; {command}"
    write_results(arguments.output, records, command=command, overwrite=True)
    history = training_records()
    if history:
        path = arguments.output.with_name("training.json")
        write_results(path, history, command="python -m stitchvm.world.train", overwrite=True)


if __name__ == "__main__":
    main()
