"""Finds places for labels in a drawing: no two touch, none leaves the frame, none hides a mark.

Geometry only, in pixels, and deterministic: the same marks and labels get the same places on every machine. Labels are
placed one after the other. Each tries circles around its anchors, then every place of the frame from the nearest on. A
label for which no room is left gets None; the caller may write smaller and try again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

STEP = 8  # pixels between two circles, and between two rows of the last search
CHUNK = 256  # places that are tried at once
ANGLES = tuple(math.radians(angle) for angle in range(45, 405, 30))


@dataclass(frozen=True)
class Box:
    """A rectangle: left, bottom, right, top."""

    x0: float
    y0: float
    x1: float
    y1: float

    def overlaps(self, other: Box) -> bool:
        """Whether the two share more than an edge."""
        return self.x0 < other.x1 and other.x0 < self.x1 and self.y0 < other.y1 and other.y0 < self.y1

    def holds(self, other: Box) -> bool:
        """Whether the other lies inside."""
        return self.x0 <= other.x0 and other.x1 <= self.x1 and self.y0 <= other.y0 and other.y1 <= self.y1


@dataclass(frozen=True)
class Label:
    """What has to be placed: its size, and the points that it may stand beside, the best first."""

    width: float
    height: float
    anchors: Sequence[tuple[float, float]]


def place(labels: Sequence[Label], taken: Sequence[Box], frame: Box, *, gap: float = 2) -> list[Box | None]:
    """A box of its size for each label, `gap` pixels clear of `taken` and of each other; None where no room is left."""
    blocked = np.array([(box.x0, box.y0, box.x1, box.y1) for box in taken], dtype=float).reshape(-1, 4)
    places: list[Box | None] = []
    too_large: list[Label] = []
    for label in labels:
        if any(label.width >= other.width and label.height >= other.height for other in too_large):
            places.append(None)
            continue
        found = _first_free(_around(label), label, blocked, frame, gap)
        if found is None:
            found = _first_free(_everywhere(label, frame), label, blocked, frame, gap)
        places.append(found)
        if found is None:
            too_large.append(label)
        else:
            blocked = np.vstack((blocked, np.array((found.x0, found.y0, found.x1, found.y1))))
    return places


def _around(label: Label) -> np.ndarray:
    """Lower left corners [N, 2] on circles that grow around all anchors alike; the first anchor comes first."""
    corners = []
    for distance in range(STEP, 12 * STEP, STEP):
        for x, y in label.anchors:
            for angle in ANGLES:
                across = x + math.cos(angle) * (distance + label.width / 2) - label.width / 2
                up = y + math.sin(angle) * (distance + label.height / 2) - label.height / 2
                corners.append((across, up))
    return np.array(corners)


def _everywhere(label: Label, frame: Box) -> np.ndarray:
    """Lower left corners [N, 2] on a grid over the frame, the nearest to the first anchor first."""
    xs = np.arange(frame.x0, frame.x1 - label.width, STEP)
    ys = np.arange(frame.y0, frame.y1 - label.height, STEP / 2)
    corners = np.stack(np.meshgrid(xs, ys), axis=-1).reshape(-1, 2)
    middle = corners + np.array((label.width / 2, label.height / 2))
    distance = np.hypot(*(middle - np.array(label.anchors[0])).T)
    return corners[np.argsort(distance.round(6), kind="stable")]


def _first_free(corners: np.ndarray, label: Label, blocked: np.ndarray, frame: Box, gap: float) -> Box | None:
    size = np.array((label.width, label.height))
    inside = (corners - gap >= (frame.x0, frame.y0)).all(axis=-1) & (corners + size + gap <= (frame.x1, frame.y1)).all(
        -1
    )
    corners = corners[inside]
    for start in range(0, len(corners), CHUNK):
        low = corners[start : start + CHUNK, None, :] - gap
        high = low + size + 2 * gap
        apart = (low >= blocked[None, :, 2:]) | (high <= blocked[None, :, :2])
        free = apart.any(axis=2).all(axis=1)
        if free.any():
            x, y = map(float, corners[start + int(free.argmax())])
            return Box(x, y, x + label.width, y + label.height)
    return None
