"""What all rewards on a CLIP share: one frozen vision tower of open_clip, cut before any block, and its text tower.

A `CLIPModel` of transformers passes for one of open_clip's (`transformers_clip.py`).

e = r_φ(x),    tokens h = ln_post(blocks(…)),    score = cos(e, text)    unless a subclass says otherwise
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stitchvm.rewards.attention import unify_attention
from stitchvm.rewards.base import Embedding, Probe, Reward, require_finite
from stitchvm.rewards.clip_tail import CLASS_TOKENS, CLIPTail, block_flops, read_out
from stitchvm.rewards.parking import CPU, present
from stitchvm.rewards.preprocess import Preprocess
from stitchvm.rewards.transformers_clip import TransformersTower

if TYPE_CHECKING:
    from stitchvm.rewards.checkpoint import LoadedCLIP

__all__ = ["OpenCLIPReward"]

DTYPES = ("float32", "bfloat16", "float16")
TEXT_CACHE = 16384  # prompts; 64 MB at E = 1024
TEXT_BATCH = 256


class OpenCLIPReward(Reward):
    """A frozen CLIP, with `score` the cosine of image and text embedding.

    Arguments:
        loaded: The model with its preprocessing and tokenizer.
        id: What it was loaded from.
        dtype: The dtype of the networks: "float32", "bfloat16" or "float16". Preprocessing and scores are
            float32.
        resize_mode: How images become square (`Preprocess`); the checkpoint's own if None.
        class_token: What `tail(j)` with j > 1 does for a class token: "trainable", "constant", "readout" or
            "literal" (`CLIPTail`).
        gradient_checkpointing: Whether tails compute their blocks again in the backward pass.
        check_finite: Whether `score` raises on NaN and infinity. It waits for the device once a call.
        uses_text: Whether there is a text tower to keep.
    """

    def __init__(
        self,
        loaded: LoadedCLIP,
        *,
        id: str,
        dtype: str = "float32",
        resize_mode: str | None = None,
        class_token: str = "trainable",
        gradient_checkpointing: bool = False,
        check_finite: bool = True,
        uses_text: bool = True,
    ) -> None:
        super().__init__()
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
        if class_token not in CLASS_TOKENS:
            raise ValueError(
                f"class_token {class_token!r}: expected one of {', '.join(CLASS_TOKENS)}"
            )
        from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

        visual = _checked_tower(loaded.model, id)
        unify_attention(loaded.model)
        self.id, self.uses_text, self.check_finite = id, uses_text, check_finite
        self.class_token, self.gradient_checkpointing = class_token, gradient_checkpointing
        self.num_blocks = len(visual.transformer.resblocks)
        self.grid, self.width = tuple(visual.grid_size), visual.conv1.out_channels
        self.embed_dim = visual.proj.shape[1]
        preset = loaded.preprocess
        self.preprocessing = Preprocess(
            tuple(visual.image_size),
            resize_mode or preset.get("resize_mode") or "shortest",
            tuple(preset.get("mean") or OPENAI_DATASET_MEAN),
            tuple(preset.get("std") or OPENAI_DATASET_STD),
            "bilinear" if preset.get("interpolation") == "bilinear" else "bicubic",
        )
        self.visual: Any = visual
        del loaded.model.visual
        self.text: Any = loaded.model if uses_text else None
        self.tokenizer = loaded.tokenizer if uses_text else None
        self._text_cache: OrderedDict[str, Tensor] = OrderedDict()
        self._home: torch.device | None = None
        self.to(getattr(torch, dtype)).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> OpenCLIPReward:
        """Stays in eval mode: the reward is frozen."""
        super().train(False)
        return self

    def park(self) -> None:
        """Lets vision and text tower wait in CPU memory between calls, from now on; no effect on a CPU."""
        self.parked, self._home = True, self._device
        for tower in (self.visual, self.text):
            if tower is not None:
                tower.to("cpu")

    def drop_tower(self) -> None:
        """Frees the vision tower: prompts are encoded and embeddings scored as before, but no more images looked at."""
        self.visual = None

    @property
    def _device(self) -> torch.device:
        """Where text embeddings go: where the towers are, or were before they were parked."""
        towers = (tower for tower in (self.visual, self.text) if tower is not None)
        return self._home or next((p.device for tower in towers for p in tower.parameters()), CPU)

    @contextmanager
    def _tower(self, device: torch.device) -> Iterator[Any]:
        """Gives the vision tower, on a device.

        Raises:
            ValueError: If it was dropped.
        """
        if self.visual is None:
            raise ValueError(
                f"{self._name} has dropped its vision tower (drop_tower) and looks at no images: load another."
            )
        with present(self.visual, device, self.parked):
            yield self.visual

    def repeated(self) -> list[nn.Module]:
        """Returns the blocks of the vision tower, for `compile_forward`."""
        return [] if self.visual is None else list(self.visual.transformer.resblocks)

    def preprocess(self, pixels: Tensor) -> Tensor:
        """Resizes and normalises pixels (B, 3, H, W) in [0, 1] to the tower's input, float32.

        Raises:
            ValueError: If pixels are not a batch of floating RGB images.
        """
        return self.preprocessing(pixels)

    def prefixes(self, pixels: Tensor, js: Sequence[int]) -> dict[int, Tensor]:
        """Returns r^{≤j−1}(pixels) for every j in `js`, each (B, D, h, w), from one pass that stops before
        block max(js).

        Raises:
            ValueError: If a j does not exist.
        """
        with self._tower(pixels.device) as v:
            return self._run(v, pixels, js, whole=False)[0]

    def class_tokens(self, pixels: Tensor, js: Sequence[int]) -> dict[int, Tensor]:
        """Returns the class token before block j for every j in `js`, each (B, D).

        For j = 1 that is the class embedding, to which the tail adds the position.
        """
        with self._tower(pixels.device) as v:
            return self._run(v, pixels, js, whole=False)[1]

    def probe(self, pixels: Tensor, js: Sequence[int]) -> Probe:
        """Returns prefixes, class tokens and image embedding from one pass of the whole tower."""
        with self._tower(pixels.device) as v:
            patches, class_token, x = self._run(v, pixels, js, whole=True)
            return Probe(patches, class_token, read_out(x, v).image)

    def embed(self, pixels: Tensor) -> Embedding:
        """Returns the tower's tokens (B, 1 + h w, D) and image embedding (B, E)."""
        with self._tower(pixels.device) as v:
            return read_out(self._run(v, pixels, (), whole=True)[2], v)

    def tail(self, j: int) -> CLIPTail:
        """Returns a trainable deep copy of r^{≥j}, in the reward's dtype.

        Raises:
            ValueError: If there is no block j.
        """
        with self._tower(self._device) as v:
            return CLIPTail(v, j, self.class_token, self.gradient_checkpointing)

    def _run(
        self, v: Any, pixels: Tensor, js: Sequence[int], whole: bool
    ) -> tuple[dict[int, Tensor], dict[int, Tensor], Tensor]:
        """Returns patches and class token before each j, and the tokens where the pass ended."""
        bad = [j for j in js if not 1 <= j <= self.num_blocks]
        if bad or not (js or whole):
            raise ValueError(f"j = {bad or list(js)}: {self.id} has blocks 1..{self.num_blocks}")
        patches: dict[int, Tensor] = {}
        cls: dict[int, Tensor] = {}
        x = v.conv1(self.preprocess(pixels).to(v.conv1.weight.dtype))
        last = self.num_blocks + 1 if whole else max(js)
        own = v.class_embedding.to(x.dtype).expand(len(x), -1)
        if 1 in js:
            patches[1], cls[1] = x, own
        if last > 1:
            x = torch.cat([own[:, None], x.flatten(2).transpose(1, 2)], dim=1)
            x = v.ln_pre(x + v.positional_embedding.to(x.dtype))
        for j, block in enumerate(v.transformer.resblocks[: last - 1], start=2):
            x = block(x)
            if j in js:
                cls[j] = x[:, 0]
                patches[j] = x[:, 1:].transpose(1, 2).unflatten(2, self.grid)
        return patches, cls, x

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Returns text embeddings with shape (B, E), normalised, float32; the last few thousand are kept.

        Raises:
            ValueError: If the reward has no text tower, or `prompts` is a single string.
        """
        if self.text is None or self.tokenizer is None:
            raise ValueError(f"{self._name} reads no text: score its image embeddings without any")
        if isinstance(prompts, str):
            raise ValueError(f"expected a list of prompts, got one string: [{prompts!r}]")
        device = self._device
        new = [p for p in dict.fromkeys(prompts) if p not in self._text_cache]
        fresh: dict[str, Tensor] = {}
        # in the tower's own dtype: what it says is kept, and not to depend on who asks for it first
        with (
            present(self.text, device, self.parked and bool(new)),
            torch.autocast(device.type, enabled=False),
        ):
            for k in range(0, len(new), TEXT_BATCH):
                part = new[k : k + TEXT_BATCH]
                e = self.text.encode_text(self.tokenizer(part).to(device))
                fresh.update(zip(part, F.normalize(e.float(), dim=-1).unbind(), strict=True))
        rows = [fresh[p] if p in fresh else self._text_cache[p] for p in prompts]
        self._text_cache.update(fresh)
        for p in prompts:
            self._text_cache.move_to_end(p)
        while len(self._text_cache) > TEXT_CACHE:
            self._text_cache.popitem(last=False)
        if not rows:
            return torch.zeros(0, self.embed_dim, device=device)
        return torch.stack([row.to(device) for row in rows])

    def score(self, image: Tensor, text: Tensor | None = None) -> Tensor:
        """Returns r with shape (B,), float32, from image embeddings (B, E) and text embeddings.

        Arguments:
            image: Image embeddings with shape (B, E); normalised here.
            text: Normalised text embeddings with shape (B, E) or (1, E), if the reward uses text.

        Raises:
            NotFiniteError: If a score is not finite.
            ValueError: If text is missing or does not match.
        """
        if image.ndim != 2 or image.shape[1] != self.embed_dim:
            raise ValueError(
                f"{self._name} scores image embeddings (B, {self.embed_dim}), got {tuple(image.shape)}"
            )
        with torch.autocast(image.device.type, enabled=False):
            r = self._score(F.normalize(image.float(), dim=-1), text)
        if self.check_finite and not torch.compiler.is_compiling():
            require_finite(r, self._name)
        return r

    def _score(self, e: Tensor, text: Tensor | None) -> Tensor:
        """Returns r from normalised embeddings; a subclass may put a head here."""
        if text is None:
            raise ValueError(
                f"{self._name} compares images with text: pass the embeddings of encode_text(prompts)"
            )
        if text.ndim != 2 or text.shape[0] not in (1, len(e)) or text.shape[1] != self.embed_dim:
            raise ValueError(
                f"{self._name} got {len(e)} image embeddings and text embeddings {tuple(text.shape)}: "
                f"expected ({len(e)}, {self.embed_dim}) or (1, {self.embed_dim})"
            )
        return (e * text.float()).sum(-1)

    def flops(self) -> int:
        """Returns the multiply-add FLOPs (2 per multiply-add) of `embed` for one image, resize not counted."""
        patches = self.grid[0] * self.grid[1]
        with self._tower(CPU) as v:
            blocks = sum(block_flops(b, 1 + patches, self.width) for b in v.transformer.resblocks)
            return 2 * patches * v.conv1.weight.numel() + blocks + 2 * v.proj.numel()

    @property
    def _name(self) -> str:
        return f"{type(self).__name__}({self.id})"


def _checked_tower(model: Any, id: str) -> Any:
    """Returns the vision tower, if it is one that can be cut.

    Raises:
        ValueError: If it is a ResNet, or pools in a way that is not a class token or an average.
    """
    from open_clip.transformer import VisionTransformer

    visual = model.visual
    if isinstance(visual, TransformersTower):
        return visual
    if not isinstance(visual, VisionTransformer):
        raise ValueError(
            f"{id}: the vision tower is a {type(visual).__name__}; expected open_clip's VisionTransformer"
        )
    if visual.attn_pool is not None or visual.pool_type not in ("tok", "avg"):
        raise ValueError(
            f"{id}: expected a tower that pools its class token or averages its patches"
        )
    return visual
