"""The distillation losses of stage 2: Eq. (8), (78) and (79).

Student and teacher see the same image, the student as z_t, the teacher clean. With e the image embedding,
ẽ = e/‖e‖ and h the per-token output activations of r^{≥j}:

    CLIP, DFN-CLIP, HPSv2:   L = ‖ẽ_S − ẽ_RM‖² + λ_tok ‖h_S − h_RM‖²                                  (78)
    aesthetic:               L = λ_tok ℓ(h) + λ_emb ℓ(ẽ) + λ_sc ℓ(s_aes(ẽ_S) − s_aes(ẽ_RM)), ℓ smooth-ℓ1  (79)

Reductions, which the paper leaves open: the embedding's is the *sum* over its E entries, as in a norm; the tokens'
is the *mean* over tokens and width, so that both terms are of order one for every tower (a sum over 577 × 1024
token entries would drown the embedding). All losses are returned per sample.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from stitchvm.rewards.base import Embedding

__all__ = ["aesthetic_distillation", "representation_distillation"]


def _check(student: Embedding, teacher: Embedding) -> None:
    if student.image.shape != teacher.image.shape or student.tokens.shape != teacher.tokens.shape:
        raise ValueError(
            f"student and teacher must agree: tokens {tuple(student.tokens.shape)} vs "
            f"{tuple(teacher.tokens.shape)}, image {tuple(student.image.shape)} vs "
            f"{tuple(teacher.image.shape)}. Repeat the teacher for every noise level of an image."
        )


def _unit(e: Tensor) -> Tensor:
    return F.normalize(e.float(), dim=-1)


def representation_distillation(
    student: Embedding, teacher: Embedding, lambda_tok: float = 1.0
) -> dict[str, Tensor]:
    """Returns the terms of Eq. (78), each with shape (B,): "embedding", "tokens" and their sum "loss".

    Arguments:
        student: Tokens (B, N, D) and image embedding (B, E) of the stitched model.
        teacher: The same of the frozen reward on the clean image.
        lambda_tok: The weight λ_tok of the token term.

    Raises:
        ValueError: If the shapes of student and teacher differ.
    """
    _check(student, teacher)
    embedding = (_unit(student.image) - _unit(teacher.image)).square().sum(-1)
    tokens = (student.tokens.float() - teacher.tokens.float()).square().mean((-2, -1))
    return {"loss": embedding + lambda_tok * tokens, "embedding": embedding, "tokens": tokens}


def aesthetic_distillation(
    student: Embedding,
    teacher: Embedding,
    student_score: Tensor,
    teacher_score: Tensor,
    lambda_tok: float = 1.0,
    lambda_emb: float = 1.0,
    lambda_sc: float = 1.0,
) -> dict[str, Tensor]:
    """Returns the terms of Eq. (79), each (B,): "tokens", "embedding", "score" and their sum "loss".

    Arguments:
        student: Tokens (B, N, D) and image embedding (B, E) of the stitched model.
        teacher: The same of the frozen reward on the clean image.
        student_score: s_aes(ẽ_S) with shape (B,).
        teacher_score: s_aes(ẽ_RM) with shape (B,).
        lambda_tok: The weight of the token term.
        lambda_emb: The weight of the embedding term.
        lambda_sc: The weight of the score term.

    Raises:
        ValueError: If the shapes of student and teacher differ.
    """
    _check(student, teacher)
    tokens = F.smooth_l1_loss(
        student.tokens.float(), teacher.tokens.float(), reduction="none"
    ).mean((-2, -1))
    embedding = F.smooth_l1_loss(_unit(student.image), _unit(teacher.image), reduction="none").sum(
        -1
    )
    score = F.smooth_l1_loss(student_score.float(), teacher_score.float(), reduction="none")
    loss = lambda_tok * tokens + lambda_emb * embedding + lambda_sc * score
    return {"loss": loss, "tokens": tokens, "embedding": embedding, "score": score}
