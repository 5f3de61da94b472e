"""Zero-shot retrieval: Recall@k from image to text and from text to image, several captions per image.

With CLIP_benchmark's definition:

    text → image R@k: the share of *texts* whose image is among the k best images.
    image → text R@k: the share of *images* of which at least one caption is among the k best texts.

(torchmetrics' RetrievalRecall divides by the number of captions instead, which is another quantity.)

Ties. Of equal scores the one with the lower index ranks first: images by their index, texts by the index
of their image, then by their number in it. A model that says the same of every image thus gets 1/N.

Standard errors hold the gallery fixed: binomial over images; for texts, clustered by image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize as unit
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from stitchvm.metrics.estimate import Estimate, first_by_index, ratio


def ranks(
    queries: Tensor, gallery: Tensor, query_id: Tensor, gallery_id: Tensor, chunk: int
) -> Tensor:
    """Returns the rank (0 = best) of the best right answer to every query, with shape (Q,).

    Arguments:
        queries: The query embeddings, with shape (Q, E).
        gallery: The gallery's embeddings, with shape (N, E).
        query_id: What each query is about, with shape (Q,).
        gallery_id: What each entry is about, with shape (N,); right answers have the query's id.
        chunk: The number of queries at a time; chunk × N scores are in memory.

    Raises:
        ValueError: If a query has no right answer in the gallery.
    """
    places = torch.arange(len(gallery), device=gallery.device)
    answer = []
    for start in range(0, len(queries), chunk):
        scores = queries[start : start + chunk] @ gallery.T
        ids = query_id[start : start + chunk]
        right = ids[:, None] == gallery_id[None]
        missing = ~right.any(dim=1)
        if missing.any():
            raise ValueError(
                f"nothing in the gallery belongs to item {int(ids[missing][0])}: expected at least one "
                "caption per image and the image of every caption."
            )
        best = scores.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
        place = torch.where(right & (scores == best), places, len(gallery)).amin(
            dim=1, keepdim=True
        )
        ahead = (scores > best) | ((scores == best) & (places < place))
        answer.append(ahead.sum(dim=1))
    return torch.cat(answer)


class RetrievalRecall(Metric):
    """Recall@k in both directions, exact under several devices and whatever repeats a sampler adds.

    `compute` returns `{"image_to_text_r1": Estimate, "text_to_image_r1": …, "mean_r1": …, …}`, `mean` the
    average of both directions (the paper's Figure 2), whose standard error is over images.

    Arguments:
        ks: The values of k.
        chunk: The number of queries scored at a time.
        normalize: Whether embeddings are brought to unit length first. Off for averages of unit
            embeddings, whose length is part of E[cos | z_t].
    """

    image: list[Tensor]
    image_index: list[Tensor]
    text: list[Tensor]
    text_image: list[Tensor]
    text_number: list[Tensor]

    full_state_update = False
    is_differentiable = False
    higher_is_better = True

    def __init__(
        self, ks: Sequence[int] = (1, 5, 10), chunk: int = 1024, normalize: bool = True
    ) -> None:
        super().__init__()
        self.ks, self.chunk, self.normalize = tuple(ks), chunk, normalize
        for name in ("image", "image_index", "text", "text_image", "text_number"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(
        self,
        image: Tensor,
        image_index: Tensor,
        text: Tensor,
        text_image: Tensor,
        text_number: Tensor | None = None,
    ) -> None:
        """Adds images and their captions.

        Arguments:
            image: The image embeddings, with shape (B, E).
            image_index: The images' indices in the data set, with shape (B,).
            text: The caption embeddings, with shape (M, E).
            text_image: The index of each caption's image, with shape (M,).
            text_number: The number of each caption among its image's, with shape (M,); by default
                counted in the order given.

        Raises:
            ValueError: If shapes disagree or an embedding is not finite.
        """
        if len(image) != len(image_index) or len(text) != len(text_image):
            raise ValueError(
                f"got {len(image)} images with {len(image_index)} indices and {len(text)} texts with "
                f"{len(text_image)} indices: expected one index each."
            )
        for what, embedding in (("image", image), ("text", text)):
            if not bool(torch.isfinite(embedding).all()):
                raise ValueError(f"an {what} embedding is not finite: retrieval cannot rank it.")
        if text_number is None:
            same = text_image[:, None] == text_image[None]
            text_number = same.tril(diagonal=-1).sum(dim=1)
        self.image.append(image.float())
        self.image_index.append(image_index.long())
        self.text.append(text.float())
        self.text_image.append(text_image.long())
        self.text_number.append(text_number.long())

    def compute(self) -> dict[str, Estimate]:
        """Returns the recalls of all that was added, each item counted once."""
        image, image_index = dim_zero_cat(self.image), dim_zero_cat(self.image_index)
        text, text_image = dim_zero_cat(self.text), dim_zero_cat(self.text_image)
        keep = first_by_index(image_index)
        image, image_index = image[keep], image_index[keep]
        keep = first_by_index(text_image, dim_zero_cat(self.text_number))
        text, text_image = text[keep], text_image[keep]
        if self.normalize:
            image, text = unit(image, dim=-1), unit(text, dim=-1)

        to_text = ranks(image, text, image_index, text_image, self.chunk)
        to_image = ranks(text, image, text_image, image_index, self.chunk)
        cluster = torch.searchsorted(image_index, text_image)
        captions = torch.bincount(cluster, minlength=len(image))
        answer = {}
        for k in self.ks:
            found = (to_text < k).double()
            hits = torch.bincount(cluster, weights=(to_image < k).double(), minlength=len(image))
            there, back = ratio(found, torch.ones_like(to_text)), ratio(hits, captions)
            answer[f"image_to_text_r{k}"], answer[f"text_to_image_r{k}"] = there, back
            own = (found - there.value) / len(image) + (hits - back.value * captions) / len(text)
            factor = len(image) / (len(image) - 1) if len(image) > 1 else float("nan")
            stderr = (factor * own.square().sum()).sqrt() / 2
            answer[f"mean_r{k}"] = Estimate((there.value + back.value) / 2, stderr, there.n)
        return answer
