"""Stage 1 inside a Lightning run: probe images from the data module, `search.json`, the closed-form start."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, device

from stitchvm.backbones.base import Backbone
from stitchvm.backbones.latent import LatentBackbone
from stitchvm.data.module import DataModule
from stitchvm.data.prompts import PromptModule
from stitchvm.results import write_results
from stitchvm.rewards.base import Reward
from stitchvm.search import CRITERIA, SearchResult, search
from stitchvm.vae import VAE, scaling_of

__all__ = ["ClosedFormStart", "StageOne", "read_stitch_point", "textless"]

SEARCH_FILE = "search.json"


@dataclass
class ClosedFormStart:
    """Where a stitched model starts: (i, j), W* (D_r, D_u), b* (D_r,), the mean class token (D_r,)."""

    stitch_point: tuple[int, int]
    W: Tensor
    b: Tensor
    class_token: Tensor


class StageOne:
    """Stage 1 with the settings of a run.

    Arguments:
        backbone: Makes the backbone; called with `max_depth`.
        reward: Makes the reward.
        vae: Makes the VAE.
        js: The reward blocks that are tried.
        criterion: "feature" (the paper's choice) or "embedding".
        num_probes: The images that are fitted.
        num_held_out: The images the losses are measured on.
        num_end_probes: The held-out images of the "embedding" criterion.
        num_end_depths: The depths it is measured for, for each j those with the lowest loss; all if None.
        seed: Seeds noise and noise levels.
    """

    def __init__(
        self,
        backbone: Callable[[], Backbone],
        reward: Callable[[], Reward],
        vae: Callable[[], VAE],
        *,
        js: tuple[int, ...] = (1, 2, 3, 4),
        criterion: str = "feature",
        num_probes: int = 200,
        num_held_out: int = 200,
        num_end_probes: int = 32,
        num_end_depths: int | None = 2,
        seed: int = 0,
    ) -> None:
        if criterion not in CRITERIA:
            raise ValueError(f"search_criterion {criterion!r}: expected one of {sorted(CRITERIA)}")
        if criterion == "embedding" and num_end_probes < 1:
            raise ValueError("search_criterion 'embedding' needs num_end_probes of at least 1")
        if num_probes < 1 or min(num_held_out, num_end_probes) < 0:
            raise ValueError(
                f"num_probes = {num_probes}, num_held_out = {num_held_out}, num_end_probes = {num_end_probes}: "
                "expected at least 1 image to fit (the paper's 200) and at least 0 to measure on"
            )
        self.backbone, self.reward, self.vae = backbone, reward, vae
        self.criterion = criterion
        self.settings: dict[str, Any] = {
            "js": js,
            "num_probes": num_probes,
            "num_held_out": num_held_out,
            "num_end_probes": num_end_probes,
            "num_end_depths": num_end_depths,
            "seed": seed,
        }

    def networks(self, max_depth: int | None) -> tuple[Any, Any, Any]:
        """Returns the backbone up to a depth (whole if None), the reward and the VAE.

        Raises:
            ValueError: If the VAE is another than the backbone's.
        """
        backbone = cast(Callable[..., Backbone], self.backbone)(max_depth=max_depth)
        reward, vae = self.reward(), self.vae()
        settle_latents(backbone, vae)
        return backbone, reward, vae

    def run(
        self,
        datamodule: LightningDataModule | None,
        on: device,
        depths: list[int] | None = None,
        **override: Any,
    ) -> SearchResult:
        """Searches on the first images of the data module's validation loader.

        Raises:
            ValueError: If there is no data module of images, or too few images in it; if losses are to be compared but
                nothing is held out; or if the VAE is another than the backbone's.
        """
        settings = self.settings | override
        if depths is None and settings["num_held_out"] < 1:
            raise ValueError(
                "num_held_out = 0 leaves no image to measure stitch points on: set it to at least 1 (200 by "
                "default), or give the stitch point"
            )
        images = _with_images(datamodule)
        max_depth = max(depths) if depths is not None else None
        backbone, reward, vae = (part.to(on) for part in self.networks(max_depth))
        num_images = settings["num_probes"] + settings["num_held_out"]
        return search(
            _probe_pixels(images, num_images),
            vae.encode,
            backbone,
            reward,
            depths=depths,
            **settings,
        )

    def check_resumed(
        self, config: Any, stitch_point: tuple[int, int] | None, folder: Path
    ) -> None:
        """Raises ValueError if a run goes on and nothing says at which stitch point: a search may find another.

        Arguments:
            config: The run's whole configuration, whose `ckpt_path` it goes on from; or None.
            stitch_point: The point that is given, or None.
            folder: The run's folder, which may hold a search.json.
        """
        found, path = folder / SEARCH_FILE, (config or {}).get("ckpt_path")
        last = folder / "checkpoints" / "last.ckpt"
        goes_on = last.is_file() if path == "last" else path is not None
        if stitch_point is None and goes_on and not found.is_file():
            raise ValueError(
                f"--ckpt_path {path}: nothing says at which stitch point it was made, for there is no {found}: use the "
                "config.yaml of its run, or set model.stitch_point; or choose another folder with "
                "--trainer.default_root_dir and start without --ckpt_path"
            )

    def start(
        self,
        datamodule: LightningDataModule | None,
        on: device,
        folder: Path,
        stitch_point: tuple[int, int] | None,
        config: Any = None,
    ) -> ClosedFormStart:
        """Returns the closed-form start at `stitch_point`, or at the point in `folder`'s search.json, or
        at the one that a search finds now (which is then written into `folder`)."""
        found = folder / SEARCH_FILE
        if stitch_point is None and found.is_file():
            stitch_point = self.read(found)
            _check_networks(found, config)
            rank_zero_info(f"stitch point (i, j) = {stitch_point} from {found}")
        if stitch_point is None:
            rank_zero_info("no stitch point given: stage 1 measures all of them")
            result = self.run(datamodule, on)
            self.save(result, folder, config)
            stitch_point = result.best(self.criterion)
        else:
            i, j = stitch_point
            result = self.run(datamodule, on, [i], js=(j,), num_held_out=0, num_end_probes=0)
        i, j = stitch_point
        W, b = result.closed_form(i, j)
        rank_zero_info(f"stitching after backbone block i = {i}, before reward block j = {j}")
        return ClosedFormStart(
            (i, j), W.float().cpu(), b.float().cpu(), result.class_tokens[j].cpu()
        )

    def read(self, path: Path) -> tuple[int, int]:
        """Returns the stitch point that a search.json has for this run's criterion and reward blocks."""
        return read_stitch_point(path, self.criterion, self.settings["js"])

    def save(self, result: SearchResult, folder: Path, config: Any = None) -> Path:
        """Writes `search.json` and the heat maps of Figure 6; never over an earlier one.

        Raises:
            FileExistsError: If `folder` has a search.json already.
        """
        from stitchvm.plots import heatmap

        path = folder / SEARCH_FILE
        settings = self.settings | {"js": list(self.settings["js"])}
        write_results(
            path,
            result.records,
            config=config,
            extra={
                "stitch_point": list(result.best(self.criterion)),
                "criterion": self.criterion,
                "settings": settings,
                "timing": result.timing,
            },
        )
        heatmap(
            result.records,
            folder / "search.png",
            selected=result.best(self.criterion),
            title=f"stage 1, chosen by the {self.criterion} loss",
        )
        return path


def settle_latents(backbone: Backbone, vae: VAE) -> None:
    """Raises ValueError if the VAE is another than the backbone's; a backbone that knows of none takes note of it."""
    there, here = scaling_of(backbone), (vae.scale, vae.shift)
    if there is None and isinstance(backbone, LatentBackbone):
        backbone.read_latents_of(*here)
    if there not in (None, here):
        raise ValueError(
            f"the latents of {backbone.id} have scale, shift {there}, those of the VAE {vae.id} {here}: another VAE, "
            "whose latents mean something else to the backbone. Set model.vae to that of the backbone's pipeline."
        )


def _with_images(datamodule: LightningDataModule | None) -> DataModule:
    if not isinstance(datamodule, DataModule) or isinstance(datamodule, PromptModule):
        raise ValueError(
            f"stage 1 takes its probe images from a stitchvm.data DataModule, got {type(datamodule).__name__}: "
            "name one under data:, such as stitchvm.data.images.ImageFolder"
        )
    return datamodule


def _probe_pixels(datamodule: DataModule, num_images: int) -> Iterator[Tensor]:
    for batch in datamodule.probe_dataloader(num_images):
        yield batch["pixels"]


def _check_networks(path: Path, config: Any) -> None:
    """Raises ValueError if a search.json is of another backbone or reward than a run's configuration names."""
    measured = json.loads(path.read_text()).get("config")
    for part in ("backbone", "reward"):
        there, here = _named(measured, part), _named(config, part)
        if there is not None and here is not None and there != here:
            raise ValueError(
                f"{path} was measured for the {part} {' '.join(there)}, this run has {' '.join(here)}: choose another "
                "folder with --trainer.default_root_dir, move the file away to search again, or set model.stitch_point"
            )


def _named(config: Any, part: str) -> list[str] | None:
    """Returns the class and the weights that a run's configuration names for a network; None if it does not."""
    try:
        network = config["model"]["init_args"][part]
        names = network["init_args"]
        return [
            network["class_path"],
            *(str(names[key]) for key in ("path", "model") if key in names),
        ]
    except (KeyError, TypeError):
        return None


def read_stitch_point(
    path: Path, criterion: str | None = None, js: Sequence[int] | None = None
) -> tuple[int, int]:
    """Returns (i*, j*) of a search.json: that of its own criterion, unless another one is asked for.

    Arguments:
        path: The file.
        criterion: "feature" or "embedding"; the file's own by default.
        js: The reward blocks j that may be chosen; all that were measured by default.

    Raises:
        ValueError: If the file is not what `stitchvm search` writes, or has not measured what is asked for.
    """
    try:
        content = json.loads(path.read_text())
        i, j = content["stitch_point"]
        own = content.get("criterion", criterion)
        records = content.get("records", [])
        if criterion in (None, own) and (js is None or j in js):
            return int(i), int(j)
        records = [r for r in records if js is None or r["j"] in js]
        chosen = criterion or own
        measured = any(r[CRITERIA[chosen]] is not None for r in records)
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{path} is not what `stitchvm search` writes ({error})") from error
    if not measured:
        raise ValueError(
            f"{path} has no {chosen} loss of a reward block j in {js or 'any'}: set model.stitch_point, or "
            "model.search_criterion and search_js as they were, or move the file away and search again"
        )
    return SearchResult(records, {}, {}, {}, {}).best(chosen)


def textless(make: Callable[[], Reward]) -> Reward:
    """Makes the teacher of Eq. (79), whose score the objective takes of an image alone."""
    reward = make()
    if reward.uses_text:
        raise ValueError(
            f"objective 'aesthetic' (Eq. 79) needs a reward that reads no text, got {reward.id}: use "
            "stitchvm.rewards.aesthetic.AestheticReward, or objective 'representation' (Eq. 78)"
        )
    return reward
