"""Augmentation against NumPy: shifts, turns, noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil.core.randomness import Stream
from fedveil.core.settings.sections import Training
from fedveil.models.local.augmentation import augment, rotate, shift


def images(n: int = 6, channels: int = 2, height: int = 7, width: int = 5) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(1).random((n, channels, height, width), dtype=np.float32))


def rolled(image: np.ndarray, down: int, right: int) -> np.ndarray:
    """np.roll with zeros in place of what comes round."""
    image = np.roll(image, (down, right), axis=(-2, -1))
    if down:
        image[..., slice(0, down) if down > 0 else slice(down, None), :] = 0
    if right:
        image[..., slice(0, right) if right > 0 else slice(right, None)] = 0
    return image


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(-4, 4)), min_size=6, max_size=6))
def test_a_shift_is_a_roll_with_zeros_coming_in(offsets: list[tuple[int, int]]) -> None:
    before = images()
    after = shift(before, torch.tensor(offsets)).numpy()
    for i, (down, right) in enumerate(offsets):
        np.testing.assert_array_equal(after[i], rolled(before[i].numpy().copy(), down, right))


def test_an_image_shifted_off_its_edge_is_empty() -> None:
    assert not shift(images(), torch.tensor([[9, 0]] * 6)).any()


@pytest.mark.parametrize(("degrees", "turns"), [(0, 0), (90, 1), (180, 2), (-90, 3), (-180, 2)])
def test_a_right_angle_turns_square_images_as_rot90(degrees: float, turns: int) -> None:
    before = images(height=6, width=6)
    after = rotate(before, torch.full((6,), float(degrees)))
    np.testing.assert_allclose(after.numpy(), np.rot90(before.numpy(), turns, axes=(2, 3)), atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(9, 9), (11, 7), (7, 11)])
def test_a_turn_samples_bilinearly_where_the_rotated_pixel_came_from(height: int, width: int) -> None:
    before = images(3, 1, height, width)
    angles = [17.0, -40.0, 133.0]
    after = rotate(before, torch.tensor(angles)).numpy()
    for image, turned, angle in zip(before.numpy()[:, 0], after[:, 0], angles, strict=True):
        cos, sin = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
        padded = np.pad(image, 20)
        for row in range(height):
            for column in range(width):
                # counter-clockwise with rows counted downwards: turn the pixel back clockwise
                x, y = column - (width - 1) / 2, row - (height - 1) / 2
                c, r = cos * x - sin * y + (width - 1) / 2 + 20, sin * x + cos * y + (height - 1) / 2 + 20
                r0, c0 = int(np.floor(r)), int(np.floor(c))
                top = padded[r0, c0] * (c0 + 1 - c) + padded[r0, c0 + 1] * (c - c0)
                bottom = padded[r0 + 1, c0] * (c0 + 1 - c) + padded[r0 + 1, c0 + 1] * (c - c0)
                assert turned[row, column] == pytest.approx(top * (r0 + 1 - r) + bottom * (r - r0), abs=1e-4)


def test_shifts_cover_the_whole_range_on_both_axes_and_no_more() -> None:
    point = torch.zeros(2000, 1, 9, 9)
    point[:, :, 4, 4] = 1
    moved = augment(point, Training(shift=2), Stream(0).generator("augmentation"))
    found = {(row - 4, column - 4) for _, _, row, column in moved.nonzero().tolist()}
    assert found == {(down, right) for down in range(-2, 3) for right in range(-2, 3)}


def test_turns_stay_within_the_degrees_and_go_both_ways() -> None:
    bar = torch.zeros(500, 1, 41, 41)
    bar[:, :, 20, 35] = 1  # right of the centre; the row it lands in tells the angle
    turned = augment(bar, Training(rotation=30.0), Stream(0).generator("augmentation"))
    rows = torch.arange(41.0)
    height = (20 - (turned.sum(3)[:, 0] * rows).sum(1) / turned.sum((1, 2, 3))).numpy()
    angles = np.rad2deg(np.arcsin(np.clip(height / 15, -1, 1)))
    assert -32 < angles.min() < -27
    assert 27 < angles.max() < 32
    assert abs(angles.mean()) < 3


def test_noise_has_the_deviation_asked_for() -> None:
    noisy = augment(torch.zeros(50, 1, 28, 28), Training(noise=0.2), Stream(0).generator("augmentation"))
    assert float(noisy.std()) == pytest.approx(0.2, rel=0.02)
    assert float(noisy.mean()) == pytest.approx(0, abs=0.005)
    assert noisy.dtype == torch.float32


def test_the_same_stream_gives_the_same_images_and_leaves_the_originals_alone() -> None:
    chosen, before = Training(shift=1, rotation=20.0, noise=0.1), images()
    kept = before.clone()
    first, again = (augment(before, chosen, Stream(0, 1, 2).generator("augmentation")) for _ in range(2))
    other = augment(before, chosen, Stream(0, 1, 3).generator("augmentation"))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(before, kept)
