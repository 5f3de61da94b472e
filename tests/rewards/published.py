"""Tiny checkpoints with random weights in the published formats of PickScore and ImageReward."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from rehearsal_shapes import imagereward_shapes

WORDS = ("a", "red", "blue", "circle", "square", "above", "##s", "the", "left", "of")
MED: dict[str, Any] = {
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 40,
    "model_type": "bert",
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "vocab_size": 5 + len(WORDS) + 2,
    "encoder_width": 768,
    "add_cross_attention": True,
}


def clip_tokenizer() -> CLIPTokenizer:
    """Returns a tokenizer of letters in which the end of text has the highest id, as in the published ones."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    pieces = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=16)


def pickscore_model(eos: int = 2, seed: int = 0, image_size: int = 32) -> CLIPModel:
    """Returns a `CLIPModel` with 4 vision blocks of width 32 and noise on every parameter.

    Arguments:
        eos: The configuration's end of text: 2, as in old files, or the tokenizer's.
    """
    towers = {"hidden_size": 32, "num_attention_heads": 2, "hidden_act": "gelu"}
    text = {"vocab_size": 54, "max_position_embeddings": 16, "num_hidden_layers": 2}
    text |= {"bos_token_id": 52, "pad_token_id": 1}
    vision = {"image_size": image_size, "patch_size": 8, "num_hidden_layers": 4}
    config = CLIPConfig(
        text_config=towers | text | {"intermediate_size": 40, "eos_token_id": eos},
        vision_config=towers | vision | {"intermediate_size": 48},
        projection_dim=24,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPModel(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.15 * torch.randn(parameter.shape))
            model.logit_scale.fill_(4.6)  # exp(4.6) = 99.5, near the published one
    return model


def pickscore_folder(folder: Path, tokenizer: bool = True, **changes: Any) -> str:
    """Writes what `save_pretrained` writes for PickScore (and its processor), and returns the path."""
    pickscore_model(**changes).save_pretrained(folder)
    if tokenizer:
        processor_folder(folder)
    return str(folder)


def processor_folder(folder: Path, size: int = 32, resample: int = 3) -> str:
    """Writes a tokenizer and a preprocessor_config.json, and returns the path."""
    clip_tokenizer().save_pretrained(folder)
    settings = {
        "crop_size": {"height": size, "width": size},
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.2, 0.25, 0.3],
        "resample": resample,
        "size": {"shortest_edge": size},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return str(folder)


def imagereward_state(
    width: int = 128, depth: int = 3, image: int = 32, patch: int = 16, seed: int = 0
) -> dict[str, Tensor]:
    """Returns random tensors under the names and in the shapes of ImageReward.pt, with smaller numbers."""
    shapes = imagereward_shapes(width, depth, image, patch, MED, ratio=2)
    positions = "blip.text_encoder.embeddings.position_ids"
    del shapes[positions]
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            gain = name.endswith(".weight")  # of a LayerNorm
            state[name] = gain + 0.2 * noise
        else:
            fan_in = noise[0].numel() if name.endswith(".weight") else 1
            state[name] = noise * (1.5 / fan_in**0.5)
    state[positions] = torch.arange(MED["max_position_embeddings"])[None]
    return state


def imagereward_folder(
    folder: Path, state: dict[str, Tensor] | None = None, vocabulary: bool = True
) -> str:
    """Writes ImageReward.pt, med_config.json and BERT's vocab.txt, and returns the path."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(imagereward_state() if state is None else state, folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps(MED))
    if vocabulary:
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
        (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return str(folder)
