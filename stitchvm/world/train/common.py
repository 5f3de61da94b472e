"""Shared machinery of the world's trainings: seeded by step, checkpointed atomically, resumed exactly.

Every random number of step s is drawn from streams seeded with (seed, s). A state is therefore just the step
and what the optimiser changed, and a run that was killed goes on as if nothing had happened.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

WEIGHTS = Path(__file__).resolve().parent.parent / "weights"


def runs_folder() -> Path:
    """Returns where states, caches and logs live: $STITCHVM_WORLD_RUNS or ~/.cache/stitchvm/world."""
    return Path(os.environ.get("STITCHVM_WORLD_RUNS", "~/.cache/stitchvm/world")).expanduser()


def weights_folder() -> Path:
    """Returns where exports go: $STITCHVM_WORLD_WEIGHTS or the package's own stitchvm/world/weights."""
    return Path(os.environ.get("STITCHVM_WORLD_WEIGHTS", str(WEIGHTS))).expanduser()


def step_rng(seed: int, step: int, stream: int = 0) -> np.random.Generator:
    """Returns the numpy generator of a step."""
    return np.random.default_rng([seed, stream, step])


def step_generator(seed: int, step: int, stream: int = 0) -> torch.Generator:
    """Returns the torch generator of a step."""
    number = int(np.random.default_rng([seed, 1000 + stream, step]).integers(2**62))
    return torch.Generator().manual_seed(number)


def warmup_cosine(step: int, warmup: int, total: int, floor: float = 0.05) -> float:
    """Returns the learning-rate factor: linear warm-up, constant, cosine over the last 40 % of `total` steps."""
    rise = min(1.0, (step + 1) / max(1, warmup))
    start = 0.6 * total
    share = min(1.0, max(0.0, (step - start) / max(1.0, total - start)))
    return rise * (floor + (1 - floor) * 0.5 * (1 + float(np.cos(np.pi * share))))


class Stage:
    """One network's training: subclasses build `nets` and `optimizer` and define loss, evaluate and export."""

    name = "stage"
    total_steps = 1000
    warmup = 100
    ema_decay = 0.0
    clip_norm = 1.0

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.step = 0
        self.seconds = 0.0
        self.nets = nn.ModuleDict()
        self.optimizers: list[torch.optim.Optimizer] = []
        self.ema: dict[str, Tensor] = {}
        self.history: list[dict[str, Any]] = []

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """Returns the training loss of a step and what to log."""
        raise TypeError(f"{type(self).__name__} defines no loss")

    def evaluate(self) -> dict[str, float]:
        """Returns figures on held-out scenes, measured with the averaged weights."""
        return {}

    def export(self, folder: Path) -> None:
        """Writes what the package ships, with the averaged weights in place."""

    def start_ema(self) -> None:
        """Begins the running average of everything that is trained."""
        self.ema = {k: v.detach().clone() for k, v in self._trained().items()}

    def _trained(self) -> dict[str, Tensor]:
        return {k: p for k, p in self.nets.named_parameters() if p.requires_grad}

    def update(self) -> dict[str, float]:
        """Takes one optimiser step and returns its log."""
        factor = warmup_cosine(self.step, self.warmup, self.total_steps)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
            optimizer.zero_grad(set_to_none=True)
        loss, log = self.loss(self.step)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.nets.parameters(), self.clip_norm)
        if torch.isfinite(norm):
            for optimizer in self.optimizers:
                optimizer.step()
        self.step += 1
        if self.ema:
            decay = min(self.ema_decay, (1 + self.step) / (10 + self.step))
            trained = self._trained()
            torch._foreach_lerp_(
                [self.ema[k] for k in trained], [p.detach() for p in trained.values()], 1 - decay
            )
        return {"loss": float(loss.detach()), **log}

    def averaged(self) -> _Averaged:
        """Returns a context in which the nets hold their running average and are in eval mode."""
        return _Averaged(self)

    def state(self) -> dict[str, Any]:
        """Returns everything that a resumed run needs."""
        return {
            "step": self.step,
            "seconds": self.seconds,
            "nets": self.nets.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "ema": self.ema,
            "history": self.history,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Restores `state()`."""
        self.step, self.seconds = state["step"], state["seconds"]
        self.nets.load_state_dict(state["nets"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.ema = state["ema"]
        self.history = state["history"]


class _Averaged:
    def __init__(self, stage: Stage) -> None:
        self.stage = stage

    def __enter__(self) -> None:
        trained = self.stage._trained()
        self.kept = {k: p.detach().clone() for k, p in trained.items()}
        self.stage.nets.eval()
        with torch.no_grad():
            for k, value in self.stage.ema.items():
                trained[k].copy_(value)

    def __exit__(self, *_: object) -> None:
        trained = self.stage._trained()
        with torch.no_grad():
            for k, value in self.kept.items():
                trained[k].copy_(value)
        self.stage.nets.train()


def save_atomic(state: dict[str, Any], path: Path) -> None:
    """Writes a state beside its place, then moves it there, so that a kill leaves the old one whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + f".{os.getpid()}.part")
    torch.save(state, temporary)
    os.replace(temporary, path)


def replace_folder(write: Any, folder: Path) -> None:
    """Calls write(temporary folder), then puts that folder in the place of `folder`."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=runs_folder()))
    write(temporary)
    temporary.chmod(0o755)
    for config in temporary.rglob("config.json"):  # where it was loaded from says nothing to users
        content = json.loads(config.read_text())
        if content.pop("_name_or_path", None) is not None:
            config.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    for file in temporary.rglob("*"):
        file.chmod(0o755 if file.is_dir() else 0o644)
    staged = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(staged, ignore_errors=True)
    shutil.copytree(temporary, staged)
    shutil.rmtree(temporary)
    if folder.name != "sd3":
        share(staged, folder.parent / "sd3")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(staged, folder)


def share(folder: Path, other: Path) -> None:
    """Replaces weights in a new folder that are those of its neighbour `other` by links: the generators share a VAE."""
    for file in folder.rglob("*.safetensors"):
        twin = other / file.relative_to(folder)
        if twin.is_file() and twin.read_bytes() == file.read_bytes():
            file.unlink()
            file.symlink_to(os.path.relpath(twin, file.parent))


def run(
    stage: Stage,
    minutes: float = 1e9,
    max_steps: int | None = None,
    save_every: float = 180.0,
    evaluate_every: float = 600.0,
    log_every: int = 100,
    folder: Path | None = None,
) -> Stage:
    """Trains a stage until its total steps, `minutes` of wall-clock or `max_steps`, resuming a saved state.

    Saves every `save_every` seconds, evaluates and exports every `evaluate_every` seconds and at the end.
    """
    folder = (folder or runs_folder()) / stage.name
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "state.pt"
    if path.exists():
        stage.load(torch.load(path, map_location="cpu", weights_only=True))
    stop: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
    begun = tick = saved = evaluated = time.monotonic()
    last = stage.step
    sums: dict[str, float] = {}
    stage.nets.train()

    def measure() -> None:
        with stage.averaged(), torch.no_grad():
            figures = stage.evaluate()
            stage.export(weights_folder())
        line = {"step": stage.step, "seconds": round(stage.seconds), **figures}
        stage.history.append(copy.deepcopy(line))
        print("EVAL", json.dumps(line), flush=True)
        save_atomic(stage.state(), path)

    while stage.step < min(stage.total_steps, max_steps or stage.total_steps):
        for k, v in stage.update().items():
            sums[k] = sums.get(k, 0.0) + v
        now = time.monotonic()
        if stage.step % log_every == 0:
            n = stage.step - last
            rate = n / (now - tick)
            stage.seconds += now - tick
            figures = {k: round(v / n, 4) for k, v in sums.items()}
            print(f"{stage.name} step {stage.step} {rate:.2f} steps/s {figures}", flush=True)
            last, sums, tick = stage.step, {}, now
        if now - saved > save_every:
            save_atomic(stage.state(), path)
            saved = now
        if now - evaluated > evaluate_every:
            stage.seconds += now - tick
            measure()
            evaluated = tick = time.monotonic()
            last, sums = stage.step, {}
        if stop:  # SIGTERM: leave at once; nothing is lost
            stage.seconds += now - tick
            save_atomic(stage.state(), path)
            return stage
        if now - begun > 60 * minutes:
            break
    stage.seconds += time.monotonic() - tick
    measure()
    return stage


def folder_hash(folder: Path) -> str:
    """Returns the SHA-256 of a folder's file names and contents."""
    digest = hashlib.sha256()
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(str(file.relative_to(folder)).encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()
