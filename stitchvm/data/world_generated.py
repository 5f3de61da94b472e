"""Images that the world's generator made of the captions of "train", for distillation: the part that HPDv2 plays.

The paper distils on AVA (photographs) and HPDv2, whose images were made by diffusion models. A value is asked about
what a *generator's* latent will become; a value model that has only seen faithful drawings does not know how the reward
tells a generator's slips apart. Images are made once, a few hundredths of a second for each step, and kept.

Sample n is fixed by (seed, n), sampled by the flow's ODE or SDE in few or many steps, by turns.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stitchvm.hub import cache_folder

CHUNK = 64
STEPS = (16, 28)
NU = ("ode", "linear_sde")


def generated_images(
    count: int, seed: int = 0, folder: str | Path | None = None, path: str = "world:sd3"
) -> NDArray[np.uint8]:
    """Returns images with shape (count, 3, 32, 32), made first where they are not there yet; goes on if interrupted.

    Arguments:
        count: How many; rounded up to whole chunks of 64 when they are made.
        seed: Fixes them.
        folder: Where they are kept; the library's cache folder by default.
        path: The generator.
    """
    root = Path(folder) if folder is not None else cache_folder() / "world_generated"
    root = root / f"{path.replace(':', '_').replace('/', '_')}_seed{seed}"
    root.mkdir(parents=True, exist_ok=True)
    files = [root / f"{chunk:05d}.npy" for chunk in range(-(-count // CHUNK))]
    missing = [number for number, file in enumerate(files) if not file.is_file()]
    if missing:
        _make(missing, files, seed, path)
    return np.concatenate([np.load(file) for file in files])[:count]


def _make(chunks: list[int], files: list[Path], seed: int, path: str) -> None:
    import torch

    from stitchvm.data.world_prompts import world_captions
    from stitchvm.generator import Generator
    from stitchvm.samplers.plain import PlainSampler
    from stitchvm.world.scenes import keys

    generator = Generator(path, text_tokens=1, guidance_scale=4.5)
    captions = world_captions("train", sum(len(part) for part in keys("train")), seed)
    for chunk in chunks:
        numbers = range(chunk * CHUNK, (chunk + 1) * CHUNK)
        prompts = [captions[n % len(captions)] for n in numbers]
        sampler = PlainSampler(num_steps=STEPS[chunk % 2], nu=NU[chunk // 2 % 2])
        with torch.no_grad():
            samples = sampler(generator, prompts, seeds=[(seed << 32) + n for n in numbers])
            pixels = generator.vae.decode(samples.latents, clamp=True)
        array = (255 * pixels).round().to(torch.uint8).numpy()
        part = files[chunk].with_suffix(f".{os.getpid()}.npy")
        np.save(part, array)
        os.replace(part, files[chunk])
        print(f"generated images: {chunk + 1} of {len(files)} chunks of {CHUNK}", flush=True)


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(generated_images(arguments.count, arguments.seed).shape)
