"""Stage 1: where to stitch, Eq. (7) and (59)–(62).

For every backbone block i and reward block j, the closed-form map between features on the reward's patch grid is

    W*, b* = argmin Σ ‖W u^{≤i}(z_t) + b − r^{≤j−1}(z_0)‖²

over the tokens of N_probe images with t ~ Unif[0, 1]. With S_xx = Σ x xᵀ and S_xy = Σ x yᵀ the solution is
S_xx⁻¹ S_xy, so one streamed pass over the images serves *all* pairs and nothing but these matrices is kept,
in float64. Features are shifted by the mean of the first batch before they are multiplied, which keeps the normal
equations as accurate as a least-squares solver on the stacked features. Once the images to fit are through, the maps
are solved and the held-out images that follow are streamed through them.

The paper chooses the pair with the lowest loss (`criterion="feature"`). It reports that this ranks the good cells
poorly: the loss grows with the scale of the reward's features and does not see which errors matter. The second
criterion (`"embedding"`) runs the frozen tail on the closed-form features of a few held-out images and measures the
distance ‖ẽ − ẽ_RM‖² of what reaches the end. A tail is run for one cell, a pass serves all of them, so that for each
j only the depths with the lowest loss on the fitted images get that far: for one j losses have one scale.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stitchvm.backbones.base import Backbone
from stitchvm.path import FlowPath
from stitchvm.randomness import keyed_normal, keyed_uniform
from stitchvm.rewards.base import Reward
from stitchvm.stitch import up

__all__ = ["CRITERIA", "NormalEquations", "SearchResult", "search"]

CRITERIA = {"feature": "feature_loss", "embedding": "embedding_error"}


class NormalEquations:
    """Sums of products of inputs x and several targets y_j in float64, and the least-squares maps they give.

    Arguments:
        shift_x: A vector (D,) near the mean of x; subtracted before products are formed.
        shift_y: The same for the targets side by side, with shape (Σ D_j,).
    """

    def __init__(self, shift_x: Tensor, shift_y: Tensor) -> None:
        self.shift_x, self.shift_y = shift_x.double(), shift_y.double()
        D, E = len(shift_x), len(shift_y)
        zeros = partial(torch.zeros, dtype=torch.float64, device=shift_x.device)
        self.n = 0
        self.sum_x, self.sum_y = zeros(D), zeros(E)
        self.xx, self.xy = zeros(D, D), zeros(D, E)
        self.yy = zeros(E)

    def update(self, x: Tensor, y: Tensor) -> None:
        """Adds tokens x (n, D) and their targets y (n, Σ D_j)."""
        self.add(x.double() - self.shift_x, y.double() - self.shift_y)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Adds what is float64 and shifted already: targets that many equations share are shifted once."""
        self.n += len(x)
        self.sum_x += x.sum(0)
        self.sum_y += y.sum(0)
        self.xx.addmm_(x.T, x)
        self.xy.addmm_(x.T, y)
        self.yy += y.square().sum(0)

    def solve(self, columns: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Returns W (D_y, D) and b (D_y,) of least squares with a bias, Eq. (62).

        Directions without variance (up to float64 rounding) get weight zero, as a minimum-norm solver gives.
        """
        mean_x, mean_y = self.sum_x / self.n, self.sum_y[columns] / self.n
        xx = self.xx - self.n * torch.outer(mean_x, mean_x)
        xy = self.xy[:, columns] - self.n * torch.outer(mean_x, mean_y)
        scale = xx.diagonal().clamp_min(0).sqrt()
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        gram, rhs = xx / torch.outer(scale, scale), xy / scale[:, None]
        factor, info = torch.linalg.cholesky_ex(gram)
        well_posed = int(info) == 0 and float(factor.diagonal().min()) > 1e-6
        if well_posed:
            w = torch.cholesky_solve(rhs, factor)
            w = w + torch.cholesky_solve(rhs - gram @ w, factor)  # one step of refinement
        else:
            w = torch.linalg.pinv(gram, hermitian=True, rtol=1e-12) @ rhs
        W = (w / scale[:, None]).T
        b = mean_y + self.shift_y[columns] - W @ (mean_x + self.shift_x)
        return W, b

    def squared_error(self, W: Tensor, b: Tensor, columns: slice = slice(None)) -> float:
        """Returns Σ ‖W x + b − y‖² over everything seen, from the sums alone."""
        c = b + W @ self.shift_x - self.shift_y[columns]  # the bias in shifted coordinates
        quadratic = (W @ self.xx * W).sum() + self.yy[columns].sum()
        cross = -2 * (W.T * self.xy[:, columns]).sum()
        bias = self.n * c.square().sum() + 2 * c @ (W @ self.sum_x - self.sum_y[columns])
        return float(quadratic + cross + bias)

    def variance(self, columns: slice = slice(None)) -> float:
        """Returns Σ ‖y − ȳ‖² over everything seen."""
        total = self.yy[columns].sum() - self.sum_y[columns].square().sum() / self.n
        return float(total)


@dataclass
class SearchResult:
    """What stage 1 found.

    Attributes:
        records: One dict per cell: i, j, feature_loss (held-out mean squared error), fit_loss, unexplained
            (held-out fraction of variance), embedding_error (None where it was not measured).
        timing: Seconds of the pass: "encode" (the VAE), "features" (all of backbone and reward), "gram",
            "solve", "tail" and "total".
        normal: The normal equations per i, over all j side by side.
        columns: The columns of each j in them.
        class_tokens: The probe mean of the class token before block j, with shape (D,), for each j.
    """

    records: list[dict[str, Any]]
    timing: dict[str, float]
    normal: dict[int, NormalEquations] = field(repr=False)
    columns: dict[int, slice] = field(repr=False)
    class_tokens: dict[int, Tensor] = field(repr=False)

    def best(self, criterion: str = "feature") -> tuple[int, int]:
        """Returns the cell (i*, j*) with the lowest held-out loss of a criterion ("feature", "embedding").

        Raises:
            ValueError: If the criterion is unknown or was not measured.
        """
        if criterion not in CRITERIA:
            raise ValueError(f"criterion {criterion!r}: expected one of {sorted(CRITERIA)}")
        key = CRITERIA[criterion]
        measured = [record for record in self.records if record[key] is not None]
        if not measured:
            raise ValueError(
                f"criterion {criterion!r} was not measured; set num_end_probes above 0 in the search"
            )
        record = min(measured, key=lambda r: (r[key], r["i"], r["j"]))
        return record["i"], record["j"]

    def closed_form(self, i: int, j: int) -> tuple[Tensor, Tensor]:
        """Returns W* (D_r, D_u) and b* (D_r,) of a cell, float64."""
        return self.normal[i].solve(self.columns[j])


class _Clock:
    """Adds up seconds by name; waits for the device, so that a name is charged for its own work."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.start = self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.last
        self.last = now


@torch.no_grad()
def search(
    pixels: Iterable[Tensor],
    encode: Callable[[Tensor], Tensor],
    backbone: Backbone,
    reward: Reward,
    *,
    depths: Sequence[int] | None = None,
    js: Sequence[int] = (1, 2, 3, 4),
    num_probes: int = 200,
    num_held_out: int = 200,
    num_end_probes: int = 32,
    num_end_depths: int | None = 2,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> SearchResult:
    """Measures every cell (i, j) in one pass over the probe images.

    Arguments:
        pixels: Batches of probe images (B, 3, H, W) in [0, 1], together at least
            `num_probes + num_held_out`. The first ones are fitted, the next held out.
        encode: Maps pixels to clean latents z_0 (B, C, H, W): the VAE.
        backbone: The frozen backbone with all blocks of `depths` loaded.
        reward: The frozen reward.
        depths: The backbone depths i; all of 1..num_blocks if None (0 for a backbone without blocks).
        js: The reward blocks j; the paper's j ≤ 4.
        num_probes: The number of images that are fitted, N_probe.
        num_held_out: The number of images the losses are measured on; 0 measures none and only fits.
        num_end_probes: The number of held-out images that go through the frozen tail for the "embedding"
            criterion; 0 leaves it out.
        num_end_depths: The number of depths they are run for, for each j those with the lowest loss on the fitted
            images; all if None.
        seed: Seeds noise and noise levels, which are keyed by an image's position.
        progress: Called with (images done, images in all).

    Raises:
        ValueError: If there are too few images, a depth or j does not exist, or num_end_depths is below 1.
    """
    depths = _checked_depths(backbone, depths)
    js = _checked_js(reward, js)
    if num_end_depths is not None and num_end_depths < 1:
        raise ValueError(
            f"num_end_depths = {num_end_depths}: expected at least 1, or None for all"
        )
    total = num_probes + num_held_out
    device = next(reward.parameters()).device
    clock = _Clock(device)
    columns = {j: slice(k * reward.width, (k + 1) * reward.width) for k, j in enumerate(js)}
    fit: dict[int, NormalEquations] = {}
    tokens = {j: torch.zeros(reward.width, dtype=torch.float64, device=device) for j in js}
    shift_y: Tensor | None = None
    held_out: _HeldOut | None = None

    for first, images in _take(pixels, total, num_probes):
        images = images.to(device)
        z_0 = encode(images)
        clock.lap("encode")
        z_t, t = _noised(z_0, first, seed)
        u = backbone.features(z_t, t, depths)
        probe = reward.probe(images, js)
        clock.lap("features")
        y = torch.cat([_rows(probe.patches[j]) for j in js], dim=1)
        if first < num_probes:
            shift_y = y.double().mean(0) if shift_y is None else shift_y
            targets = y.double() - shift_y
            for i in depths:
                x = _rows(up(u[i], reward.grid)).double()
                if i not in fit:
                    fit[i] = NormalEquations(x.mean(0), shift_y)
                fit[i].add(x - fit[i].shift_x, targets)
            for j in js:
                tokens[j] += probe.class_token[j].double().sum(0)
            clock.lap("gram")
        else:
            if held_out is None:
                means = {j: (tokens[j] / num_probes).float() for j in js}
                held_out = _HeldOut(fit, columns, reward, means, num_end_probes, num_end_depths)
                clock.lap("solve")
            u = {i: up(u[i], reward.grid).float() for i in depths}
            held_out.add(u, y.float())
            clock.lap("gram")
            held_out.add_tails(u, probe.image)
            clock.lap("tail")
        if progress is not None:
            progress(first + len(images), total)

    class_tokens = {j: (tokens[j] / num_probes).float() for j in js}
    records = held_out.records() if held_out is not None else []
    timing = clock.seconds | {"total": time.perf_counter() - clock.start}
    return SearchResult(records, timing, fit, columns, class_tokens)


class _HeldOut:
    """Held-out images streamed through the closed-form maps, and the first of them on through the frozen tails."""

    def __init__(
        self,
        fit: dict[int, NormalEquations],
        columns: dict[int, slice],
        reward: Reward,
        class_tokens: dict[int, Tensor],
        num_end_probes: int,
        num_end_depths: int | None,
    ) -> None:
        self.fit, self.columns, self.grid, self.left = fit, columns, reward.grid, num_end_probes
        self.maps = {i: equations.solve() for i, equations in fit.items()}  # all j side by side
        self.float_maps = {i: (W.float(), b.float()) for i, (W, b) in self.maps.items()}
        self.fitted = {
            (i, j): equations.squared_error(self.maps[i][0][part], self.maps[i][1][part], part)
            for i, equations in fit.items()
            for j, part in columns.items()
        }
        self.end_cells = [
            (i, j)
            for j in columns
            for i in sorted(fit, key=lambda i: self.fitted[i, j])[:num_end_depths]
        ]
        self.tails = {j: reward.tail(j) for j in columns} if num_end_probes else {}
        for j, tail in self.tails.items():
            tail.init_class_token(class_tokens[j])
        self.dtype = next(reward.parameters()).dtype
        shift = next(iter(fit.values())).shift_y
        self.targets = NormalEquations(torch.zeros(1, device=shift.device), shift)
        self.squared = {i: torch.zeros_like(shift) for i in fit}
        self.end = {cell: torch.zeros_like(shift[0]) for cell in self.end_cells}
        self.ended = 0

    def add(self, u: dict[int, Tensor], y: Tensor) -> None:
        """Adds features (B, D, gh, gw) per depth and the tokens y (n, Σ D_j) they should map to."""
        self.targets.update(y.new_zeros(len(y), 1), y)
        for i, features in u.items():
            W, b = self.float_maps[i]
            error = torch.addmm(b, _rows(features), W.T).sub_(y)
            self.squared[i] += error.square_().sum(0)

    def add_tails(self, u: dict[int, Tensor], image: Tensor) -> None:
        """Adds ‖ẽ − ẽ_RM‖² of the first images that are still wanted; image (B, E) is the teacher's."""
        count = min(self.left, len(image))
        if not count:
            return
        self.left -= count
        self.ended += count
        target = F.normalize(image[:count].double(), dim=-1)
        for i, j in self.end_cells:
            W, b = (x[self.columns[j]] for x in self.float_maps[i])
            h = F.conv2d(u[i][:count], W[:, :, None, None], b)
            e = self.tails[j](h.to(self.dtype)).image
            self.end[i, j] += (F.normalize(e.double(), dim=-1) - target).square().sum()

    def records(self) -> list[dict[str, Any]]:
        """Returns the record of every cell."""
        answer = []
        for i, equations in self.fit.items():
            for j, part in self.columns.items():
                width = part.stop - part.start
                error = float(self.squared[i][part].sum())
                ended = self.ended if (i, j) in self.end else 0
                record: dict[str, Any] = {
                    "i": i,
                    "j": j,
                    "feature_loss": error / (self.targets.n * width),
                    "fit_loss": self.fitted[i, j] / (equations.n * width),
                    "unexplained": error / self.targets.variance(part),
                    "embedding_error": float(self.end[i, j]) / ended if ended else None,
                }
                answer.append(record)
        return answer


def _rows(grid: Tensor) -> Tensor:
    """(B, D, h, w) → (B h w, D)."""
    return grid.permute(0, 2, 3, 1).reshape(-1, grid.shape[1])


def _noised(z_0: Tensor, first: int, seed: int) -> tuple[Tensor, Tensor]:
    keys = [(seed, "search", first + k) for k in range(len(z_0))]
    t = keyed_uniform(keys, 1, z_0.device)[:, 0]
    eps = keyed_normal([(*key, "eps") for key in keys], z_0.shape[1:], z_0.device)
    return FlowPath().interpolate(z_0.float(), eps, t), t


def _take(pixels: Iterable[Tensor], total: int, split: int) -> Iterator[tuple[int, Tensor]]:
    """Yields (position of its first image, batch), cut so that no batch straddles `split` or `total`."""
    done = 0
    for batch in pixels:
        for stop in (split, total):
            if done < stop and len(batch):
                part = batch[: stop - done]
                yield done, part
                done, batch = done + len(part), batch[len(part) :]
        if done >= total:
            return
    if done < total:
        raise ValueError(
            f"stage 1 needs {total} probe images ({split} to fit, {total - split} held out) but the data "
            f"gave {done}; give more validation images or lower num_probes / num_held_out"
        )


def _checked_depths(backbone: Backbone, depths: Sequence[int] | None) -> list[int]:
    if depths is None:
        depths = range(1, backbone.num_blocks + 1) if backbone.num_blocks else (0,)
    bad = [i for i in depths if not 0 <= i <= backbone.loaded_blocks]
    if bad or not depths:
        raise ValueError(
            f"depths {bad or list(depths)}: {backbone.id} has blocks 1..{backbone.loaded_blocks} loaded"
        )
    return sorted(set(depths))


def _checked_js(reward: Reward, js: Sequence[int]) -> list[int]:
    bad = [j for j in js if not 1 <= j <= reward.num_blocks]
    if not reward.num_blocks:
        reward.tail(1)  # of a sum, which says that it cannot be cut
    if bad or not js:
        raise ValueError(f"js {bad or list(js)}: {reward.id} has blocks 1..{reward.num_blocks}")
    return sorted(set(js))
