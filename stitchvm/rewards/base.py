"""The contract of a reward model r_φ that can be cut before block j: r^{≤j−1} and r^{≥j} of Eq. (6)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from stitchvm.deferral import require

__all__ = ["Embedding", "NotFiniteError", "Probe", "Reward", "RewardTail", "require_finite"]


class NotFiniteError(ValueError):
    """A score is NaN or infinite."""


class Embedding(NamedTuple):
    """What a vision tower (or its tail) says of an image.

    Attributes:
        tokens: The per-token output activations h of r^{≥j}, with shape (B, N, D): all tokens, the class
            token first, after the last LayerNorm. Teacher and student give the same N.
        image: The image embedding e, not normalised, with shape (B, E).
    """

    tokens: Tensor
    image: Tensor


class Probe(NamedTuple):
    """What stage 1 wants to know of a clean image, from one pass of the whole tower.

    Attributes:
        patches: r^{≤j−1} for each j, with shape (B, D, h, w).
        class_token: The class token before block j for each j, with shape (B, D).
        image: The image embedding e, not normalised, with shape (B, E).
    """

    patches: dict[int, Tensor]
    class_token: dict[int, Tensor]
    image: Tensor


class RewardTail(nn.Module, ABC):
    """A trainable copy of r_φ^{≥j}: patch tokens before block j → `Embedding`.

    It holds only what r^{≥j} uses: every parameter takes part in `forward`. For j > 1 one of them is a
    class token of that depth, because a latent cannot supply it (docs/handover.md).
    """

    j: int

    @abstractmethod
    def forward(self, h: Tensor, cls: Tensor | None = None) -> Embedding:
        """Maps patch features with shape (B, D, h, w) to tokens and image embedding.

        Arguments:
            h: What the stitching layer hands over in place of r^{≤j−1}.
            cls: The true class token before block j with shape (B, D), if the caller knows it; it takes
                the place of the learned one.

        Raises:
            ValueError: If h does not have the tower's width and patch grid.
        """

    @abstractmethod
    def init_class_token(self, mean: Tensor, readout: Tensor | None = None) -> None:
        """Sets the class token before block j from probe images; no effect for j = 1.

        Arguments:
            mean: The mean class token, with shape (D,); with a `readout`, the intercept of that fit.
            readout: The matrix (D, D) from the mean patch token to the class token, if the tail reads it out.
        """

    @abstractmethod
    def flops(self) -> int:
        """Returns the multiply-add FLOPs (2 per multiply-add) of `forward` for one sample."""


class Reward(nn.Module, ABC):
    """A frozen reward for clean images, built on a vision transformer.

    Pixels are (B, 3, H, W) in [0, 1], of any size; resize, crop and normalisation are the reward's own
    and differentiable. Blocks are counted from 1: j = 1 hands over the patch embedding, before class
    token, positional embedding and first LayerNorm; j > 1 hands over the patch tokens after block j − 1.

    An embedding is a direction: callers may bring image and text embeddings to unit length, and the score is the
    same. A reward that is no cosine puts into them what it likes under that rule; one that cannot be cut
    (ImageReward) raises ValueError where a prefix or a tail is asked for.

    Attributes:
        id: What the reward was loaded from, for messages and model cards.
        init_args: The constructor's arguments as plain data, for `config.json`.
        num_blocks: The number of transformer blocks of the vision tower.
        grid: The patch grid (h, w).
        width: The token width D.
        embed_dim: The image embedding's width E.
        uses_text: Whether `score` needs a text embedding.
        affine: Whether `score` is affine in the normalised image embedding.
        parked: Whether it was parked (`park`).
    """

    id: str
    init_args: dict[str, str | int | float | bool | None]
    num_blocks: int
    grid: tuple[int, int]
    width: int
    embed_dim: int
    uses_text: bool
    affine: bool = True
    parked: bool = False

    @abstractmethod
    def preprocess(self, pixels: Tensor) -> Tensor:
        """Resizes and normalises pixels (B, 3, H, W) in [0, 1] to the tower's input, differentiably."""

    @abstractmethod
    def prefixes(self, pixels: Tensor, js: Sequence[int]) -> dict[int, Tensor]:
        """Returns r^{≤j−1}(pixels) for every j in `js`, each (B, D, h, w), from one pass that stops
        before block max(js)."""

    def prefix(self, pixels: Tensor, j: int) -> Tensor:
        """Returns the patch features r^{≤j−1} that block j is handed, with shape (B, D, h, w)."""
        return self.prefixes(pixels, (j,))[j]

    @abstractmethod
    def class_tokens(self, pixels: Tensor, js: Sequence[int]) -> dict[int, Tensor]:
        """Returns the class token before block j for every j in `js`, each (B, D)."""

    @abstractmethod
    def probe(self, pixels: Tensor, js: Sequence[int]) -> Probe:
        """Returns prefixes, class tokens and image embedding from one pass of the whole tower."""

    @abstractmethod
    def embed(self, pixels: Tensor) -> Embedding:
        """Returns the whole tower's tokens and image embedding: the teacher of Eq. (78)."""

    @abstractmethod
    def tail(self, j: int) -> RewardTail:
        """Returns a trainable deep copy of r^{≥j}; `tail(j)(prefix(x, j))` is the whole tower's embedding
        for j = 1, and for j > 1 up to the class token, which a latent cannot supply."""

    @abstractmethod
    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Returns text embeddings with shape (B, E), normalised (where `score` is affine; else what `score` takes,
        one row a prompt). Raises ValueError if not `uses_text`."""

    @abstractmethod
    def score(self, image: Tensor, text: Tensor | None = None) -> Tensor:
        """Returns r with shape (B,) from image embeddings (B, E) (normalised here) and text (B, E).

        Where the score is affine in the normalised image embedding (see `affine`), an average of normalised
        embeddings gives the average of scores.

        Raises:
            NotFiniteError: If a score is not finite.
            ValueError: If text is missing or does not match."""

    @abstractmethod
    def flops(self) -> int:
        """Returns the multiply-add FLOPs (2 per multiply-add) of `embed` for one image."""

    def park(self) -> None:
        """Lets its networks wait in CPU memory between calls, from now on, where the reward knows how to."""
        return None

    def drop_tower(self) -> None:
        """Frees what looks at images, where the reward knows how to; texts are encoded and embeddings scored still."""
        return None

    def repeated(self) -> list[nn.Module]:
        """Returns the blocks of the network that looks at images, for `compile_forward`; none by default."""
        return []

    def forward(self, pixels: Tensor, text: Tensor | None = None) -> Tensor:
        """Returns r(pixels) with shape (B,), differentiable in the pixels."""
        return self.score(self.embed(pixels).image, text)


def require_finite(r: Tensor, name: str) -> None:
    """Raises NotFiniteError if a reward is NaN or infinite, under the name of what computed it."""

    def error() -> NotFiniteError:
        return NotFiniteError(
            f"{name}: {int((~finite).sum())} of {len(finite)} rewards are not finite (NaN or infinity). Look at "
            "the images or latents that came in; dtype float32 if it was float16."
        )

    finite = r.isfinite()
    require(finite, error)
