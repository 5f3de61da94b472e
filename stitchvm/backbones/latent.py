"""The identity backbone: u^{≤0}(z_t) = z_t, which makes the *VAE stitch* baseline of the paper.

The stitching layer then reads the noisy latent itself; nothing knows the noise level.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from stitchvm.backbones.base import Backbone, PrefixState


class LatentBackbone(Backbone):
    """Hands the noisy latent through, unchanged.

    Arguments:
        channels: The channels C of the latents (16 for SD 3.5 and FLUX).
        max_depth: As for every backbone; the only depth there is is 0.
        scale: The scaling factor of the VAE whose latents they are; a distillation notes it, and values refuse others.
        shift: Its shift.
    """

    def __init__(
        self,
        channels: int = 16,
        max_depth: int | None = None,
        scale: float | None = None,
        shift: float = 0.0,
    ) -> None:
        super().__init__()
        if max_depth:
            raise ValueError(
                f"max_depth = {max_depth}: the latent backbone has no blocks; stitch it at i = 0"
            )
        if channels < 1:
            raise ValueError(
                f"channels = {channels}, expected at least 1: the VAE's latent channels"
            )
        self.id = "latent"
        self.init_args = {"channels": channels}
        if scale is not None:
            self.read_latents_of(scale, shift)
        self.num_blocks = 0
        self.loaded_blocks = 0
        self.latent_channels = channels

    def read_latents_of(self, scale: float, shift: float) -> None:
        """Notes the VAE's scale and shift, which a value model then keeps."""
        self.init_args |= {"scale": scale, "shift": shift}

    @property
    def scaling(self) -> tuple[float, float] | None:
        """Scale and shift of the latents; None if nobody has said."""
        known: dict[str, Any] = dict(self.init_args)
        return (known["scale"], known["shift"]) if "scale" in known else None

    def width(self, depth: int) -> int:
        """Returns the channels C of the latents."""
        self.check_depth(depth)
        return self.latent_channels

    def forward(self, z_t: Tensor, t: Tensor, depth: int = 0) -> Tensor:
        """Returns z_t with shape (B, C, H, W).

        Raises:
            ValueError: If the latents have other channels, or `depth` is not 0.
        """
        self.check_depth(depth)
        self.check_latents(z_t, t)
        return z_t

    def embed(self, z_t: Tensor, t: Tensor) -> PrefixState:
        """Returns the latent as tokens with shape (B, H * W, C)."""
        height, width = z_t.shape[2:]
        return PrefixState(0, z_t.flatten(2).transpose(1, 2), None, (height, width))

    def advance(self, state: PrefixState) -> PrefixState:
        """Raises ValueError: there are no blocks."""
        raise ValueError("the latent backbone has no blocks: its only depth is 0")

    def suffix(self, state: PrefixState) -> Tensor:
        """Raises ValueError: the identity has no velocity."""
        raise ValueError(
            "the latent backbone predicts no velocity; use the velocity of a Generator instead"
        )

    def flops(self, latent_size: tuple[int, int], depth: int) -> int:
        """Returns 0."""
        return 0
