"""The same checkpoints with reduced widths: the same files, names, classes and shards, a few megabytes in all."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rehearsal_facts import PIPELINES, REWARDS, Network, Pipeline, Reward

__all__ = ["ARCHITECTURES", "scaled_pipelines", "scaled_rewards"]

WIDTH = 32  # of T5, which the transformers' joint attention reads
_MMDIT: dict[str, Any] = {
    "attention_head_dim": 16,
    "joint_attention_dim": WIDTH,
    "pooled_projection_dim": 24,
    "pos_embed_max_size": 48,
    "sample_size": 16,
}
CHANGES: dict[tuple[str, str], dict[str, Any]] = {
    ("sd35m", "transformer"): {
        **_MMDIT,
        "caption_projection_dim": 32,
        "num_attention_heads": 2,
        "num_layers": 6,
        "dual_attention_layers": [0, 1, 2],
    },
    ("sd35l", "transformer"): {
        **_MMDIT,
        "caption_projection_dim": 48,
        "num_attention_heads": 3,
        "num_layers": 6,
    },
    ("flux", "transformer"): {
        "attention_head_dim": 16,
        "axes_dims_rope": [4, 6, 6],  # the class's default is for heads of 128
        "joint_attention_dim": WIDTH,
        "num_attention_heads": 2,
        "num_layers": 2,
        "num_single_layers": 4,
        "pooled_projection_dim": 12,
    },
}
VAE: dict[str, Any] = {
    "block_out_channels": [8, 8, 8, 8],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 128,
}
TOWER: dict[str, Any] = {
    "hidden_size": 12,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "projection_dim": 12,
}
T5: dict[str, Any] = {"d_model": WIDTH, "d_ff": 48, "d_kv": 8, "num_heads": 2, "num_layers": 2}

_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1}


def _vit(embed: int, image: int, layers: int, width: int, quick_gelu: bool) -> dict[str, Any]:
    vision = {"image_size": image, "layers": layers, "width": width, "head_width": 16}
    return {
        "embed_dim": embed,
        "quick_gelu": quick_gelu,
        "vision_cfg": vision | {"patch_size": 14},
        "text_cfg": dict(_TEXT),
    }


# under the names of the real ones, for `open_clip.add_model_config`
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "ViT-L-14-336-quickgelu": _vit(24, 56, 5, 32, True),
    "ViT-L-14-quickgelu": _vit(24, 42, 5, 32, True),
    "ViT-H-14-378-quickgelu": _vit(32, 70, 6, 48, True),
    "ViT-H-14": _vit(32, 42, 6, 48, False),
}


def scaled_pipelines(scale: str) -> dict[str, Pipeline]:
    """Returns the pipelines at a scale, "full" or "tiny"."""
    if scale == "full":
        return PIPELINES
    return {
        name: replace(pipe, networks=tuple(_tiny(name, network) for network in pipe.networks))
        for name, pipe in PIPELINES.items()
    }


def _tiny(name: str, network: Network) -> Network:
    if network.folder == "transformer":
        return network.with_config(**CHANGES[name, "transformer"])
    if network.folder == "vae":
        return network.with_config(**VAE)
    return network.with_config(**(T5 if network.kind == "T5EncoderModel" else TOWER))


def scaled_rewards(scale: str) -> dict[str, Reward]:
    """Returns the rewards at a scale, "full" or "tiny"."""
    if scale == "full":
        return REWARDS
    pick = REWARDS["pickscore"].config
    text = {"hidden_size": 24, "intermediate_size": 48, "num_attention_heads": 2}
    small = {
        "pickscore": {
            **pick,
            "projection_dim": 24,
            "text_config": pick["text_config"] | text | {"num_hidden_layers": 2},
            "vision_config": pick["vision_config"]
            | text
            | {"image_size": 42, "num_hidden_layers": 3},
        },
        "processor": {"size": 42},
        "aesthetic": {"widths": (24, 64, 32, 16, 8, 1)},
        "detector": {
            "backbone_config": REWARDS["detector"].config["backbone_config"]
            | {"embed_dim": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4]},
            "feature_size": 32,
            "mask_feature_size": 32,
            "hidden_dim": 32,
            "encoder_feedforward_dim": 32,
            "dim_feedforward": 32,
            "encoder_layers": 1,
            "decoder_layers": 2,
            "num_queries": 10,
        },
        "imagereward": {
            "width": 64,
            "depth": 2,
            "image": 48,
            "patch": 16,
            "med": REWARDS["imagereward"].config["med"]
            | {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2}
            | {"num_attention_heads": 2},
        },
    }
    return {
        name: replace(reward, config=small.get(name, reward.config))
        for name, reward in REWARDS.items()
    }
