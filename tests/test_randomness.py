"""Keyed noise depends on its key and on nothing else."""

import torch

from stitchvm.randomness import keyed_generator, keyed_normal, keyed_uniform


def test_noise_of_a_sample_does_not_depend_on_its_batch():
    keys = [(0, "eps", 3, n) for n in range(6)]
    whole = keyed_normal(keys, (2, 4, 4))
    parts = torch.cat([keyed_normal(keys[:1], (2, 4, 4)), keyed_normal(keys[1:], (2, 4, 4))])
    assert torch.equal(whole, parts)


def test_different_keys_give_independent_standard_normals():
    noise = keyed_normal([(7, n) for n in range(4000)], (8,))
    assert torch.allclose(noise.mean(0), torch.zeros(8), atol=4 / 4000**0.5)
    covariance = noise.T @ noise / 4000
    assert torch.allclose(covariance, torch.eye(8), atol=0.12)


def test_uniforms_are_in_the_unit_interval_and_keyed():
    u = keyed_uniform([(1, n) for n in range(2000)], 2)
    assert float(u.min()) >= 0 and float(u.max()) < 1
    assert abs(float(u.mean()) - 0.5) < 4 * (1 / 12 / 4000) ** 0.5
    assert torch.equal(u[5:6], keyed_uniform([(1, 5)], 2))


def test_keys_are_not_confused_by_concatenation():
    a, b = keyed_generator(1, 23), keyed_generator(12, 3)
    assert a.initial_seed() != b.initial_seed()


def test_the_default_dtype_does_not_matter():
    keys = [(1, 2), (3, 4)]
    expected = keyed_normal(keys, (5,)), keyed_uniform(keys, 5)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = keyed_normal(keys, (5,)), keyed_uniform(keys, 5)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(
        torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(found, expected, strict=True)
    )
