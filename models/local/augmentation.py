"""Augmentation of images in training: random shifts, rotations and noise; it is not a protection."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedveil.core.settings.sections import Training


def augments(settings: Training) -> bool:
    """Say whether `settings` ask for any augmentation."""
    return settings.shift > 0 or settings.rotation > 0 or settings.noise > 0


def augment(images: Tensor, settings: Training, rng: np.random.Generator) -> Tensor:
    """Rotate, then shift, then add noise to each image, with random numbers from `rng`.

    images: float32 [n, channels, height, width]; with noise, the result may lie outside [0, 1]
    """
    n = len(images)
    if settings.rotation > 0:
        degrees = rng.uniform(-settings.rotation, settings.rotation, n).astype(np.float32)
        images = rotate(images, torch.from_numpy(degrees).to(images.device))
    if settings.shift > 0:
        offsets = rng.integers(-settings.shift, settings.shift, size=(n, 2), endpoint=True)
        images = shift(images, torch.from_numpy(offsets).to(images.device))
    if settings.noise > 0:
        noise = rng.standard_normal(tuple(images.shape), dtype=np.float32)
        images = images + settings.noise * torch.from_numpy(noise).to(images.device)
    return images


def shift(images: Tensor, offsets: Tensor) -> Tensor:
    """Shift image i down by offsets[i, 0] and right by offsets[i, 1] pixels (int64 [n, 2]), and fill with zeros."""
    n, _, height, width = images.shape
    rows = torch.arange(height, device=images.device) - offsets[:, :1]  # [n, height], where each pixel comes from
    columns = torch.arange(width, device=images.device) - offsets[:, 1:]  # [n, width]
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    image = torch.arange(n, device=images.device)[:, None, None]
    rows, columns = rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None, :]
    moved = images.permute(0, 2, 3, 1)[image, rows, columns]  # [n, height, width, channels]
    return torch.where(inside[:, None], moved.permute(0, 3, 1, 2), 0.0)


def rotate(images: Tensor, degrees: Tensor) -> Tensor:
    """Rotate image i counter-clockwise about its centre by degrees[i] (float [n]); bilinear, zeros outside."""
    height, width = images.shape[2:]
    angle = torch.deg2rad(degrees)
    cos, sin, none = angle.cos(), angle.sin(), torch.zeros_like(angle)
    # the map to where each pixel comes from, in coordinates from -1 to 1 along both axes, whatever their lengths
    source = torch.stack(
        [
            torch.stack([cos, -sin * height / width, none], dim=1),
            torch.stack([sin * width / height, cos, none], dim=1),
        ],
        dim=1,
    )  # [n, 2, 3]
    grid = F.affine_grid(source, list(images.shape), align_corners=False)  # [n, height, width, 2]
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
