"""What is published about each checkpoint: configurations by value, file names, shards, parameter counts, sources.

Nothing is downloaded. Every number is either in a file that others published about the gated repository (named beside
it), or a consequence of it that `rehearsal_check.py` computes on the meta device and compares with a published size.

Sources:
[index]   transformer/diffusion_pytorch_model.safetensors.index.json of FLUX.1-dev, as stored in the GitHub repository
          dwcqwcqw/image-generation: three shards, total_size 23,802,816,640.
[sizes]   sizes of FLUX.1-dev's shards as its hub API gave them, printed in a download script on GitHub.
[mflux]   configurations of the SD 3.5 repositories "read off the gated repositories", as a GitHub project for mflux
          states them: Large has no `dual_attention_layers` key; the second text tower is GELU, the first QuickGELU.
[tt]      configurations of SD 3.5 (transformers, VAE, model_index.json) in Tenstorrent's tt-forge-models.
[t5]      the size of T5-XXL in bfloat16, 9,524,621,312 bytes, in model cards of several projects on GitHub.
[paddle]  the file list of SD 3.5 Medium in PaddleMIX's documentation, sizes to a tenth.
[list]    files of SD 3.5 Large in the tests of two downloaders on GitHub: two shards of the transformer, two of T5,
          fp16 variants of the text encoders with `model.safetensors.index.fp16.json`. Medium is taken to have the same.
[invoke]  InvokeAI's tests hold the VAE configuration of FLUX.1-dev word for word.
[oc]      open_clip 3.3: its own architecture files and table of pretrained tags.
[reward]  the authors' repositories: tgxs002/HPSv2, christophschuhmann/improved-aesthetic-predictor, THUDM/ImageReward,
          yuvalkirstain/PickScore.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

__all__ = [
    "PIPELINES",
    "PUBLISHED_BYTES",
    "PUBLISHED_MIB",
    "REWARDS",
    "Network",
    "Pipeline",
    "Reward",
]


@dataclass(frozen=True)
class Network:
    """One network of a checkpoint, and how its files are laid out.

    Attributes:
        folder: The folder in the repository ("" is its root).
        kind: The class that has its tensors.
        config: What config.json holds.
        stem: The file name without suffix.
        shards: How many files the weights are cut into.
        dtype: What the tensors are stored in.
        variants: Further copies, such as "fp16".
        parameters: How many parameters it is known to have.
    """

    folder: str
    kind: str
    config: dict[str, Any]
    stem: str = "model"
    shards: int = 1
    dtype: str = "float16"
    variants: tuple[str, ...] = ()
    parameters: int | None = None

    def with_config(self, **changes: Any) -> Network:
        """Returns a copy with other numbers, whose parameters nobody has published."""
        return replace(self, config=self.config | changes, parameters=None)


@dataclass(frozen=True)
class Pipeline:
    """A diffusers pipeline on the hub.

    Attributes:
        id: The hub id.
        index: What model_index.json holds.
        scheduler: What scheduler/scheduler_config.json holds.
        networks: Its networks.
        t5_tokenizer: The folder of T5's tokenizer.
    """

    id: str
    index: dict[str, Any]
    scheduler: dict[str, Any]
    networks: tuple[Network, ...]
    t5_tokenizer: str


@dataclass(frozen=True)
class Reward:
    """A reward's repository on the hub (or a file beside it).

    Attributes:
        id: The hub id.
        kind: How it is laid out: see `rehearsal_rewards.py`.
        config: The architecture.
        files: The files of weights.
    """

    id: str
    kind: str
    config: dict[str, Any] = field(default_factory=dict)
    files: tuple[str, ...] = ()


def _clip_text(width: int, layers: int, heads: int, act: str) -> dict[str, Any]:
    """The text towers; the ids of special tokens are the wrong ones that both are published with. [mflux]"""
    return {
        "architectures": ["CLIPTextModelWithProjection"],
        "model_type": "clip_text_model",
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "dropout": 0.0,
        "eos_token_id": 2,
        "hidden_act": act,
        "hidden_size": width,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": 4 * width,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 77,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "pad_token_id": 1,
        "projection_dim": width,
        "vocab_size": 49408,
    }


CLIP_L = _clip_text(768, 12, 12, "quick_gelu")
CLIP_G = _clip_text(1280, 32, 20, "gelu")
T5_PARAMETERS = 9_524_621_312 // 2  # total_size of the index of text_encoder_2, bfloat16 [t5]
T5_XXL: dict[str, Any] = {
    "architectures": ["T5EncoderModel"],
    "classifier_dropout": 0.0,
    "d_ff": 10240,
    "d_kv": 64,
    "d_model": 4096,
    "decoder_start_token_id": 0,
    "dense_act_fn": "gelu_new",
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu",
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "is_gated_act": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "t5",
    "num_decoder_layers": 24,
    "num_heads": 64,
    "num_layers": 24,
    "output_past": True,
    "pad_token_id": 0,
    "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 32128,
}


def _vae(scaling_factor: float, shift_factor: float) -> dict[str, Any]:
    """One architecture, two latent spaces. [tt] [invoke]"""
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.30.0.dev0",
        "act_fn": "silu",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "force_upcast": True,
        "in_channels": 3,
        "latent_channels": 16,
        "latents_mean": None,
        "latents_std": None,
        "layers_per_block": 2,
        "mid_block_add_attention": True,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": 1024,
        "scaling_factor": scaling_factor,
        "shift_factor": shift_factor,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "use_post_quant_conv": False,
        "use_quant_conv": False,
    }


def _mmdit(heads: int, layers: int, table: int, **more: Any) -> dict[str, Any]:
    """[mflux] [tt]"""
    return {
        "_class_name": "SD3Transformer2DModel",
        "_diffusers_version": "0.31.0.dev0",
        "attention_head_dim": 64,
        "caption_projection_dim": 64 * heads,
        "in_channels": 16,
        "joint_attention_dim": 4096,
        "num_attention_heads": heads,
        "num_layers": layers,
        "out_channels": 16,
        "patch_size": 2,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": table,
        "qk_norm": "rms_norm",
        "sample_size": 128,
        **more,
    }


# without axes_dims_rope, which the first release did not have: the class's default is meant. [index] [tt]
FLUX: dict[str, Any] = {
    "_class_name": "FluxTransformer2DModel",
    "_diffusers_version": "0.30.0.dev0",
    "attention_head_dim": 128,
    "guidance_embeds": True,
    "in_channels": 64,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 19,
    "num_single_layers": 38,
    "patch_size": 1,
    "pooled_projection_dim": 768,
}

_TRANSFORMER = "diffusion_pytorch_model"


def _sd35(id: str, transformer: dict[str, Any], shards: int) -> Pipeline:
    with_projection = ("transformers", "CLIPTextModelWithProjection")
    fp16 = ("fp16",)
    return Pipeline(
        id,
        {
            "_class_name": "StableDiffusion3Pipeline",
            "_diffusers_version": "0.31.0.dev0",
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": list(with_projection),
            "text_encoder_2": list(with_projection),
            "text_encoder_3": ["transformers", "T5EncoderModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
            "tokenizer_3": ["transformers", "T5TokenizerFast"],
            "transformer": ["diffusers", "SD3Transformer2DModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
        {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "_diffusers_version": "0.29.0.dev0",
            "num_train_timesteps": 1000,
            "shift": 3.0,
        },
        (
            Network("transformer", "SD3Transformer2DModel", transformer, _TRANSFORMER, shards,
                    "bfloat16"),
            Network("vae", "AutoencoderKL", _vae(1.5305, 0.0609), _TRANSFORMER, 1, "bfloat16"),
            Network("text_encoder", "CLIPTextModelWithProjection", CLIP_L, variants=fp16),
            Network("text_encoder_2", "CLIPTextModelWithProjection", CLIP_G, variants=fp16),
            Network("text_encoder_3", "T5EncoderModel", T5_XXL, shards=2, variants=fp16,
                    parameters=T5_PARAMETERS),
        ),
        "tokenizer_3",
    )  # fmt: skip


PIPELINES: dict[str, Pipeline] = {
    "sd35m": _sd35(
        "stabilityai/stable-diffusion-3.5-medium",
        _mmdit(24, 24, 384, dual_attention_layers=list(range(13))),
        1,
    ),
    "sd35l": _sd35("stabilityai/stable-diffusion-3.5-large", _mmdit(38, 38, 192), 2),
    "flux": Pipeline(
        "black-forest-labs/FLUX.1-dev",
        {
            "_class_name": "FluxPipeline",
            "_diffusers_version": "0.30.0.dev0",
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "text_encoder_2": ["transformers", "T5EncoderModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "tokenizer_2": ["transformers", "T5TokenizerFast"],
            "transformer": ["diffusers", "FluxTransformer2DModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
        {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "_diffusers_version": "0.30.0.dev0",
            "base_image_seq_len": 256,
            "base_shift": 0.5,
            "max_image_seq_len": 4096,
            "max_shift": 1.15,
            "num_train_timesteps": 1000,
            "shift": 3.0,
            "use_dynamic_shifting": True,
        },
        (
            Network("transformer", "FluxTransformer2DModel", FLUX, _TRANSFORMER, 3, "bfloat16", (),
                    23_802_816_640 // 2),
            Network("vae", "AutoencoderKL", _vae(0.3611, 0.1159), _TRANSFORMER, 1, "bfloat16"),
            Network("text_encoder", "CLIPTextModel", CLIP_L | {"architectures": ["CLIPTextModel"]},
                    dtype="bfloat16"),
            Network("text_encoder_2", "T5EncoderModel", T5_XXL, shards=2, dtype="bfloat16",
                    parameters=T5_PARAMETERS),
        ),
        "tokenizer_2",
    ),
}  # fmt: skip

PICKSCORE: dict[str, Any] = {
    "architectures": ["CLIPModel"],
    "initializer_factor": 1.0,
    "logit_scale_init_value": 2.6592,
    "model_type": "clip",
    "projection_dim": 1024,
    "text_config": {
        "bos_token_id": 0, "eos_token_id": 2, "hidden_act": "gelu", "hidden_size": 1024,
        "intermediate_size": 4096, "max_position_embeddings": 77, "model_type": "clip_text_model",
        "num_attention_heads": 16, "num_hidden_layers": 24, "vocab_size": 49408,
    },
    "vision_config": {
        "hidden_act": "gelu", "hidden_size": 1280, "image_size": 224, "intermediate_size": 5120,
        "model_type": "clip_vision_model", "num_attention_heads": 16, "num_hidden_layers": 32,
        "patch_size": 14,
    },
}  # fmt: skip
MED: dict[str, Any] = {
    "architectures": ["BertModel"], "attention_probs_dropout_prob": 0.1, "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1, "hidden_size": 768, "initializer_range": 0.02,
    "intermediate_size": 3072, "layer_norm_eps": 1e-12, "max_position_embeddings": 512,
    "model_type": "bert", "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 0,
    "type_vocab_size": 2, "vocab_size": 30524, "encoder_width": 768, "add_cross_attention": True,
}  # fmt: skip
IMAGEREWARD: dict[str, Any] = {"width": 1024, "depth": 24, "image": 224, "patch": 16, "med": MED}

# the network of transformers' conversion of Mask2Former with Swin-S for COCO's instances: 69 M in its paper's tables
MASK2FORMER: dict[str, Any] = {
    "backbone_config": {
        "model_type": "swin", "image_size": 384, "embed_dim": 96, "depths": [2, 2, 18, 2],
        "num_heads": [3, 6, 12, 24], "window_size": 7, "drop_path_rate": 0.3,
        "out_features": ["stage1", "stage2", "stage3", "stage4"],
    },
}  # fmt: skip

REWARDS: dict[str, Reward] = {
    "clip": Reward("timm/vit_large_patch14_clip_336.openai", "open_clip",
                   {"name": "ViT-L-14-336-quickgelu"}, ("open_clip_model.safetensors",)),
    "clip224": Reward("timm/vit_large_patch14_clip_224.openai", "open_clip",
                      {"name": "ViT-L-14-quickgelu"}, ("open_clip_model.safetensors",)),
    "dfn_clip": Reward("apple/DFN5B-CLIP-ViT-H-14-378", "open_clip",
                       {"name": "ViT-H-14-378-quickgelu"}, ("open_clip_pytorch_model.bin",)),
    "hpsv2": Reward("xswu/HPSv2", "hpsv2", {"name": "ViT-H-14"}, ("HPS_v2.1_compressed.pt",)),
    "aesthetic": Reward("", "aesthetic", {"widths": (768, 1024, 128, 64, 16, 1)},
                        ("sac+logos+ava1-l14-linearMSE.pth",)),
    "pickscore": Reward("yuvalkirstain/PickScore_v1", "pickscore", PICKSCORE,
                        ("model.safetensors",)),
    "processor": Reward("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "processor", {"size": 224}),
    "imagereward": Reward("THUDM/ImageReward", "imagereward", IMAGEREWARD, ("ImageReward.pt",)),
    "detector": Reward("facebook/mask2former-swin-small-coco-instance", "mask2former",
                       MASK2FORMER, ("model.safetensors",)),
    "bert": Reward("google-bert/bert-base-uncased", "bert", {"tokens": 30522}),
}  # fmt: skip

# bytes of published files, headers included: what the written ones are compared with [sizes] [reward]
PUBLISHED_BYTES: dict[tuple[str, str], int] = {
    ("flux", "transformer/diffusion_pytorch_model-00001-of-00003.safetensors"): 9_983_040_304,
    ("flux", "transformer/diffusion_pytorch_model-00002-of-00003.safetensors"): 9_949_328_904,
    ("flux", "transformer/diffusion_pytorch_model-00003-of-00003.safetensors"): 3_870_584_832,
    ("flux", "text_encoder_2/model-00001-of-00002.safetensors"): 4_994_582_224,
    ("flux", "text_encoder_2/model-00002-of-00002.safetensors"): 4_530_066_360,
    ("flux", "text_encoder/model.safetensors"): 246_144_152,
    ("flux", "vae/diffusion_pytorch_model.safetensors"): 167_666_902,
    ("aesthetic", "sac+logos+ava1-l14-linearMSE.pth"): 3_714_759,
}
# MiB of others, as rounded numbers, and how far a number may be from its rounding [paddle] [reward]
PUBLISHED_MIB: dict[tuple[str, str], tuple[float, float]] = {
    ("sd35m", "transformer/diffusion_pytorch_model.safetensors"): (4.6 * 1024, 0.051 * 1024),
    ("sd35m", "vae/diffusion_pytorch_model.safetensors"): (159.9, 0.051),
    ("sd35m", "text_encoder/model.safetensors"): (235.9, 0.051),
    ("sd35m", "text_encoder_2/model.safetensors"): (1.3 * 1024, 0.051 * 1024),
    ("hpsv2", "HPS_v2.1_compressed.pt"): (1.97e9 / 2**20, 0.0051e9 / 2**20),
    ("imagereward", "ImageReward.pt"): (1.79e9 / 2**20, 0.0051e9 / 2**20),
}
