"""A diffusion model that generates: its velocity under a prompt, its VAE, its text encoders.

    u_t(z_t) = u(∅) + g·(u(prompt) − u(∅))          classifier-free guidance, g > 1

The step loop belongs to the samplers. With the pipeline's own σ grid, an Euler loop over `velocity` gives the latents
of `StableDiffusion3Pipeline` and `FluxPipeline` bit for bit (CPU, float32).
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from stitchvm.backbones.base import PrefixState
from stitchvm.backbones.dense_gradients import dense_gradients
from stitchvm.backbones.finetuned import load_transformer
from stitchvm.backbones.flux import FluxBackbone, call_flux
from stitchvm.backbones.loading import block_lists, parse_dtype, read_model_class
from stitchvm.backbones.network import NetworkBackbone
from stitchvm.backbones.null_text import null_condition
from stitchvm.backbones.pipeline_text import PipelineEncoders, read_pipeline
from stitchvm.backbones.prompts import PromptMemory
from stitchvm.backbones.sd3 import SD3Backbone, call_sd3
from stitchvm.backbones.text import DEFAULT_TOKENS, FAMILIES, Condition, TextEncoders
from stitchvm.compilation import compile_forward, require_compiler
from stitchvm.hub import resolve
from stitchvm.schedule import scheduler_sigmas
from stitchvm.vae import VAE
from stitchvm.value_model import used_weights

_WEIGHTS = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    "transformer/config.json",
    *(f"transformer/diffusion_pytorch_model{x}.safetensors" for x in ("", "-*")),
    "transformer/diffusion_pytorch_model.safetensors.index.json",
]


class Generator(nn.Module):
    """An SD3- or FLUX-class generator, frozen until adapters are added to `transformer`.

    `Generator(path)` loads one; `Generator.from_pipeline(pipe)` takes a diffusers pipeline that is in memory.

    Arguments:
        path: A pipeline folder, a hub id, or "world:sd3".
        dtype: The dtype of transformer and text encoders: "float32", "bfloat16" or "float16".
        guidance_scale: The default g. SD3 and FLUX without guidance embedding: classifier-free guidance, off at 1.
            FLUX.1-dev: the scale the distilled model is told (the pipeline's is 3.5), one network call.
        text_tokens: The T5 length; the pipeline's by default (256 for SD3, 512 for FLUX).
        prompt_cache: A folder where the conditions of prompts are kept; in memory only if None.
        prompts_in_memory: How many conditions are kept in (CPU) memory; the oldest go first.
        vae_dtype: The VAE's dtype.
        gradient_checkpointing: Whether blocks are run again in the backward pass.
        revision: The hub revision.
        compile: Whether to compile the transformer's blocks and the VAE's decoder with `torch.compile`, or the name
            of a backend to do it with. On a GPU a step takes about 0.6 of the time, once it is compiled.
        finetuned: What a fine-tuning left, a folder or hub id: LoRA weights, or a `transformer/` in place of its own.
            Stitched values on the same transformer see it as it was; Tweedie and Monte Carlo values ask what samples.

    Attributes:
        id: What it was loaded from; `finetuned` stands beside it.
        family: "sd3" or "flux".
        vae: The VAE.
        transformer: The diffusers transformer.

    Raises:
        FileNotFoundError: If the model cannot be found.
        ValueError: If it is of neither family, or there is nothing to compile with.
    """

    def __init__(
        self,
        path: str,
        dtype: str = "float32",
        guidance_scale: float = 1.0,
        text_tokens: int | None = None,
        prompt_cache: str | None = None,
        prompts_in_memory: int = 256,
        vae_dtype: str = "float32",
        gradient_checkpointing: bool = False,
        revision: str | None = None,
        compile: bool | str = False,
        finetuned: str | None = None,
    ) -> None:
        super().__init__()
        require_compiler(compile)
        torch_dtype = parse_dtype(dtype)
        folder = resolve(path, allow_patterns=_WEIGHTS, revision=revision)
        class_name = read_model_class(path, folder)
        if class_name not in FAMILIES:
            raise ValueError(
                f"'{path}' holds a {class_name}, expected one of {', '.join(FAMILIES)}: other "
                "families need a file of their own beside this one"
            )
        self.id, self.family, self.finetuned = str(path), FAMILIES[class_name], finetuned
        self.guidance_scale = guidance_scale
        self.vae = VAE(path, dtype=vae_dtype, revision=revision)
        self.transformer: Any = load_transformer(class_name, folder, torch_dtype, finetuned)
        dense_gradients(self.transformer)
        self.requires_grad_(False)
        self.eval()
        if gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()
        tokens = text_tokens or DEFAULT_TOKENS[self.family]
        encoders = TextEncoders(path, self.family, tokens, torch_dtype, revision)
        self._memory = PromptMemory(encoders, prompts_in_memory, prompt_cache)
        self._folder, self._pipe = folder, None
        if compile:
            self.compile_blocks(compile)

    @classmethod
    def from_pipeline(
        cls,
        pipe: Any,
        guidance_scale: float | None = None,
        text_tokens: int | None = None,
        prompts_in_memory: int = 256,
    ) -> Generator:
        """Returns a generator around a loaded `StableDiffusion3Pipeline` or `FluxPipeline`; nothing is copied.

        Device, dtypes, scheduler and text encoders are the pipeline's. Transformer and VAE are frozen, up to LoRA
        adapters; FLUX's transformer keeps the hooks of `dense_gradients`.

        Arguments:
            pipe: The pipeline.
            guidance_scale: The default g; the default of the pipeline's own call if None.
            text_tokens: The T5 length (its `max_sequence_length`); the default of its call if None.
            prompts_in_memory: How many conditions are kept in (CPU) memory.

        Raises:
            ValueError: If it is no such pipeline, has another scheduler, or offloads its networks.
        """
        family, id, scale = read_pipeline(pipe)
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self.id, self.family, self.finetuned = id, family, None
        self.guidance_scale = scale if guidance_scale is None else guidance_scale
        self.vae = VAE.from_network(pipe.vae, id)
        self.transformer = pipe.transformer
        dense_gradients(self.transformer)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and "lora_" in name)
        self.eval()
        encoders = PipelineEncoders(pipe, family, text_tokens or DEFAULT_TOKENS[family])
        self._memory = PromptMemory(encoders, prompts_in_memory)
        self._pipe = pipe
        return self

    def compile_blocks(self, backend: bool | str = True) -> None:
        """Compiles the transformer's blocks and the VAE's decoder in place, which may be a pipeline's."""
        blocks = [block for blocks in block_lists(self.transformer) for block in blocks]
        compile_forward([*blocks, self.vae.network.decoder], backend)

    @property
    def latent_channels(self) -> int:
        """The channels C of the latents."""
        return self.vae.latent_channels

    @property
    def patch(self) -> int:
        """Latent pixels per token along each axis: height and width are multiples of it."""
        return 2 if self.family == "flux" else self.transformer.config.patch_size

    @property
    def default_size(self) -> tuple[int, int]:
        """The latent height and width the model was made for (the pipeline's default)."""
        if self.family == "sd3":
            side = self.transformer.config.sample_size
        else:  # the transformer's configuration has no size; the published VAE's gives the pipeline's 128
            side = self.vae.network.config.sample_size // self.vae.factor
        return side, side

    def check_size(self, latent_size: tuple[int, int]) -> None:
        """Raises ValueError if latents of a height and width are larger than the table of positions."""
        limit = self.transformer.config.get("pos_embed_max_size")  # FLUX computes its positions
        if limit is not None and max(latent_size) > limit * self.patch:
            given = [side * self.vae.factor for side in latent_size]
            raise ValueError(
                f"height {given[0]} and width {given[1]}: expected at most {limit * self.patch * self.vae.factor} "
                f"pixels, the largest that {self.id} has position embeddings for."
            )

    def sigmas(self, num_steps: int, latent_size: tuple[int, int] | None = None) -> Tensor:
        """Returns the levels 1 = σ_0 > … > σ_N = 0 of the pipeline itself, float32, with shape (num_steps + 1,).

        They are what the pipeline's own scheduler gives; for FLUX they depend on the resolution. `sigma_grid` makes
        others.

        Arguments:
            num_steps: The number of steps N.
            latent_size: The latent height and width; `default_size` by default.
        """
        height, width = latent_size or self.default_size
        tokens = (height // self.patch) * (width // self.patch)
        return scheduler_sigmas(self._scheduler(), num_steps, tokens, self.family == "flux")

    def _scheduler(self) -> Any:
        """Returns a scheduler of its own, set as the pipeline's."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        if self._pipe is not None:
            return deepcopy(self._pipe.scheduler)
        return FlowMatchEulerDiscreteScheduler.from_pretrained(self._folder, subfolder="scheduler")

    @property
    def null(self) -> Condition:
        """The condition of the empty prompt with B = 1, on the transformer's device, for guidance and for backbones."""
        return self._memory.null_on(self.device)

    @property
    def text_tokens(self) -> int:
        """The T5 length."""
        return self._memory.encoders.num_tokens

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        """Returns the condition of B prompts, on the transformer's device.

        Prompts that are not in the cache are encoded in one batch.

        Raises:
            ValueError: If there are no prompts, or one text in their place.
        """
        return self._memory(prompts, self.device)

    def encode_ahead(self, prompts: Sequence[str]) -> None:
        """Encodes prompts, keeps the conditions of all of them in memory, and frees the text encoders.

        Each is encoded by itself, so that its condition is the same to the last bit whatever others there are.
        """
        self._memory.encode_ahead(prompts, self.device)

    def free_text_encoders(self) -> None:
        """Frees the text encoders, after seeing to the empty prompt; cached prompts stay usable.

        Those of a pipeline stay the pipeline's.
        """
        self._memory.free()

    def velocity(
        self, z_t: Tensor, t: Tensor, cond: Condition, guidance_scale: float | None = None
    ) -> Tensor:
        """Returns u_t(z_t) under the prompts with shape (B, C, H, W), in the dtype of z_t.

        Arguments:
            z_t: Noisy latents, with shape (B, C, H, W); cast to the network's dtype.
            t: Noise levels in [0, 1], with shape (B,), float32.
            cond: The conditions of B prompts (or of one, for all).
            guidance_scale: g; the generator's own by default.

        Raises:
            ValueError: If latents, noise levels and conditions do not fit together or the model.
        """
        return self.velocity_parts(z_t, t, cond, guidance_scale)[0]

    forward = velocity

    def velocity_parts(
        self,
        z_t: Tensor,
        t: Tensor,
        cond: Condition,
        guidance_scale: float | None = None,
        prefix: PrefixState | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns u_t(z_t), and the direction u(prompt) − u(∅) where there are two branches (else None).

        Arguments:
            z_t: Noisy latents, with shape (B, C, H, W).
            t: Noise levels in [0, 1], with shape (B,), float32.
            cond: The conditions of B prompts (or of one, for all).
            guidance_scale: g; the generator's own by default.
            prefix: The state of the null-text branch at (z_t, t) after some block (`null_branch().prefix`): the
                branch goes on from there. It rounds otherwise than both branches in one batch (a few 1e-6). For a
                transformer without LoRA adapters: those of SD3 would be switched off.

        Raises:
            ValueError: If latents, noise levels and conditions do not fit together or the model, or a prefix
                came where no null-text branch runs.
        """
        self._check(z_t, t, cond)
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        cond = cond.to(self.device, self.dtype)
        cond = cond.repeat(len(z_t)) if len(cond) == 1 else cond
        run = self._sd3 if self.family == "sd3" else self._flux
        with torch.autocast(z_t.device.type, enabled=False):
            u, direction = run(z_t.to(self.dtype), t.float(), cond, scale, prefix)
        return u.to(z_t.dtype), None if direction is None else direction.to(z_t.dtype)

    def runs_null_branch(self, guidance_scale: float | None = None) -> bool:
        """Returns whether `velocity` at this scale runs the empty prompt: not where guidance is distilled, nor off."""
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        distilled = self.family == "flux" and self.transformer.config.guidance_embeds
        return scale > 1 and not distilled

    def null_branch(self) -> NetworkBackbone:
        """Returns the null-text branch as a backbone on this transformer, without its LoRA adapters."""
        return self._borrow(self.null)

    def lend(self, config: dict[str, Any]) -> NetworkBackbone | None:
        """Returns a backbone on this transformer for a value model, or None if that has other weights.

        Arguments:
            config: The value model's `config.json`.
        """
        spec, (i, _) = config["backbone"], config["stitch_point"]
        settings = spec["init_args"]
        family = {"SD3Backbone": "sd3", "FluxBackbone": "flux"}
        name = spec["class_path"].rpartition(".")[2]
        if family.get(name) != self.family or settings.get("null_embeddings"):
            return None
        null = self.null
        if settings["null_tokens"] != self.text_tokens:
            null = null_condition(self._memory.encoders.with_tokens(settings["null_tokens"]))
        extra = {"guidance": settings["guidance"]} if "guidance" in settings else {}
        backbone = self._borrow(null, **extra)
        return backbone if used_weights(backbone, i) == spec["fingerprint"] else None

    def _borrow(self, null: Condition, **settings: Any) -> NetworkBackbone:
        cls = SD3Backbone if self.family == "sd3" else FluxBackbone
        again = bool(getattr(self.transformer, "gradient_checkpointing", False))
        return cls.from_transformer(
            self.transformer, null, id=self.id, gradient_checkpointing=again, **settings
        )

    def _sd3(
        self, z_t: Tensor, t: Tensor, cond: Condition, scale: float, prefix: PrefixState | None
    ) -> tuple[Tensor, Tensor | None]:
        """SD3: both branches in one batch, [empty, prompt], as in the pipeline, unless one has begun."""
        if scale <= 1:
            self._no_branch(prefix)
            return call_sd3(self.transformer, z_t, t, cond), None
        if prefix is not None:
            branch = self.null_branch()
            assert isinstance(branch, SD3Backbone)
            both = branch.both_branches(prefix, z_t, t, cond)
        else:
            null = self.null.to(self.device, self.dtype).repeat(len(z_t))
            twice = (torch.cat([z_t, z_t]), torch.cat([t, t]), Condition.cat([null, cond]))
            both = call_sd3(self.transformer, *twice)
        u_null, u_prompt = both.chunk(2)
        return u_null + scale * (u_prompt - u_null), u_prompt - u_null

    def _flux(
        self, z_t: Tensor, t: Tensor, cond: Condition, scale: float, prefix: PrefixState | None
    ) -> tuple[Tensor, Tensor | None]:
        """FLUX: g is an input of a guidance-distilled model; others run the empty prompt separately."""
        if self.transformer.config.guidance_embeds:
            self._no_branch(prefix)
            return call_flux(self.transformer, z_t, t, cond, torch.full_like(t, scale)), None
        u_prompt = call_flux(self.transformer, z_t, t, cond)
        if scale <= 1:
            self._no_branch(prefix)
            return u_prompt, None
        if prefix is not None:
            u_null = self.null_branch().suffix(prefix)
        else:
            null = self.null.to(self.device, self.dtype).repeat(len(z_t))
            u_null = call_flux(self.transformer, z_t, t, null)
        return u_null + scale * (u_prompt - u_null), u_prompt - u_null

    def _no_branch(self, prefix: PrefixState | None) -> None:
        if prefix is not None:
            raise ValueError(
                f"a prefix of the null-text branch came, but {self.id} runs no such branch at this guidance: "
                "ask runs_null_branch first."
            )

    def _check(self, z_t: Tensor, t: Tensor, cond: Condition) -> None:
        """Raises ValueError unless latents, noise levels and conditions fit."""
        got = tuple(z_t.shape)
        if z_t.ndim != 4 or got[1] != self.latent_channels:
            raise ValueError(
                f"latents have shape {got}, expected (B, {self.latent_channels}, H, W) for {self.id}: latents of "
                "another model's VAE do not work here"
            )
        if got[2] % self.patch or got[3] % self.patch:
            raise ValueError(
                f"latents have shape {got}, expected height and width divisible by {self.patch}: choose "
                f"an image size divisible by {self.patch * self.vae.factor}"
            )
        if t.shape != got[:1] or len(cond) not in (1, got[0]):
            raise ValueError(
                f"{got[0]} latents with noise levels of shape {tuple(t.shape)} and {len(cond)} prompts: expected "
                f"({got[0]},) and {got[0]} (or 1 prompt for all); repeat prompts with cond.repeat(n)"
            )

    @property
    def dtype(self) -> torch.dtype:
        """The transformer's dtype."""
        return self.transformer.context_embedder.weight.dtype

    @property
    def device(self) -> torch.device:
        """The transformer's device."""
        return self.transformer.context_embedder.weight.device
