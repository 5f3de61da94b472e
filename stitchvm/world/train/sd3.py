"""The SD3-class generator: MM-DiT and its two CLIP text encoders, trained end to end by flow matching alone.

L = E ||u(z_t, 1000 t, caption) - (eps - z_0)||^2, z_t = (1 - t) z_0 + t eps (Eq. 1, 67); captions are dropped to "" for
one sample in ten. It sees latents and captions: no scene labels, no part of any reward.

The T5 slot of the pipeline holds a tiny encoder whose output is zero, so the pipeline appends K equal tokens, K =
`max_sequence_length` (256 unless told). Tokens of the context carry no position, hence K equal tokens are one
token whose attention logit is raised by log K: training uses that one token with K drawn from {1, 16, 256}, and the
generator accepts any K.
"""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from stitchvm.world.checker import check_batch, pass_rate
from stitchvm.world.scenes import sample_scenes
from stitchvm.world.tokens import (
    BOS,
    CONTEXT,
    EOS,
    PAD,
    clip_tokenizer,
    clip_vocabulary,
    encode,
    t5_tokenizer,
)
from stitchvm.world.train.common import Stage, replace_folder, step_generator
from stitchvm.world.train.helper import Helper
from stitchvm.world.train.latents import cached_latents, load_vae, to_pixels
from stitchvm.world.train.muon import Muon

BATCH, MICRO = 64, 32
TEXT_WIDTH = 64
DROP = 0.1
SHIFT = 2.0
T5_COUNTS = (1, 1, 16, 256)


def build_text_encoder(seed: int) -> CLIPTextModelWithProjection:
    """Returns an untrained two-layer text encoder, its embeddings large enough to be told apart at once."""
    vocabulary, _ = clip_vocabulary()
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        pad_token_id=vocabulary[PAD],
        bos_token_id=vocabulary[BOS],
        eos_token_id=vocabulary[EOS],
    )
    torch.manual_seed(seed)
    model = CLIPTextModelWithProjection(config)
    nn.init.normal_(model.get_input_embeddings().weight, std=0.5)
    for name, p in model.named_parameters():
        if "position_embedding" in name:
            nn.init.normal_(p, std=0.25)
    return model


def build_t5() -> T5EncoderModel:
    """Returns the silent T5 encoder: its last norm is zero, hence its output."""
    config = T5Config(
        vocab_size=32,
        d_model=2 * TEXT_WIDTH,
        d_kv=8,
        d_ff=8,
        num_layers=1,
        num_heads=1,
        dropout_rate=0.0,
    )
    torch.manual_seed(0)
    model = T5EncoderModel(config)
    nn.init.zeros_(model.encoder.final_layer_norm.weight)
    return model


def build_transformer(
    layers: int, width: int, heads: int, dual: int, seed: int
) -> SD3Transformer2DModel:
    """Returns an untrained MM-DiT with zero-initialised modulation, so that every block starts as the identity."""
    torch.manual_seed(seed)
    model = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=width // heads,
        num_attention_heads=heads,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=width,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=8,
        dual_attention_layers=tuple(range(dual)),
        qk_norm="rms_norm",
    )
    for block in model.transformer_blocks:
        for norm in (block.norm1, block.norm1_context):
            nn.init.zeros_(norm.linear.weight)
            nn.init.zeros_(norm.linear.bias)
    for linear in (model.norm_out.linear, model.proj_out):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    nn.init.zeros_(model.context_embedder.bias)
    return model


class WeightedJointAttention:
    """Joint attention in which the last context token counts as `count` equal tokens (logit + log count)."""

    def __init__(self) -> None:
        self.count = 1

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        **_: object,
    ) -> tuple[Tensor, Tensor] | Tensor:
        """Returns what diffusers' JointAttnProcessor2_0 returns (the same arithmetic when count is 1)."""
        batch, image = hidden_states.shape[:2]

        def split(x: Tensor) -> Tensor:
            return x.view(batch, -1, attn.heads, x.shape[-1] // attn.heads).transpose(1, 2)

        q = attn.norm_q(split(attn.to_q(hidden_states)))
        k = attn.norm_k(split(attn.to_k(hidden_states)))
        v = split(attn.to_v(hidden_states))
        mask = None
        if encoder_hidden_states is not None:
            q = torch.cat(
                [q, attn.norm_added_q(split(attn.add_q_proj(encoder_hidden_states)))], dim=2
            )
            k = torch.cat(
                [k, attn.norm_added_k(split(attn.add_k_proj(encoder_hidden_states)))], dim=2
            )
            v = torch.cat([v, split(attn.add_v_proj(encoder_hidden_states))], dim=2)
            if self.count > 1:
                mask = q.new_zeros(1, 1, 1, k.shape[2])
                mask[..., -1] = math.log(self.count)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        out = out.transpose(1, 2).reshape(batch, -1, attn.heads * q.shape[-1])
        first = attn.to_out[0](out[:, :image])
        if encoder_hidden_states is None:
            return first
        rest = out[:, image:]
        return first, rest if attn.context_pre_only else attn.to_add_out(rest)


def save_pipeline(pipeline: Any, target: Path) -> None:
    """Writes a pipeline whose folder opens in one dtype.

    Unless told, diffusers loads its own models in float32, but transformers loads the dtype in a model's config:
    with half-precision encoders beside them, the pipeline's call would fail. So the configs say float32.
    """
    pipeline.save_pretrained(target)
    for path in target.glob("text_encoder*/config.json"):
        config = json.loads(path.read_text()) | {"dtype": "float32"}
        path.write_text(json.dumps(config, indent=2) + "\n")


def noise_levels(n: int, generator: torch.Generator) -> Tensor:
    """Returns training levels t (n,): logit-normal(0.4, 1), one in five uniform."""
    t = torch.sigmoid(0.4 + torch.randn(n, generator=generator))
    uniform = torch.rand(n, generator=generator)
    return torch.where(torch.rand(n, generator=generator) < 0.2, uniform, t)


def encode_text(first: nn.Module, second: nn.Module, captions: list[str]) -> tuple[Tensor, Tensor]:
    """Returns what the pipeline makes of captions with one T5 token: context (B, 17, 128) and pooled (B, 128)."""
    ids = torch.tensor(encode(captions))
    outs = [net(ids, output_hidden_states=True) for net in (first, second)]
    context = torch.cat([o.hidden_states[-2] for o in outs], dim=-1)
    return F.pad(context, (0, 0, 0, 1)), torch.cat([o.text_embeds for o in outs], dim=-1)


class SD3Stage(Stage):
    """Trains MM-DiT and text encoders and writes weights/sd3."""

    name = "sd3"
    total_steps = 1900
    warmup = 200
    ema_decay = 0.9985
    layers, width, heads, dual = 8, 96, 3, 3
    rates = (6e-3, 1e-3)  # Muon, AdamW

    def __init__(self, seed: int = 0, workers: int = 1) -> None:
        super().__init__(seed)
        self.vae = load_vae()
        self.latents, self.captions = cached_latents()
        self.build()
        matrices: list[Tensor] = []
        others: list[Tensor] = []
        for name, p in self.nets.named_parameters():
            if p.requires_grad:
                (matrices if self.is_matrix(name, p) else others).append(p)
        self.optimizers = [
            Muon([{"params": matrices, "base_lr": self.rates[0]}]),
            torch.optim.AdamW(
                [{"params": others, "base_lr": self.rates[1]}], betas=(0.9, 0.97), weight_decay=0.0
            ),
        ]
        self.start_ema()
        self.helper = Helper(self) if workers == 2 else None

    def build(self) -> None:
        """Makes the nets."""
        self.transformer = build_transformer(
            self.layers, self.width, self.heads, self.dual, self.seed
        )
        self.text = nn.ModuleList(
            [build_text_encoder(self.seed + 1), build_text_encoder(self.seed + 2)]
        )
        self.nets.update({"transformer": self.transformer, "text": self.text})
        self.weigh()

    def weigh(self) -> None:
        """Puts in the attention that counts its last token several times."""
        self.attention = WeightedJointAttention()
        for block in self.transformer.transformer_blocks:
            block.attn.set_processor(self.attention)

    def is_matrix(self, name: str, p: Tensor) -> bool:
        """Returns whether Muon trains a parameter: the matrices inside the blocks, modulation excepted."""
        return (
            name.startswith("transformer.transformer_blocks")
            and "norm1" not in name
            and p.ndim == 2
        )

    def update(self) -> dict[str, float]:
        torch.set_flush_denormal(True)
        return super().update()

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        if self.helper is not None:
            self.helper.begin(step)
            mine = self.share(step, 0, 2)
            figures = [a + b for a, b in zip(mine, self.helper.finish(), strict=True)]
        else:
            figures = self.share(step, 0, 1)
        return torch.tensor(figures[0], requires_grad=True), {
            "high": figures[1] / max(1.0, figures[2])
        }

    def share(self, step: int, rank: int, world: int) -> list[float]:
        """Adds the gradient of this rank's part of the batch to `.grad`; returns [loss, far error, far count]."""
        generator = step_generator(self.seed, step)
        pick = torch.randint(len(self.latents), (BATCH,), generator=generator)
        dropped = torch.rand(BATCH, generator=generator) < DROP
        z_0 = self.latents[pick].float()
        captions = [
            "" if d else self.captions[i] for i, d in zip(pick.tolist(), dropped, strict=True)
        ]
        eps = torch.randn(z_0.shape, generator=generator)
        t = noise_levels(BATCH, generator)
        which = int(torch.randint(len(T5_COUNTS), (1,), generator=generator))
        self.attention.count = T5_COUNTS[which]
        z_t = (1 - t[:, None, None, None]) * z_0 + t[:, None, None, None] * eps
        figures = [0.0, 0.0, 0.0]
        for part in torch.arange(BATCH).split(MICRO)[
            rank::world
        ]:  # small pieces stay in the CPU's cache
            cond = self.encode([captions[i] for i in part.tolist()])
            u = self.velocity(z_t[part], t[part], cond)
            error = ((u - (eps - z_0)[part]) ** 2).mean(dim=(1, 2, 3))
            loss = error.sum() / BATCH
            loss.backward()
            far = t[part] > 0.7
            for i, value in enumerate((loss, (error.detach() * far).sum(), far.sum())):
                figures[i] += value.item()
        self.attention.count = 1
        return figures

    def encode(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Returns the conditioning of captions."""
        return encode_text(self.text[0], self.text[1], captions)

    def velocity(self, z_t: Tensor, t: Tensor, cond: tuple[Tensor, Tensor]) -> Tensor:
        """Returns u for latents at levels t (B,) under encoded captions."""
        return self.transformer(z_t, cond[0], cond[1], 1000 * t, return_dict=False)[0]

    @torch.no_grad()
    def sample(
        self,
        captions: list[str],
        seed: int,
        guidance: float = 4.5,
        steps: int = 24,
        shift: float = SHIFT,
    ) -> Tensor:
        """Returns pixels (N, 3, 32, 32) of Euler steps with classifier-free guidance."""
        outs = []
        noise = torch.randn(
            (len(captions), 4, 16, 16), generator=torch.Generator().manual_seed(seed)
        )
        sigma = torch.linspace(1, 1 / steps, steps)
        sigma = torch.cat([shift * sigma / (1 + (shift - 1) * sigma), torch.zeros(1)])
        for start in range(0, len(captions), 64):
            part = captions[start : start + 64]
            z = noise[start : start + 64]
            for now, after in pairwise(sigma):
                z = z + (after - now) * self.step_velocity(z, now, part, guidance)
            outs.append(to_pixels(self.vae, z))
        return torch.cat(outs)

    def step_velocity(
        self, z: Tensor, now: Tensor, captions: list[str], guidance: float
    ) -> Tensor:
        """Returns the guided velocity of a sampling step."""
        cond = self.encode([""] * len(z) + captions)
        free, bound = self.velocity(torch.cat([z, z]), now.expand(2 * len(z)), cond).chunk(2)
        return free + guidance * (bound - free)

    def evaluate(self) -> dict[str, float]:
        scenes = sample_scenes("test", 160, [1, 97])
        results = check_batch(self.sample([s.caption for s in scenes], 1).numpy(), scenes)
        figures = {f"{self.name}/whole": pass_rate(results)}
        pairs = [r for r, s in zip(results, scenes, strict=True) if s.relation is not None]
        figures[f"{self.name}/whole_pairs"] = pass_rate(pairs)
        for attribute in results[0].attributes:
            figures[f"{self.name}/{attribute}"] = sum(
                r.attributes[attribute] for r in results
            ) / len(results)
        return figures

    def export(self, folder: Path) -> None:
        replace_folder(self.write_pipeline, folder / self.name)

    def write_pipeline(self, target: Path) -> None:
        """Writes the diffusers folder (fp16)."""
        half = torch.float16
        transformer = SD3Transformer2DModel.from_config(self.transformer.config)
        transformer.load_state_dict(self.transformer.state_dict())
        texts = []
        for net in self.text:
            copy = CLIPTextModelWithProjection(net.config)
            copy.load_state_dict(net.state_dict())
            texts.append(copy.to(half))
        pipeline = StableDiffusion3Pipeline(
            transformer=transformer.to(half),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
            vae=load_vae().to(half),
            text_encoder=texts[0],
            tokenizer=clip_tokenizer(),
            text_encoder_2=texts[1],
            tokenizer_2=clip_tokenizer(),
            text_encoder_3=build_t5().to(half),
            tokenizer_3=t5_tokenizer(),
        )
        save_pipeline(pipeline, target)
