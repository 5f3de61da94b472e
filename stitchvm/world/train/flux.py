"""The FLUX-class generator: guidance-distilled from the SD3-class one, as FLUX.1-dev is from its parent.

    L = E ||u(z_t, t, g, caption) - [u_free + g (u_bound - u_free)]||^2,   g ~ Unif[1, 6]

where u_free, u_bound are the SD3-class generator's velocities under "" and the caption and
z_t = (1 - t) z_0 + t eps. Its T5 encoder is its own, its CLIP encoder begins as the SD3-class generator's first (the
published pipelines share theirs), and both learn end to end from that loss.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from stitchvm.world.tokens import (
    BOS,
    CONTEXT,
    EOS,
    PAD,
    clip_tokenizer,
    clip_vocabulary,
    encode,
    t5_tokenizer,
    words,
)
from stitchvm.world.train.common import step_generator, weights_folder
from stitchvm.world.train.latents import load_vae
from stitchvm.world.train.sd3 import (
    BATCH,
    MICRO,
    TEXT_WIDTH,
    SD3Stage,
    encode_text,
    noise_levels,
    save_pipeline,
)

GUIDANCE = (1.0, 6.0)


def build_flux(
    layers: int, single: int, width: int, heads: int, seed: int
) -> FluxTransformer2DModel:
    """Returns an untrained FLUX transformer with zero-initialised modulation."""
    torch.manual_seed(seed)
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=layers,
        num_single_layers=single,
        attention_head_dim=width // heads,
        num_attention_heads=heads,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(8, 16, 16),
    )
    norms = [n for b in model.transformer_blocks for n in (b.norm1, b.norm1_context)]
    norms += [b.norm for b in model.single_transformer_blocks]
    for linear in (*(n.linear for n in norms), model.norm_out.linear, model.proj_out):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    return model


def build_encoders(seed: int) -> tuple[CLIPTextModel, T5EncoderModel]:
    """Returns untrained CLIP (pooled) and T5 (sequence) encoders."""
    vocabulary, _ = clip_vocabulary()
    torch.manual_seed(seed)
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(vocabulary),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=CONTEXT,
            pad_token_id=vocabulary[PAD],
            bos_token_id=vocabulary[BOS],
            eos_token_id=vocabulary[EOS],
        )
    )
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=32,
            d_model=TEXT_WIDTH,
            d_kv=32,
            d_ff=4 * TEXT_WIDTH,
            num_layers=2,
            num_heads=2,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
        )
    )
    nn.init.normal_(clip.get_input_embeddings().weight, std=0.5)
    return clip, t5


def pack(z: Tensor) -> Tensor:
    """Returns FLUX's tokens (B, 64, 16) of latents (B, 4, 16, 16): 2x2 patches, channel first."""
    b, c, h, w = z.shape
    return (
        z.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, c * 4)
    )


def unpack(tokens: Tensor, side: int = 16) -> Tensor:
    """Returns the latents of `pack`ed tokens."""
    b, _, c = tokens.shape
    z = tokens.view(b, side // 2, side // 2, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return z.reshape(b, c // 4, side, side)


class FluxStage(SD3Stage):
    """Distils the FLUX-class generator and writes weights/flux."""

    name = "flux"
    total_steps = 3000
    warmup = 60
    width, heads = 80, 2

    def build(self) -> None:
        self.transformer = build_flux(2, 4, self.width, self.heads, self.seed)
        self.text = nn.ModuleList(build_encoders(self.seed + 3))
        self.nets.update({"transformer": self.transformer, "text": self.text})
        folder = weights_folder() / "sd3"
        teacher = StableDiffusion3Pipeline.from_pretrained(folder, dtype=torch.float32)
        self.teacher = teacher.transformer.requires_grad_(False).eval()
        self.teacher_text = [
            teacher.text_encoder.requires_grad_(False).eval(),
            teacher.text_encoder_2.requires_grad_(False).eval(),
        ]
        self.text[0].load_state_dict(teacher.text_encoder.text_model.state_dict())
        pieces = {w: 4 + i for i, w in enumerate(words())}
        self.pieces = pieces
        axis = torch.arange(8.0)
        rows, columns = torch.meshgrid(axis, axis, indexing="ij")
        self.places = torch.stack([torch.zeros(64), rows.flatten(), columns.flatten()], dim=1)

    def is_matrix(self, name: str, p: Tensor) -> bool:
        inner = "transformer_blocks" in name and ".norm" not in name
        return inner and p.ndim == 2

    def encode(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Returns T5's sequence (B, 16, 64) and CLIP's pooled vector (B, 64)."""
        rows = [[self.pieces[w] for w in c.split()] + [1] for c in captions]
        ids = torch.tensor([r + [0] * (CONTEXT - len(r)) for r in rows])
        return self.text[1](ids)[0], self.text[0](torch.tensor(encode(captions))).pooler_output

    def velocity(
        self, z_t: Tensor, t: Tensor, cond: tuple[Tensor, Tensor], guidance: Tensor | None = None
    ) -> Tensor:
        guidance = torch.full((len(z_t),), 4.0) if guidance is None else guidance
        out = self.transformer(
            pack(z_t),
            encoder_hidden_states=cond[0],
            pooled_projections=cond[1],
            timestep=t,
            img_ids=self.places,
            txt_ids=torch.zeros(CONTEXT, 3),
            guidance=guidance,
            return_dict=False,
        )[0]
        return unpack(out)

    def guided(self, z_t: Tensor, t: Tensor, captions: list[str], guidance: Tensor) -> Tensor:
        """Returns the SD3-class generator's velocity with classifier-free guidance."""
        teacher = self.teacher_text
        with torch.no_grad():
            context, pooled = encode_text(teacher[0], teacher[1], [""] * len(captions) + captions)
            twice = torch.cat([z_t, z_t]), context, pooled, 1000 * torch.cat([t, t])
            free, bound = self.teacher(*twice, return_dict=False)[0].chunk(2)
            return free + guidance[:, None, None, None] * (bound - free)

    def share(self, step: int, rank: int, world: int) -> list[float]:
        generator = step_generator(self.seed, step, 1)
        pick = torch.randint(len(self.latents), (BATCH,), generator=generator)
        z_0 = self.latents[pick].float()
        captions = [self.captions[i] for i in pick.tolist()]
        eps = torch.randn(z_0.shape, generator=generator)
        t = noise_levels(BATCH, generator)
        guidance = GUIDANCE[0] + (GUIDANCE[1] - GUIDANCE[0]) * torch.rand(
            BATCH, generator=generator
        )
        z_t = (1 - t[:, None, None, None]) * z_0 + t[:, None, None, None] * eps
        figures = [0.0, 0.0, 0.0]
        for part in torch.arange(BATCH).split(MICRO)[rank::world]:
            words_ = [captions[i] for i in part.tolist()]
            target = self.guided(z_t[part], t[part], words_, guidance[part])
            u = self.velocity(z_t[part], t[part], self.encode(words_), guidance[part])
            error = ((u - target) ** 2).mean(dim=(1, 2, 3))
            loss = error.sum() / BATCH
            loss.backward()
            far = t[part] > 0.7
            for i, value in enumerate((loss, (error.detach() * far).sum(), far.sum())):
                figures[i] += value.item()
        return figures

    def step_velocity(
        self, z: Tensor, now: Tensor, captions: list[str], guidance: float
    ) -> Tensor:
        size = len(z)
        return self.velocity(
            z, now.expand(size), self.encode(captions), torch.full((size,), guidance)
        )

    def write_pipeline(self, target: Path) -> None:
        half = torch.float16
        transformer = FluxTransformer2DModel.from_config(self.transformer.config)
        transformer.load_state_dict(self.transformer.state_dict())
        clip, t5 = build_encoders(0)
        clip.load_state_dict(self.text[0].state_dict())
        t5.load_state_dict(self.text[1].state_dict())
        pipeline = FluxPipeline(
            transformer=transformer.to(half),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae=load_vae().to(half),
            text_encoder=clip.to(half),
            tokenizer=clip_tokenizer(),
            text_encoder_2=t5.to(half),
            tokenizer_2=t5_tokenizer(),
        )
        save_pipeline(pipeline, target)
