"""Stage 2: distils a frozen reward on clean images into a stitched value model on noisy latents.

Hooks only. The mathematics is in `objectives.distill` (Eq. 78, 79), the stitch point comes from `search` (Eq. 7).
For one image the data, the VAE and the teacher are paid once; `noise_levels` students at different t share them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from stitchvm.backbones.base import Backbone
from stitchvm.compilation import compile_forward, require_compiler
from stitchvm.data.module import DataModule
from stitchvm.modules.checkpoint import LeanCheckpoint
from stitchvm.modules.learning_rate import DECAYS, check_decay, rates, total_steps
from stitchvm.modules.sharding import full_state, shard_value_model
from stitchvm.modules.stage_one import SEARCH_FILE, ClosedFormStart, StageOne, textless
from stitchvm.modules.throughput import ImagesPerSecond
from stitchvm.objectives.distill import aesthetic_distillation, representation_distillation
from stitchvm.path import FlowPath
from stitchvm.randomness import keyed_normal, keyed_uniform
from stitchvm.rewards.base import Embedding, Reward
from stitchvm.schedule import CenterBiased, NoiseLevelLaw
from stitchvm.search import SearchResult
from stitchvm.vae import VAE
from stitchvm.value_model import StitchedValueModel

__all__ = ["StitchDistillation"]

BANDS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


class StitchDistillation(LeanCheckpoint):
    """Distillation of a stitched value model (Section 3, Appendix D.1).

    Arguments:
        backbone: Makes the frozen diffusion backbone; called with `max_depth` when the stitch point is known.
        reward: Makes the frozen reward, the teacher.
        vae: Makes the VAE that turns images into clean latents.
        stitch_point: The pair [i, j]; if None, `search.json` of the run folder or else stage 1 decides.
        objective: "representation" (Eq. 78) or "aesthetic" (Eq. 79).
        lambda_tok: The weight of the token term.
        lambda_emb: The weight of the embedding term (Eq. 79 only).
        lambda_sc: The weight of the score term (Eq. 79 only).
        noise_law: The law of the training noise levels; the centre-biased one if None.
        noise_levels: How many noise levels each image is seen at per step.
        lr: The learning rate of the reward's tail.
        stitch_lr_factor: The stitching layer's learning rate relative to `lr`.
        weight_decay: AdamW's weight decay.
        betas: AdamW's moment decays.
        warmup_steps: Steps of linear warm-up from 0.
        decay: What follows: "none" (the paper's constant rate) or "linear" to 0 at the end of training.
        fused: Whether to use the fused AdamW kernel, as the paper does; None leaves it to torch, which does not.
        compile: Whether, or with which backend of `torch.compile`, VAE, teacher, backbone and tail are compiled.
        search_js: The reward blocks j of stage 1.
        search_criterion: "feature" (the paper's) or "embedding".
        num_probes: The images stage 1 fits.
        num_held_out: The images stage 1 measures on.
        num_end_probes: The held-out images of the "embedding" criterion.
        num_end_depths: The depths it is measured for, for each j those with the lowest loss; all if null.
        latent_cache: A folder for the training images' latents: the VAE then runs once per image, not once
            per epoch. It is made where it is missing and refused where it is of other data.
        seed: Seeds noise, noise levels and stage 1.
    """

    run_config: str | None = None  # set by the command line, for search.json
    pretrained_prefixes = ("teacher.", "vae.", "value_model.backbone.")

    def __init__(
        self,
        backbone: Callable[[], Backbone],
        reward: Callable[[], Reward],
        vae: Callable[[], VAE],
        stitch_point: list[int] | None = None,
        objective: str = "representation",
        lambda_tok: float = 1.0,
        lambda_emb: float = 1.0,
        lambda_sc: float = 1.0,
        noise_law: NoiseLevelLaw | None = None,
        noise_levels: int = 1,
        lr: float = 1e-5,
        stitch_lr_factor: float = 5.0,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        warmup_steps: int = 100,
        decay: str = "none",
        fused: bool | None = None,
        compile: bool | str = False,
        search_js: list[int] | None = None,
        search_criterion: str = "feature",
        num_probes: int = 200,
        num_held_out: int = 200,
        num_end_probes: int = 32,
        num_end_depths: int | None = 2,
        latent_cache: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if objective not in ("representation", "aesthetic"):
            raise ValueError(
                f"objective {objective!r}: expected 'representation' (Eq. 78) or 'aesthetic' (Eq. 79)"
            )
        if decay not in DECAYS:
            raise ValueError(f"decay {decay!r}: expected 'none' or 'linear'")
        if noise_levels < 1:
            raise ValueError(f"noise_levels = {noise_levels}: expected at least 1")
        if stitch_point is not None and len(stitch_point) != 2:
            raise ValueError(f"stitch_point {stitch_point}: expected [i, j], such as [4, 1]")
        if noise_law is not None and noise_law.stratified:
            raise ValueError(
                "noise_law is stratified over a batch, but an image's levels must not depend on its batch: leave "
                "stratified out; the noise_levels of one image are always stratified"
            )
        least = {
            "lr": lr,
            "stitch_lr_factor": stitch_lr_factor,
            "weight_decay": weight_decay,
            "warmup_steps": warmup_steps,
            "lambda_tok": lambda_tok,
            "lambda_emb": lambda_emb,
            "lambda_sc": lambda_sc,
        }
        for name, number in least.items():
            if not 0 <= number < float("inf"):
                raise ValueError(f"{name} = {number}: expected a finite number of at least 0")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas = {list(betas)}: expected two numbers in [0, 1)")
        self.stitch_point: tuple[int, int] | None = (
            (stitch_point[0], stitch_point[1]) if stitch_point is not None else None
        )
        self.objective = objective
        self.lambdas = {"lambda_tok": lambda_tok}
        more = {"lambda_emb": lambda_emb, "lambda_sc": lambda_sc}
        if objective == "aesthetic":
            self.lambdas |= more
        for name, value in more.items():
            if name not in self.lambdas and value != 1:
                raise ValueError(
                    f"{name} = {value} is a weight of Eq. (79), but objective is 'representation' (Eq. 78): leave it "
                    "out, or set objective to 'aesthetic'"
                )
        self.noise_law = noise_law if noise_law is not None else CenterBiased()
        self.noise_levels = noise_levels
        self.lr, self.stitch_lr_factor = lr, stitch_lr_factor
        self.weight_decay, self.betas, self.fused = weight_decay, betas, fused
        self.warmup_steps, self.decay, self.compile_networks = warmup_steps, decay, compile
        self.stage_one = StageOne(
            backbone,
            partial(textless, reward) if objective == "aesthetic" else reward,
            vae,
            js=tuple(search_js) if search_js is not None else (1, 2, 3, 4),
            criterion=search_criterion,
            num_probes=num_probes,
            num_held_out=num_held_out,
            num_end_probes=num_end_probes,
            num_end_depths=num_end_depths,
            seed=seed,
        )
        self.latent_cache, self.seed = latent_cache, seed
        self.value_model: StitchedValueModel | None = None
        self._start: ClosedFormStart | None = None
        self._trained = False

    # -- building ------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Decides the stitch point and fits the closed-form map, before any weight is made."""
        if self.value_model is not None:
            return
        require_compiler(self.compile_networks)
        if stage != "fit":  # `validate` of a run whose stitch point stage 1 chose
            found = self._run_folder() / SEARCH_FILE
            if self.stitch_point is None and found.is_file():
                self.stitch_point = self.stage_one.read(found)
            return
        check_decay(self.trainer, self.decay)
        self.stage_one.check_resumed(self._config(), self.stitch_point, self._run_folder())
        start = None
        if self.trainer.is_global_zero:
            start = self.stage_one.start(
                self._datamodule,
                self.trainer.strategy.root_device,
                self._run_folder(),
                self.stitch_point,
                self._config(),
            )
        start = self.trainer.strategy.broadcast(start, src=0)
        assert start is not None
        self.stitch_point, self._start = start.stitch_point, start

    def run_search(self) -> SearchResult:
        """Runs stage 1 over all stitch points on the trainer's data module."""
        return self.stage_one.run(self._datamodule, self.trainer.strategy.root_device)

    def save_search(self, result: SearchResult) -> Path:
        """Writes search.json and heat maps into the run folder."""
        return self.stage_one.save(result, self._run_folder(), self._config())

    def _config(self) -> Any:
        import yaml

        return None if self.run_config is None else yaml.safe_load(self.run_config)

    @property
    def _datamodule(self) -> LightningDataModule | None:
        return self.trainer.datamodule

    def on_fit_start(self) -> None:
        """Makes or completes the cache of latents, every device a part of it."""
        if self.latent_cache is not None:
            datamodule = cast(DataModule, self._datamodule)
            datamodule.cache_latents(self.vae, self.latent_cache, self.device)
            # a loader that was made to count the steps of `decay` knows of no latents
            self.trainer.fit_loop._combined_loader = None

    def configure_model(self) -> None:
        """Builds the networks once; the backbone is loaded up to block i only."""
        if self.value_model is not None:
            return
        if self.stitch_point is None:
            raise ValueError(
                "no stitch point: set model.stitch_point to [i, j], or run `stitchvm search` or `fit` first"
            )
        backbone, self.teacher, self.vae = self.stage_one.networks(self.stitch_point[0])
        model = StitchedValueModel(backbone, self.teacher, self.stitch_point)
        if self._start is not None:
            model.stitch.init_closed_form(self._start.W, self._start.b)
            if model.j > 1:
                model.tail.init_class_token(self._start.class_token)
            self._start = None
        model.tail.float().train()
        self.value_model = model
        self.value_model_config = model.config()  # hashed before it is sharded
        if self.compile_networks:
            compile_forward(self.repeated(model), self.compile_networks)
        if self.device_mesh is not None:
            shard_value_model(model, self.device_mesh["data_parallel"])

    def repeated(self, model: StitchedValueModel) -> list[nn.Module]:
        """Returns what is worth compiling: the blocks of all networks of a step, and the VAE's encoder."""
        blocks = [*getattr(model.backbone, "blocks", []), *getattr(model.tail, "blocks", [])]
        return [*blocks, *self.teacher.repeated(), self.vae.network.encoder]

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW with a larger learning rate on s_ψ and a linear warm-up (Appendix D.1)."""
        assert self.value_model is not None
        parts = (self.value_model.tail, 1.0), (self.value_model.stitch, self.stitch_lr_factor)
        groups = [{"params": list(m.parameters()), "lr": self.lr * factor} for m, factor in parts]
        optimizer = torch.optim.AdamW(
            groups, betas=self.betas, weight_decay=self.weight_decay, fused=self.fused
        )
        schedule = rates(optimizer, self.warmup_steps, total_steps(self._trainer, self.decay))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    # -- steps ---------------------------------------------------------------------------------------

    def losses(self, batch: dict[str, Any], t: Tensor, epoch: int) -> dict[str, Tensor]:
        """Returns the loss terms, each (B K,), for noise levels t with shape (B, K)."""
        assert self.value_model is not None
        pixels = batch["pixels"]
        with torch.no_grad():
            z_0 = (
                batch["latents"].float() if "latents" in batch else self.vae.encode(pixels).float()
            )
            teacher = self.teacher.embed(pixels)
        K = t.shape[1]
        index = batch["index"].tolist()
        keys = [(self.seed, "eps", epoch, n, k) for n in index for k in range(K)]
        eps = keyed_normal(keys, z_0.shape[1:], z_0.device)
        t = t.reshape(-1)
        z_t = FlowPath().interpolate(z_0.repeat_interleave(K, 0), eps, t)
        teacher = Embedding(*(x.repeat_interleave(K, 0) for x in teacher))
        student = self.value_model(z_t, t)
        if self.objective == "representation":
            return representation_distillation(student, teacher, **self.lambdas)
        scores = [self.teacher.score(x.image) for x in (student, teacher)]
        return aesthetic_distillation(student, teacher, scores[0], scores[1], **self.lambdas)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """One step of Eq. (8): noise levels from the law, stratified over an image's levels."""
        K = self.noise_levels
        current: int = self.current_epoch
        epoch = int(batch.get("epoch", current))
        keys = [(self.seed, "t", epoch, n) for n in batch["index"].tolist()]
        q = (keyed_uniform(keys, K) + torch.arange(K)) / K
        t = self.noise_law.quantile(q).float().to(self.device, non_blocking=True)
        terms = self.losses(batch, t, epoch)
        loss = terms["loss"].mean()
        self.log_dict(
            {f"train/{name}": value.detach().mean() for name, value in terms.items()},
            prog_bar=False,
        )
        self.log("loss", loss.detach(), prog_bar=True, logger=False)
        attached = self._trainer is not None
        if (
            attached and (batch_idx + 1) % self.trainer.log_every_n_steps == 0
        ):  # it waits for the device
            self._log_bands("train", terms["loss"].detach(), t.reshape(-1))
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """The same losses at the middle of each noise band, with noise fixed per image."""
        assert self.value_model is not None
        middles = [(a + b) / 2 for a, b in pairwise(BANDS)]
        B = len(batch["pixels"])
        t = torch.tensor(middles, device=self.device).expand(B, -1)
        terms = self.losses(batch, t, epoch=-1)
        for name, value in terms.items():
            self.log(
                f"val/{name}", value.mean(), batch_size=B, sync_dist=True, prog_bar=name == "loss"
            )
        self._log_bands("val", terms["loss"], t.reshape(-1), batch_size=B, sync_dist=True)

    def _log_bands(self, stage: str, loss: Tensor, t: Tensor, **kwargs: Any) -> None:
        """Logs the mean loss per noise band; a band without samples logs nothing."""
        edges = torch.tensor(BANDS[1:-1], device=t.device)
        band = torch.bucketize(t, edges)
        for k, (low, high) in enumerate(pairwise(BANDS)):
            inside = band == k
            if stage == "val" or bool(inside.any()):
                self.log(f"{stage}/loss_sigma_{low:g}-{high:g}", loss[inside].mean(), **kwargs)

    # -- what a user sees and keeps ------------------------------------------------------------------

    def configure_callbacks(self) -> list[Callback]:
        """Adds images/s to the progress bar."""
        return [*super().configure_callbacks(), ImagesPerSecond()]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the stitch point, and which backbone and reward it is in."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["stitch_point"] = list(self.stitch_point or ())
        checkpoint["fingerprints"] = self._fingerprints()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Checks that the checkpoint is of this stitch point, backbone and reward."""
        point = tuple(checkpoint.get("stitch_point", ()))
        if not point:
            raise ValueError(
                "the checkpoint is of no distillation: choose another, or start without --ckpt_path"
            )
        if point != self.stitch_point:
            raise ValueError(
                f"the checkpoint was made at (i, j) = {point}, this run is at {self.stitch_point}: set "
                f"model.stitch_point to {list(point)}"
            )
        own = self._fingerprints()
        saved = checkpoint.get("fingerprints", own)  # the first versions' checkpoints have none
        if differing := [name for name in own if saved[name] != own[name]]:
            raise ValueError(
                f"the checkpoint is of another {' and '.join(differing)} than this run's "
                f"{' and '.join(self._names()[name] for name in differing)}: use the config.yaml beside it, or choose "
                "another folder with --trainer.default_root_dir and start without --ckpt_path"
            )
        super().on_load_checkpoint(checkpoint)
        self._trained = True

    def _fingerprints(self) -> dict[str, str]:
        """Which weights the stitch is between, in plain data; taken before they were sharded."""
        return {
            name: self.value_model_config[name]["fingerprint"] for name in ("backbone", "reward")
        }

    def _names(self) -> dict[str, str]:
        assert self.value_model is not None
        return {"backbone": self.value_model.backbone.id, "reward": self.teacher.id}

    def on_validation_start(self) -> None:
        """Warns if what is measured is no run's."""
        if self.trainer.state.fn == "validate" and not self._trained:
            rank_zero_warn("without --ckpt_path an untrained stitch is measured")

    def on_train_end(self) -> None:
        """Leaves the value model as a folder that `StitchedValueModel.from_pretrained` reads."""
        assert self.value_model is not None
        self._trained = True
        if self.trainer.fast_dev_run:
            return
        state = full_state(self.value_model)
        if self.trainer.is_global_zero:
            folder = self._run_folder() / "value_model"
            self.value_model.save_pretrained(
                folder, state=state, config=self.value_model_config, overwrite=True
            )
            rank_zero_info(f"value model saved to {folder}")

    def _run_folder(self) -> Path:
        return Path(self.trainer.default_root_dir)
