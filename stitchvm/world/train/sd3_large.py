"""The larger SD3-class sibling: same VAE, same (frozen) text encoders, ten blocks instead of eight.

It starts as the smaller generator with two blocks inserted as identities (zero modulation; depth growth as in
Gong et al., 2019) and is trained on by the same flow-matching loss, its own seed and its own order of samples.
"""

from __future__ import annotations

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import nn

from stitchvm.world.train.common import weights_folder
from stitchvm.world.train.sd3 import SD3Stage, build_transformer

# blocks of the small generator that a new block follows: all after those with dual attention
GROWN = (4, 6)


class SD3LargeStage(SD3Stage):
    """Trains the larger generator and writes weights/sd3_large."""

    name = "sd3_large"
    total_steps = 400
    warmup = 60
    layers = 10
    rates = (3e-3, 5e-4)

    def build(self) -> None:
        self.seed += 100
        self.transformer = build_transformer(
            self.layers, self.width, self.heads, self.dual, self.seed
        )
        small = StableDiffusion3Pipeline.from_pretrained(
            weights_folder() / "sd3", dtype=torch.float32
        )
        self.grow(small.transformer)
        texts = [
            small.text_encoder.requires_grad_(False),
            small.text_encoder_2.requires_grad_(False),
        ]
        self.text = nn.ModuleList(texts)
        self.nets.update({"transformer": self.transformer, "text": self.text})
        self.weigh()

    def grow(self, small: SD3Transformer2DModel) -> None:
        """Copies the small transformer; every new block is the identity on the image and the context."""
        state = {
            k: v for k, v in small.state_dict().items() if not k.startswith("transformer_blocks.")
        }
        place = {}
        target = 0
        for i in range(len(small.transformer_blocks)):
            place[i] = target
            target += 2 if i in GROWN else 1
        for i, block in enumerate(small.transformer_blocks):
            for k, v in block.state_dict().items():
                state[f"transformer_blocks.{place[i]}.{k}"] = v
        missing, unexpected = self.transformer.load_state_dict(state, strict=False)
        assert not unexpected, unexpected
        assert all(int(k.split(".")[1]) not in place.values() for k in missing), missing
