"""Eq. (78) and (79) against numbers worked out by hand."""

import pytest
import torch

from stitchvm.objectives.distill import aesthetic_distillation, representation_distillation
from stitchvm.rewards.base import Embedding


def pair():
    teacher = Embedding(torch.zeros(1, 2, 2), torch.tensor([[3.0, 0.0]]))
    student = Embedding(torch.tensor([[[1.0, 0.0], [0.0, 3.0]]]), torch.tensor([[0.0, 0.5]]))
    return student, teacher


def test_representation_by_hand():
    student, teacher = pair()
    terms = representation_distillation(student, teacher, lambda_tok=0.5)
    # orthogonal unit vectors: squared distance 2; tokens: (1 + 9) / 4
    assert terms["embedding"].tolist() == [2.0]
    assert terms["tokens"].tolist() == [2.5]
    assert terms["loss"].tolist() == [3.25]


def test_aesthetic_by_hand():
    student, teacher = pair()
    scores = torch.tensor([5.0]), torch.tensor([5.5])
    terms = aesthetic_distillation(
        student, teacher, *scores, lambda_tok=1, lambda_emb=2, lambda_sc=4
    )
    # smooth-l1: |d| >= 1 gives |d| - 1/2, below that d^2 / 2
    assert terms["tokens"].item() == pytest.approx((0.5 + 2.5) / 4)
    assert terms["embedding"].item() == pytest.approx(0.5 + 0.5)
    assert terms["score"].item() == pytest.approx(0.125)
    assert terms["loss"].item() == pytest.approx(0.75 + 2 + 0.5)


def test_scale_of_the_embedding_does_not_matter_and_a_perfect_student_has_no_loss():
    _, teacher = pair()
    student = Embedding(teacher.tokens, 7 * teacher.image)
    assert representation_distillation(student, teacher)["loss"].item() == pytest.approx(
        0, abs=1e-12
    )


def test_losses_are_per_sample_and_in_float32_for_bfloat16_inputs():
    torch.manual_seed(0)
    student = Embedding(torch.randn(5, 3, 4).bfloat16(), torch.randn(5, 8).bfloat16())
    teacher = Embedding(torch.randn(5, 3, 4).bfloat16(), torch.randn(5, 8).bfloat16())
    loss = representation_distillation(student, teacher)["loss"]
    assert loss.shape == (5,) and loss.dtype == torch.float32
    one = representation_distillation(
        Embedding(*(x[2:3] for x in student)), Embedding(*(x[2:3] for x in teacher))
    )
    assert torch.equal(loss[2:3], one["loss"])


def test_shapes_that_differ_are_an_error():
    student, teacher = pair()
    with pytest.raises(ValueError, match="Repeat the teacher"):
        representation_distillation(
            Embedding(student.tokens.repeat(2, 1, 1), student.image), teacher
        )
