# Copyright 2026 The GreenMIM for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Scores of every pixel of an image of any size from a model that sees windows of it."""

from collections.abc import Callable, Iterator

import torch


def window_starts(side: int, window: int, overlap: float) -> list[int]:
    """Where windows begin along a side so that they cover it; neighbours share `overlap` of a window, or more.

    A side that is not longer than the window has one, as long as the side.
    """
    if side <= window:
        return [0]
    stride = max(1, round(window * (1 - overlap)))
    return [*range(0, side - window, stride), side - window]


def score_in_windows(
    image: torch.Tensor,
    score: Callable[[torch.Tensor], torch.Tensor],
    window: int,
    overlap: float,
    batch_size: int,
) -> Iterator[tuple[tuple[slice, slice], torch.Tensor]]:
    """Scores of an image, mean over the windows that hold a pixel, in stripes across its shorter side.

    Scores are kept of one stripe at a time, as wide as a window: however long an image is, they take the same memory.

    Args:
        image: `(channels, height, width)`.
        score: windows `(batch, channels, height, width)` -> scores `(batch, classes, height, width)`.
        window: side of the windows in pixels; 0 = the whole image at once.
        overlap: share of a window that the next one covers too, below 1.
        batch_size: windows that are scored at once.

    Yields:
        Rows and columns of a stripe, and its scores, `(classes, rows, columns)`.
    """
    height, width = image.shape[1:]
    window = window or max(height, width)
    # Stripes follow each other along the longer side.
    is_wide = width > height
    length, breadth = (width, height) if is_wide else (height, width)
    starts, across = window_starts(length, window, overlap), window_starts(breadth, window, overlap)
    extent, reach = min(window, length), min(window, breadth)
    total = count = None
    for number, start in enumerate(starts):
        for first in range(0, len(across), batch_size):
            places = across[first : first + batch_size]
            parts = [_part(image, start, place, extent, reach, is_wide) for place in places]
            for place, scores in zip(places, score(torch.stack(parts)).float()):
                if total is None:
                    total = scores.new_zeros(scores.shape[0], extent, breadth)
                    count = scores.new_zeros(extent, breadth)
                total[:, :, place : place + reach] += scores.transpose(1, 2) if is_wide else scores
                count[:, place : place + reach] += 1
        end = starts[number + 1] if number + 1 < len(starts) else length
        done = end - start
        stripe = total[:, :done] / count[:done]
        along, all_across = slice(start, end), slice(0, breadth)
        if is_wide:
            yield (all_across, along), stripe.transpose(1, 2)
        else:
            yield (along, all_across), stripe
        # What the next windows hold too moves up.
        total = torch.cat([total[:, done:], torch.zeros_like(total[:, :done])], dim=1)
        count = torch.cat([count[done:], torch.zeros_like(count[:done])])


def _part(image: torch.Tensor, start: int, place: int, extent: int, reach: int, is_wide: bool) -> torch.Tensor:
    if is_wide:
        return image[:, place : place + reach, start : start + extent]
    return image[:, start : start + extent, place : place + reach]
