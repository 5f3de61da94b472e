"""Preprocessing on tensors against the transforms the checkpoints were trained with."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import pad, resize

from stitchvm.rewards.preprocess import Preprocess

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIZES = [(40, 60), (61, 33), (48, 48), (20, 16), (32, 45)]


def picture(height: int, width: int) -> Image.Image:
    """A smooth image with sharp edges and saturated colours: bicubic overshoots on it."""
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    image = torch.stack([x, y, 0.5 + 0.5 * torch.sin(9 * x * y)])
    image[:, (x > 0.4) & (y > 0.5)] = torch.tensor([[1.0], [0.0], [1.0]])
    return Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy())


def tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
def test_close_to_the_transform_of_open_clip(mode):
    from open_clip.transform import PreprocessCfg, image_transform_v2

    reference = image_transform_v2(PreprocessCfg(size=32, resize_mode=mode), is_train=False)
    ours = Preprocess((32, 32), mode, MEAN, STD)
    differences = []
    for size in SIZES:
        image = picture(*size)
        got, wanted = ours(tensor(image)), reference(image)[None]
        assert got.shape == wanted.shape
        difference = (got - wanted).abs() * torch.tensor(STD).view(3, 1, 1) * 255
        differences.append(difference.flatten())
    d = torch.cat(differences)
    print(
        f"{mode}, in units of 1/255: max {d.max():.2f}, 99.9 % {d.quantile(0.999):.2f}, mean {d.mean():.3f}"
    )
    # PIL rounds to bytes after each of its two passes; a rare pixel on an edge has another filter tap
    assert d.quantile(0.999) < 1.1
    assert d.mean() < 0.25
    assert d.max() < 10


@pytest.mark.parametrize("size", SIZES)
def test_padding_is_that_of_hpsv2(size):
    x = tensor(picture(*size))
    scale = 32 / max(size)
    new = [round(side * scale) for side in size]
    reference = resize(x, new, InterpolationMode.BICUBIC, antialias=True)
    down, right = 32 - new[0], 32 - new[1]
    reference = pad(reference, [right // 2, down // 2, right - right // 2, down - down // 2])
    ours = Preprocess((32, 32), "pad", MEAN, STD)
    assert torch.equal(ours.resize(x), reference)
    black = (0 - torch.tensor(MEAN)) / torch.tensor(STD)
    if new[0] < 31:
        torch.testing.assert_close(ours(x)[0, :, 0, 0], black)


@pytest.mark.parametrize("mode", ["shortest", "squash", "longest", "pad"])
def test_right_size_is_left_alone(mode):
    x = torch.rand(2, 3, 32, 32) * 1.4 - 0.2
    assert torch.equal(Preprocess((32, 32), mode, MEAN, STD).resize(x), x)


@pytest.mark.parametrize("mode", ["shortest", "squash", "longest", "pad"])
def test_gradient_is_the_derivative(mode):
    ours = Preprocess((8, 8), mode, MEAN, STD)
    x = (0.3 + 0.4 * torch.rand(1, 3, 11, 14)).requires_grad_()
    direction = torch.randn_like(x)
    weights = torch.randn(1, 3, 8, 8)
    (gradient,) = torch.autograd.grad((ours(x) * weights).sum(), x)
    difference = (ours(x + 1e-2 * direction) - ours(x - 1e-2 * direction)) / 2e-2
    torch.testing.assert_close(
        (gradient * direction).sum(), (difference * weights).sum(), rtol=1e-3, atol=1e-3
    )


def test_statistics_survive_a_cast_of_the_tower():
    x = torch.rand(1, 3, 32, 32)
    exact = Preprocess((32, 32), "shortest", MEAN, STD)
    assert torch.equal(exact.to(torch.bfloat16)(x), Preprocess((32, 32), "squash", MEAN, STD)(x))
    assert exact(x.bfloat16()).dtype == torch.float32


def test_a_first_call_in_inference_mode_does_not_bar_gradients():
    ours = Preprocess((8, 8), "squash", MEAN, STD)
    x = torch.rand(1, 3, 8, 8, requires_grad=True)
    with torch.inference_mode():
        ours(x)
    (gradient,) = torch.autograd.grad(ours(x).sum(), x)
    torch.testing.assert_close(gradient, (1 / torch.tensor(STD)).view(3, 1, 1).expand(x.shape))


@pytest.mark.parametrize(
    "pixels", [torch.zeros(1, 3, 8, 8).byte(), torch.zeros(1, 4, 8, 8), torch.zeros(3, 8, 8)]
)
def test_wrong_pixels_are_named(pixels):
    with pytest.raises(ValueError, match=r"expected RGB pixels in \[0, 1\]"):
        Preprocess((32, 32), "shortest", MEAN, STD)(pixels)


def test_unknown_mode_is_an_error():
    with pytest.raises(
        ValueError, match="expected one of shortest, processor, squash, longest, pad"
    ):
        Preprocess((32, 32), "fit", MEAN, STD)
    with pytest.raises(ValueError, match="'bicubic' or 'bilinear'"):
        Preprocess((32, 32), "pad", MEAN, STD, "nearest")


def test_extreme_aspect_ratio():
    x = torch.rand(1, 3, 4, 400)
    assert Preprocess((32, 32), "pad", MEAN, STD)(x).shape == (1, 3, 32, 32)
    assert F.relu(Preprocess((32, 32), "longest", MEAN, STD).resize(x)).shape == (1, 3, 32, 32)
