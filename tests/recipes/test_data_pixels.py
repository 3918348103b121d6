"""Augmentation and normalisation, pixel by pixel."""

import pytest
import torch
from torch.nn import functional as F

from recipes.data.augment import draw
from recipes.data.normalise import MeanStd, Whiten


@pytest.mark.parametrize("flip", [0, 1])
@pytest.mark.parametrize(("top", "left"), [(0, 0), (0, 4), (2, 2), (3, 1), (4, 4)])
def test_draw_is_a_window_of_the_reflected_image(flip, top, left):
    image = torch.rand(1, 3, 6, 5)
    padded = F.pad(image, (2, 2, 2, 2), mode="reflect")
    window = padded[:, :, top : top + 6, left : left + 5]
    plan = torch.tensor([[0, flip, top, left]])
    assert torch.equal(draw(image, plan, crop=2), window.flip(3) if flip else window)


def test_images_of_a_batch_do_not_mix():
    images = torch.arange(6.0)[:, None, None, None].expand(6, 3, 8, 8).contiguous()
    plan = torch.stack([torch.arange(6), torch.arange(6) % 2, torch.arange(6) % 5, torch.arange(6) % 3], 1)
    assert torch.equal(draw(images, plan, crop=2), images)


def test_a_crop_as_large_as_the_image_is_refused():
    with pytest.raises(ValueError, match=r"crop must be in \[0, 4\), got 4"):
        draw(torch.rand(1, 1, 4, 6), torch.zeros(1, 4, dtype=torch.int64), crop=4)


def test_mean_and_std_are_those_of_the_channels():
    images = torch.randint(256, (50, 3, 4, 4), dtype=torch.uint8)
    scaled = MeanStd.fit(images)(images)
    torch.testing.assert_close(scaled.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(scaled.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5, rtol=0)


def test_whitening_makes_the_covariance_the_identity():
    rng = torch.Generator().manual_seed(0)
    mixing = torch.eye(12) + 0.3 * torch.rand(12, 12, generator=rng)
    images = (128 + 18 * torch.randn(4000, 12, generator=rng) @ mixing).clamp(0, 255).to(torch.uint8).view(-1, 3, 2, 2)
    whitened = Whiten.fit(images)(images).flatten(1).double()
    covariance = whitened.T @ whitened / len(whitened)
    # Contrast normalisation takes one direction, the constant image, out of every image.
    constant = torch.full((12, 12), 1 / 12, dtype=torch.float64)
    assert (covariance - (torch.eye(12) - constant)).abs().max() < 1e-3
    assert whitened.mean(0).abs().max() < 1e-3


def test_whitening_follows_the_training_images_under_bfloat16():
    images = torch.randint(256, (200, 1, 4, 4), dtype=torch.uint8)
    whiten = Whiten.fit(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(whiten(images), whiten(images.clone()))
        assert whiten(images).dtype == torch.float32
