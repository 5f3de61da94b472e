"""Small parts with known answers: a generator whose flow is a closed-form world, rewards that are easy to check."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stitchvm.rewards.base import Embedding, Probe, Reward, RewardTail
from stitchvm.world.closed_form import KnownReward, MixtureWorld


class IdentityVAE(nn.Module):
    """Pixels are latents."""

    id = "identity"

    def __init__(self) -> None:
        super().__init__()
        self.decoded = 0

    def encode(self, pixels: Tensor) -> Tensor:
        return pixels

    def decode(self, z_0: Tensor) -> Tensor:
        self.decoded += 1
        return z_0


class WorldGenerator(nn.Module):
    """The exact velocity of a closed-form world; a prompt "+x" adds x to the data's means."""

    id = "closed form"

    def __init__(self, world: MixtureWorld) -> None:
        super().__init__()
        self.world, self.vae, self.null = world, IdentityVAE(), None
        self.calls = 0

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        return torch.tensor([float(prompt or 0) for prompt in prompts]).double()

    def velocity(
        self, z_t: Tensor, t: Tensor, cond: Any, guidance_scale: float | None = None
    ) -> Tensor:
        assert guidance_scale == 1.0
        self.calls += 1
        if cond is None:
            return self.world.velocity(z_t, t).to(z_t.dtype)
        shift = cond.reshape(-1, 1, 1, 1)
        t_ = t.reshape(-1, 1, 1, 1).to(z_t.dtype)
        return (self.world.velocity(z_t - (1 - t_) * shift, t) - shift).to(z_t.dtype)


class FakeTail(RewardTail):
    """Mean over the patches and a linear map."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.j, self.head = 1, head

    def forward(self, h: Tensor, cls: Tensor | None = None) -> Embedding:
        tokens = h.flatten(2).transpose(1, 2)
        return Embedding(tokens, self.head(tokens.mean(dim=1)))

    def init_class_token(self, mean: Tensor) -> None:
        return None

    def flops(self) -> int:
        return 1


class FakeReward(Reward):
    """Mean over the patches of a fixed projection; texts are "a,b,…", the embedding itself."""

    def __init__(self, channels: int = 3, embed_dim: int = 4, uses_text: bool = True) -> None:
        super().__init__()
        self.id, self.init_args = (
            "fake reward",
            {"channels": channels, "embed_dim": embed_dim, "uses_text": uses_text},
        )
        self.num_blocks, self.grid, self.width = 1, (4, 4), channels
        self.embed_dim, self.uses_text = embed_dim, uses_text
        self.head = nn.Linear(channels, embed_dim)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            self.head.weight.copy_(torch.randn(embed_dim, channels, generator=generator))
            self.head.bias.zero_()
        self.encoded: list[str] = []

    def preprocess(self, pixels: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(pixels, self.grid)

    def prefixes(self, pixels: Tensor, js: Sequence[int]) -> dict[int, Tensor]:
        return dict.fromkeys(js, self.preprocess(pixels))

    def class_tokens(self, pixels: Tensor, js: Sequence[int]) -> dict[int, Tensor]:
        return dict.fromkeys(js, pixels.new_zeros(len(pixels), self.width))

    def probe(self, pixels: Tensor, js: Sequence[int]) -> Probe:
        return Probe(
            self.prefixes(pixels, js), self.class_tokens(pixels, js), self.embed(pixels).image
        )

    def embed(self, pixels: Tensor) -> Embedding:
        return FakeTail(self.head)(self.preprocess(pixels))

    def tail(self, j: int) -> RewardTail:
        head = nn.Linear(self.width, self.embed_dim)
        head.load_state_dict(self.head.state_dict())
        return FakeTail(head)

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        self.encoded += prompts
        lines = [[float(x) for x in prompt.split(",")] for prompt in prompts]
        return F.normalize(torch.tensor(lines), dim=-1)

    def score(self, image: Tensor, text: Tensor | None = None) -> Tensor:
        image = F.normalize(image, dim=-1)
        return 10 * image[:, 0] + 2 if text is None else 3 * (image * text).sum(dim=-1) + 1

    def flops(self) -> int:
        return 1


class ClosedFormReward(FakeReward):
    """A known reward r in the library's form: ẽ = (r/K, √(1 − (r/K)²)), score K·ẽ_1 (−K·ẽ_1 for the prompt "-")."""

    def __init__(self, known: KnownReward, bound: float = 200.0, uses_text: bool = False) -> None:
        super().__init__(uses_text=uses_text)
        self.known, self.bound, self.embed_dim = known, bound, 2
        self.looked = 0

    def embed(self, pixels: Tensor) -> Embedding:
        self.looked += 1
        share = self.known(pixels) / self.bound
        assert float(share.detach().abs().max()) < 1
        image = torch.stack([share, (1 - share**2).sqrt()], dim=-1)
        return Embedding(image[:, None], image)

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        self.encoded += prompts
        return torch.tensor([[-1.0 if prompt == "-" else 1.0] for prompt in prompts])

    def score(self, image: Tensor, text: Tensor | None = None) -> Tensor:
        score = self.bound * F.normalize(image, dim=-1)[:, 0]
        return score if text is None else score * text[:, 0]


class BentReward(ClosedFormReward):
    """A reward that is not affine in its embedding."""

    affine = False

    def score(self, image: Tensor, text: Tensor | None = None) -> Tensor:
        return super().score(image, text).square()


def mixture(channels: int = 2) -> MixtureWorld:
    """Returns two modes of different width with event shape (channels, 1, 1)."""
    means = torch.tensor([[1.5, -0.5], [-1.0, 1.0]])[:, :channels, None, None]
    return MixtureWorld(torch.tensor([0.4, 0.6]), means, torch.tensor([0.2, 0.5]))


def known() -> KnownReward:
    """Returns a curved reward, so that Tweedie has a Jensen gap."""
    return KnownReward.quadratic(torch.tensor([1.0, 0.0])[:, None, None], k=1.5)
