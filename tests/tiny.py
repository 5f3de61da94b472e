"""Tiny checkpoints with random weights, in the exact layout of the hub, for tests that must be quick."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

WORDS = ("a", "red", "blue", "circle", "square", "left", "right", "of", "above", "and", "the")

SD3_CONFIG: dict[str, Any] = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "num_layers": 5,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 28,
    "out_channels": 4,
    "pos_embed_max_size": 12,
    "dual_attention_layers": (0, 1, 2),
    "qk_norm": "rms_norm",
}
FLUX_CONFIG: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 16,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 6, 6),
}


def randomize(module: nn.Module, std: float = 0.1) -> nn.Module:
    """Gives every parameter noise, so that gates which start at zero do not hide a wrong order of blocks."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(std * torch.randn(parameter.shape))
    return module.eval()


def clip_tokenizer() -> CLIPTokenizer:
    """Returns a CLIP tokenizer whose vocabulary is letters, so that any word of it is a few tokens."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    pieces = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=16)


def t5_tokenizer() -> T5Tokenizer:
    """Returns a T5 tokenizer with one token a word."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *(("▁" + w, -2.0) for w in WORDS)]
    return T5Tokenizer(vocab=pieces, extra_ids=0)


def clip_config(hidden: int, projection: int) -> CLIPTextConfig:
    """Returns a two-layer CLIP text tower for `clip_tokenizer`."""
    return CLIPTextConfig(
        vocab_size=54,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        projection_dim=projection,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def t5_encoder(width: int) -> T5EncoderModel:
    """Returns a one-layer T5 encoder for `t5_tokenizer`."""
    config = T5Config(
        vocab_size=3 + len(WORDS),
        d_model=width,
        d_kv=8,
        d_ff=2 * width,
        num_layers=1,
        num_heads=2,
        pad_token_id=0,
        eos_token_id=1,
    )
    return randomize(T5EncoderModel(config))


def autoencoder(latent_channels: int = 4) -> AutoencoderKL:
    """Returns a tiny VAE of factor 2 that takes 16 × 16 pixels by default."""
    return randomize(
        AutoencoderKL(
            in_channels=3,
            out_channels=3,
            latent_channels=latent_channels,
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            norm_num_groups=4,
            sample_size=16,
            scaling_factor=1.5,
            shift_factor=0.1,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        std=0.02,
    )


def sd3_folder(folder: Path, *, seed: int = 0, shard_size: str = "10GB", **changes: Any) -> Path:
    """Writes a tiny SD3 pipeline (MM-DiT with 3 dual-attention blocks of 5) and returns the folder.

    Arguments:
        folder: Where to write.
        seed: The seed of the random weights.
        shard_size: The largest size of one safetensors file; a small one makes a sharded checkpoint.
        changes: What differs from `SD3_CONFIG` in the transformer.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = randomize(SD3Transformer2DModel(**{**SD3_CONFIG, **changes}))
        pipeline = StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=autoencoder(transformer.config["in_channels"]),
            text_encoder=randomize(CLIPTextModelWithProjection(clip_config(16, 12))),
            tokenizer=clip_tokenizer(),
            text_encoder_2=randomize(CLIPTextModelWithProjection(clip_config(12, 16))),
            tokenizer_2=clip_tokenizer(),
            text_encoder_3=t5_encoder(32),
            tokenizer_3=t5_tokenizer(),
        )
    pipeline.save_pretrained(folder, max_shard_size=shard_size)
    return folder


def flux_folder(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """Writes a tiny FLUX pipeline (2 double and 3 single blocks) and returns the folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = randomize(FluxTransformer2DModel(**{**FLUX_CONFIG, **changes}))
        pipeline = FluxPipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=autoencoder(transformer.config["in_channels"] // 4),
            text_encoder=randomize(CLIPTextModel(clip_config(16, 12))),
            tokenizer=clip_tokenizer(),
            text_encoder_2=t5_encoder(32),
            tokenizer_2=t5_tokenizer(),
        )
    pipeline.save_pretrained(folder)
    return folder


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file."""
    return json.loads(path.read_text())
