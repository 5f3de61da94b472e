"""ImageReward (Xu et al., arXiv 2304.05977): BLIP's text encoder reads the prompt while it looks at the image.

    h = ViT(x)                                  image tokens (N, D), ViT-L/16 at 224 pixels
    c = BERT(prompt; h)[CLS]                    cross-attention to h in every layer
    r = (MLP(c) − 0.16717…)/1.03333…            the published mean and deviation

Image and prompt meet in twelve layers and not in a product, so that the score is no function of two short
embeddings. It keeps the contract of `Reward` in this way: the "image embedding" is all image tokens, the "text
embedding" the token ids, and the score runs the text encoder. Both are written in homogeneous coordinates, with a 1
at the end, so that whoever brings them to unit length loses nothing: the score divides by the last coordinate.
It is not affine in them, and a tower of it is not stitched: prefixes and tails are errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from stitchvm.rewards.base import Embedding, Probe, Reward, RewardTail, require_finite
from stitchvm.rewards.blip import load_imagereward
from stitchvm.rewards.open_clip_reward import DTYPES
from stitchvm.rewards.preprocess import Preprocess

__all__ = ["ImageReward"]

TOKENIZER = "google-bert/bert-base-uncased"
LENGTH = 35  # tokens of a prompt, [CLS] and [SEP] included; the rest is cut off
MEAN, STD = 0.16717362830052426, 1.0333394966054072
PIXEL_MEAN, PIXEL_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class ImageReward(Reward):
    """ImageReward-v1.0, the human preference for an image given its prompt: usually −2 to 2.

    Arguments:
        model: A hub id or folder with ImageReward.pt and med_config.json, as published.
        tokenizer: A hub id or folder of bert-base-uncased. None: `model` itself if it has a vocabulary, else
            the published one.
        dtype: "float32", "bfloat16" or "float16"; preprocessing and the MLP are float32.
        check_finite: Whether a score that is not finite is an error.

    Raises:
        FileNotFoundError: If a file, folder or hub repository is not there.
        ValueError: If the checkpoint or the tokenizer does not fit.
    """

    affine = False
    uses_text = True

    def __init__(
        self,
        model: str = "THUDM/ImageReward",
        tokenizer: str | None = None,
        dtype: str = "float32",
        check_finite: bool = True,
    ) -> None:
        super().__init__()
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
        network, size, self.tokenizer = load_imagereward(model, tokenizer, TOKENIZER)
        self.id, self.check_finite = model, check_finite
        self.visual: Any = network.visual
        self.text: Any = network.text
        self.head: Any = network.head
        config: Any = network.visual.config
        self.num_blocks, self.width = config.num_hidden_layers, config.hidden_size
        self.grid = (size // config.patch_size,) * 2
        self.num_tokens = 1 + self.grid[0] * self.grid[1]
        self.embed_dim = self.num_tokens * self.width + 1
        self.preprocessing = Preprocess((size, size), "shortest", PIXEL_MEAN, PIXEL_STD)
        self.to(getattr(torch, dtype)).requires_grad_(False).eval()
        self.head.float()
        self.init_args = {
            "model": model,
            "tokenizer": tokenizer,
            "dtype": dtype,
            "check_finite": check_finite,
        }

    def train(self, mode: bool = True) -> ImageReward:
        """Stays in eval mode: the reward is frozen."""
        super().train(False)
        return self

    def preprocess(self, pixels: Tensor) -> Tensor:
        """Resizes and normalises pixels (B, 3, H, W) in [0, 1] to the tower's input, float32.

        Raises:
            ValueError: If pixels are not a batch of floating RGB images.
        """
        return self.preprocessing(pixels)

    def embed(self, pixels: Tensor) -> Embedding:
        """Returns the image tokens (B, N, D) and, as image embedding, all of them with a 1 (B, N·D + 1)."""
        tokens = self.visual(pixel_values=self.preprocess(pixels)).last_hidden_state
        return Embedding(tokens, _append_one(tokens.flatten(1)))

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Returns the prompts' token ids with a 1, with shape (B, 36), float32; −1 where there is no token.

        Raises:
            ValueError: If `prompts` is a single string.
        """
        if isinstance(prompts, str):
            raise ValueError(f"expected a list of prompts, got one string: [{prompts!r}]")
        device = next(self.text.parameters()).device
        if not prompts:
            return torch.zeros(0, LENGTH + 1, device=device)
        batch = self.tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=LENGTH,
            return_tensors="pt",
        )
        ids = batch.input_ids.masked_fill(batch.attention_mask == 0, -1)
        return _append_one(ids.float()).to(device)

    def score(self, image: Tensor, text: Tensor | None = None) -> Tensor:
        """Returns r with shape (B,), float32, from what `embed` and `encode_text` returned.

        Arguments:
            image: Image embeddings with shape (B, N·D + 1), of any length.
            text: Text embeddings with shape (B, 36) or (1, 36), of any length.

        Raises:
            NotFiniteError: If a score is not finite.
            ValueError: If image or text has another shape.
        """
        if image.ndim != 2 or image.shape[1] != self.embed_dim:
            raise ValueError(
                f"{self._name} scores image embeddings (B, {self.embed_dim}), got {tuple(image.shape)}"
            )
        if text is None:
            raise ValueError(
                f"{self._name} compares images with text: pass what encode_text(prompts) returns"
            )
        if text.ndim != 2 or text.shape[0] not in (1, len(image)) or text.shape[1] != LENGTH + 1:
            raise ValueError(
                f"{self._name} got {len(image)} image embeddings and text {tuple(text.shape)}: expected "
                f"({len(image)}, {LENGTH + 1}) or (1, {LENGTH + 1})"
            )
        with torch.autocast(image.device.type, enabled=False):
            ids = _divide_by_last(text).round().long().expand(len(image), -1)
            tokens = _divide_by_last(image).unflatten(1, (self.num_tokens, self.width))
            hidden = self.text(
                input_ids=ids.clamp(min=0),
                attention_mask=(ids >= 0).long(),
                encoder_hidden_states=tokens.to(next(self.text.parameters()).dtype),
            ).last_hidden_state
            x = hidden[:, 0].float()
            for layer in self.head.values():
                # float32 whatever the module was cast to
                x = nn.functional.linear(x, layer.weight.float(), layer.bias.float())
            r = (x.squeeze(-1) - MEAN) / STD
        if self.check_finite and not torch.compiler.is_compiling():
            require_finite(r, self._name)
        return r

    def prefixes(self, pixels: Tensor, js: Sequence[int]) -> dict[int, Tensor]:
        """Raises ValueError: it is not stitched."""
        self._cannot_be_cut()

    def class_tokens(self, pixels: Tensor, js: Sequence[int]) -> dict[int, Tensor]:
        """Raises ValueError: it is not stitched."""
        self._cannot_be_cut()

    def probe(self, pixels: Tensor, js: Sequence[int]) -> Probe:
        """Raises ValueError: it is not stitched."""
        self._cannot_be_cut()

    def tail(self, j: int) -> RewardTail:
        """Raises ValueError: it is not stitched."""
        self._cannot_be_cut()

    def flops(self) -> int:
        """Returns the multiply-add FLOPs (2 per multiply-add) of `embed` and `score` for one image."""
        n, vision, text = self.num_tokens, self.visual.config, self.text.config
        d, e = vision.hidden_size, text.hidden_size
        block = n * (4 * d * d + 2 * d * vision.intermediate_size) + 2 * n * n * d
        own = LENGTH * (4 * e * e + 2 * e * text.intermediate_size) + 2 * LENGTH * LENGTH * e
        cross = 2 * LENGTH * e * e + 2 * n * d * e + 2 * LENGTH * n * e
        head = sum(layer.weight.numel() for layer in self.head.values())
        patches = (n - 1) * 3 * vision.patch_size**2 * d
        total = patches + self.num_blocks * block + text.num_hidden_layers * (own + cross) + head
        return int(2 * total)

    def _cannot_be_cut(self) -> NoReturn:
        raise ValueError(
            f"{self._name} cannot be cut and stitched: its text encoder looks at all image tokens, and its score is "
            "no function of an image embedding. Use it as a terminal, Tweedie or Monte Carlo value and to "
            "evaluate samples; distil a CLIP, HPSv2, PickScore or aesthetic reward."
        )

    @property
    def _name(self) -> str:
        return f"{type(self).__name__}({self.id})"


def _append_one(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_ones(len(x), 1)], dim=1)


def _divide_by_last(x: Tensor) -> Tensor:
    """Returns the coordinates (B, n) of homogeneous ones (B, n + 1), float32."""
    x = x.float()
    return x[:, :-1] / x[:, -1:]
