"""Define Pathfinder of the Long Range Arena: do two discs lie on the same dashed path?

The task was introduced by Linsley et al. (NeurIPS 2018). This module follows the generator that the
Arena used (drewlinsley/pathfinder), with its settings for 32 × 32 pixels. In every image, two long
paths begin near each other. One disc marks the beginning of a path. Another disc marks the end of
the same path (label 1) or the end of the other long path (label 0). Short distractor paths fill the
rest of the image. The brightness of each image is stretched to the full range, as in the
generator's files, and the image is read pixel by pixel as gray values in [-1, 1].

A path grows dash by dash. A mask holds the occupied pixels, which are the pixels of every dash and
of a margin around it. The next dash starts at the pixel to which the last dash points. Its
direction is drawn from the directions for which the mask leaves room. A turn by Δ has the weight
`cos²(c Δ)`, where c is the `continuity`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from gramian._extras import require
from gramian.tasks._task import Description, GeneratedTask, Row, register, require_sizes

__all__ = ["Pathfinder"]

FREE = 0.3  # the largest mask value of a free pixel
OVERLAP = 1.8  # dashes cross if the sum of two masks has at least this value somewhere
RETRIES = 2  # the number of retries for each dash
SNAKE_RETRIES = 4  # the number of retries for each distractor path
LEAST_FREE = 0.01  # if the share of free pixels is lower, no distractor is begun
ATTEMPTS, DASHES = 5_000, 20_000  # limits for the paths of one image; "hard" needs 40 and 400


class _Dash(NamedTuple):
    pivot: tuple[int, int]
    orientation: float
    tip: tuple[int, int]
    mask: np.ndarray


_Paths = tuple[list[np.ndarray], np.ndarray, list[list[tuple[int, int]]]]


@register("lra/pathfinder")
@dataclass(frozen=True, kw_only=True)
class Pathfinder(GeneratedTask):
    """Images of dashed paths. The label says whether the two discs lie on the same path.

    Args:
        size: side of the image in pixels, above 4 × `seed_distance`.
        path_length: number of dashes in each long path, at least 3. The published difficulties have
            6, 9 and 14 dashes.
        dash: length of a dash in pixels.
        thickness: thickness of a dash in pixels, a multiple of 0.5.
        gap: number of free pixels around a dash.
        seed_distance: distance in pixels between the beginnings of the two long paths.
        continuity: straightness of the paths: a turn by Δ has weight `cos²(continuity Δ)`.
        radius: radius of the discs in pixels.
        distractors: number of dashes in all distractor paths together. The number of dashes in one
            distractor path is a third of `path_length`.
        path_contrast: brightness of the long paths, relative to the brightness of the discs.
        distractor_contrast: brightness of the distractor paths, relative to the brightness of the
            discs.

    Raises:
        ValueError: if a setting is out of range. When rows are drawn: if 5,000 attempts or 20,000
            dashes find no room for the two long paths of an image.
    """

    train_examples: int = 160_000
    eval_examples: int = 20_000
    size: int = 32
    path_length: int = 14
    dash: int = 2
    thickness: float = 0.5
    gap: int = 1
    seed_distance: int = 7
    continuity: float = 1.0
    radius: float = 1.5
    distractors: int = 20
    path_contrast: float = 1.5
    distractor_contrast: float = 2.0

    published = {  # noqa: RUF012
        "easy": {"path_length": 6},
        "intermediate": {"path_length": 9},
        "hard": {"path_length": 14},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        require_sizes(self, "size", "path_length", "dash", "gap", "seed_distance")
        require_sizes(self, "distractors", least=0)
        if self.path_length < 3:
            raise ValueError(f"path_length must be at least 3; got {self.path_length}.")
        if self.size <= 4 * self.seed_distance:
            raise ValueError(
                f"size must be above 4 × seed_distance, here {4 * self.seed_distance}; got "
                f"{self.size}."
            )
        if not self.thickness > 0 or 2 * self.thickness != round(2 * self.thickness):
            raise ValueError(f"thickness must be a multiple of 0.5; got {self.thickness}.")

    def description(self) -> Description:
        return Description("classification", self.size**2, input_size=1, num_labels=2)

    def row(self, random: np.random.Generator, split: str) -> Row:
        label = int(random.integers(2))
        image, _ = self.picture(random, label)
        low, high = float(image.min()), float(image.max())
        gray = np.floor((image - low) / max(high - low, 1e-9) * 255 + 0.5)
        values = gray.reshape(-1, 1) / 127.5 - 1
        return {"input_values": values.astype(np.float32), "labels": label}

    def picture(
        self, random: np.random.Generator, label: int
    ) -> tuple[np.ndarray, list[list[tuple[int, int]]]]:
        """Draw an image (size, size), and return it with the two ends of both long paths.

        The brightness of the image is not stretched yet.
        """
        drawn, dashes, attempts = None, 0, 0
        while drawn is None and attempts < ATTEMPTS and dashes < DASHES:
            drawn, tried = self._two_paths(random)
            attempts, dashes = attempts + 1, dashes + tried
        if drawn is None:
            raise ValueError(
                f"two paths of {self.path_length} dashes of {self.dash} pixels with gaps of "
                f"{self.gap}, {self.seed_distance} pixels apart, do not fit into {self.size} × "
                f"{self.size} pixels: {attempts:,} attempts drew none."
            )
        images, mask, ends = drawn
        image = np.maximum(*images)
        short = self.path_length // 3
        for _ in range(self.distractors // short):
            for _ in range(SNAKE_RETRIES + 1):
                added = self._distractor(random, image, mask, short)
                if added is not None:
                    image, mask = added
                    break
        first = int(random.integers(2))
        last = first if label else 1 - first
        for row, column in (ends[first][0], ends[last][1]):
            image = np.maximum(image, _disc(self.size, row, column, self.radius))
        return image, ends

    def _two_paths(self, random: np.random.Generator) -> tuple[_Paths | None, int]:
        """Draw the two long paths.

        Returns:
            The paths, or None if there is no room for them; and the number of dashes tried.
        """
        mask = np.zeros((self.size, self.size))
        mask[[0, -1]] = mask[:, [0, -1]] = 1
        border = mask.copy()
        edge = 2 * self.seed_distance
        border[:edge] = border[-edge:] = border[:, :edge] = border[:, -edge:] = 1
        first = self._begin(random, border)
        if first is None:
            return None, 0
        second = None
        for _ in range(RETRIES + 1):
            angle = random.integers(-180, 180) * math.pi / 180
            direction = random.integers(360) * math.pi / 180
            tail = (
                int(np.round(first.tip[0] + self.seed_distance * math.sin(direction))),
                int(np.round(first.tip[1] + self.seed_distance * math.cos(direction))),
            )
            second = self._dash_at(tail, angle)
            if second is not None:
                break
        if second is None:
            return None, 0
        dashes = [first, second]
        images = [self.path_contrast * self._draw(dash.tip, dash.orientation)[0] for dash in dashes]
        for step in range(self.path_length - 1):
            for path in range(2):
                extended = self._extend(random, dashes[path], mask)
                if extended is None:
                    return None, 2 * step + path + 1
                dashes[path], line, mask = extended
                images[path] = np.maximum(images[path], self.path_contrast * line)
        mask = np.maximum(mask, dashes[1].mask)
        ends = [[begun.tip, dash.tip] for begun, dash in zip((first, second), dashes, strict=True)]
        return (images, mask, ends), 2 * self.path_length

    def _distractor(
        self, random: np.random.Generator, image: np.ndarray, mask: np.ndarray, length: int
    ) -> tuple[np.ndarray, np.ndarray] | None:
        if (mask <= FREE).mean() < LEAST_FREE:
            return None
        border = mask.copy()
        border[[0, -1]] = border[:, [0, -1]] = 1
        dash = self._begin(random, border)
        if dash is None:
            return None
        line = self._draw(dash.tip, dash.orientation)[0]
        image = np.maximum(image, self.distractor_contrast * line)
        for _ in range(length - 1):
            extended = self._extend(random, dash, mask)
            if extended is None:
                return None
            dash, line, mask = extended
            image = np.maximum(image, self.distractor_contrast * line)
        return image, np.maximum(mask, dash.mask)

    def _begin(self, random: np.random.Generator, taken: np.ndarray) -> _Dash | None:
        """Return the first dash of a path at a random free place, or None if there is no room."""
        for _ in range(RETRIES + 1):
            angle = random.integers(-180, 180) * math.pi / 180
            reach = self.dash + self.gap
            shape = _place(self._patch(angle)[1], (reach + 1, reach + 1), 2 * reach + 1)
            free = np.flatnonzero(_dilate(taken, shape >= 1) <= FREE)
            if len(free) == 0:
                return None
            row, column = divmod(int(random.choice(free)), self.size)
            dash = self._dash_at((row, column), angle)
            if dash is not None:
                return dash
        return None

    def _dash_at(self, tail: tuple[int, int], angle: float) -> _Dash | None:
        """Return the dash that begins at `tail`, or None if it would leave the image."""
        head = _move(tail, angle, self.dash)
        pivot = _move(head, _reversed(angle), self.dash + self.gap)
        if not all(0 <= value < self.size for value in (*head, *pivot)):
            return None
        return _Dash(pivot, angle, tail, self._draw(tail, angle)[1])

    def _extend(
        self, random: np.random.Generator, last: _Dash, mask: np.ndarray
    ) -> tuple[_Dash, np.ndarray, np.ndarray] | None:
        """Return the next dash of a path, its line, and the mask with the last dash added.

        If there is no room for the next dash, return None.
        """
        pivot = _move(last.pivot, last.orientation, self.dash + 2 * self.gap)
        taken = _dilate(mask, _disc_structure(self.gap))
        reach = self.dash + self.gap
        angles = np.arange(0, 360, 360 / (2 * reach * math.pi)) * math.pi / 180
        circle = np.stack(
            [pivot[0] + reach * np.sin(angles), pivot[1] + reach * np.cos(angles)], axis=-1
        )
        inside = ((circle >= 0) & (circle < self.size)).all(-1)
        if not inside.any():
            return None
        heads = np.unique(circle[inside].astype(int), axis=0)
        away = heads - np.array(pivot)
        orientations = np.arctan2(away[:, 0], away[:, 1])
        turn = np.abs(orientations - last.orientation)
        turn = np.minimum(np.minimum(turn, 2 * math.pi - turn) * self.continuity, math.pi / 2)
        weights = (1 - taken[heads[:, 0], heads[:, 1]]) * np.maximum(np.cos(turn), 0) ** 2
        if weights.sum() < 1e-4:
            return None
        chances = np.cumsum(weights / weights.sum())
        for _ in range(RETRIES + 1):
            index = int(np.argmax(chances > random.random()))
            head = (int(heads[index, 0]), int(heads[index, 1]))
            orientation = float(orientations[index])
            line, covered = self._draw(head, _reversed(orientation))
            if (mask + covered).max() < OVERLAP:
                dash = _Dash(pivot, orientation, head, covered)
                return dash, line, np.maximum(mask, last.mask)
        return None

    def _draw(self, start: tuple[int, int], angle: float) -> tuple[np.ndarray, np.ndarray]:
        """Return the line and the mask of a dash, (size, size)."""
        line, mask = self._patch(angle)
        return _place(line, start, self.size), _place(mask, start, self.size)

    def _patch(self, angle: float) -> tuple[np.ndarray, np.ndarray]:
        return _dash_patch(angle, self.dash, self.thickness, self.gap)


SCALE = 2  # dashes and discs are drawn at this multiple of the resolution, and then scaled down


def _move(point: tuple[int, int], angle: float, distance: float) -> tuple[int, int]:
    return (
        math.ceil(point[0] + distance * math.sin(angle)),
        math.ceil(point[1] + distance * math.cos(angle)),
    )


def _reversed(angle: float) -> float:
    return angle + math.pi if angle < 0 else angle - math.pi


@lru_cache(maxsize=4096)
def _dash_patch(
    angle: float, length: int, thickness: float, gap: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the line and the mask of a dash, both (2 r + 1, 2 r + 1) with values in [0, 1].

    The dash begins in the middle of the patch. The radius r of the patch is large enough for the
    margin.
    """
    require("the task lra/pathfinder", "train", "PIL")
    from PIL import Image, ImageDraw

    radius = length + math.ceil(thickness) + gap
    center = radius * SCALE
    head = _move((center, center), angle, length * SCALE)
    fine = Image.new("L", (2 * center + 1, 2 * center + 1))
    ImageDraw.Draw(fine).line(
        [(center, center), (head[1], head[0])], fill=255, width=round(thickness * SCALE)
    )
    pixels = np.asarray(fine)
    mask = _dilate(pixels, _disc_structure(gap * SCALE))
    return _shrink(pixels, 2 * radius + 1), _shrink(mask, 2 * radius + 1)


def _shrink(pixels: np.ndarray, size: int) -> np.ndarray:
    from PIL import Image

    image = Image.fromarray(pixels.astype(np.uint8)).resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(image).astype(np.float64) / 255


def _place(patch: np.ndarray, center: tuple[int, int], size: int) -> np.ndarray:
    """Return a (size, size) image of zeros with the middle of `patch` at `center`.

    Pixels of the patch outside of the image are dropped.
    """
    radius = patch.shape[0] // 2
    padded = np.zeros((size + 2 * patch.shape[0],) * 2)
    row, column = (value + patch.shape[0] - radius for value in center)
    padded[row : row + patch.shape[0], column : column + patch.shape[0]] = patch
    edge = patch.shape[0]
    return padded[edge : edge + size, edge : edge + size]


def _dilate(image: np.ndarray, structure: np.ndarray) -> np.ndarray:
    """Return the image in which each pixel is the largest value of the pixels around it.

    These are the pixels under `structure`, a boolean square whose middle is placed at the pixel.
    """
    radius = structure.shape[0] // 2
    height, width = image.shape
    padded = np.zeros((height + 2 * radius, width + 2 * radius), dtype=image.dtype)
    padded[radius : radius + height, radius : radius + width] = image
    return np.max(
        [
            padded[row : row + height, column : column + width]
            for row, column in np.argwhere(structure)
        ],
        axis=0,
    )


@lru_cache(maxsize=8)
def _disc_structure(radius: int) -> np.ndarray:
    offsets = np.arange(-radius, radius + 1)
    return offsets[:, None] ** 2 + offsets**2 <= radius**2


@lru_cache(maxsize=4096)
def _disc(size: int, row: int, column: int, radius: float) -> np.ndarray:
    offsets = np.arange(size * SCALE)
    inside = (offsets[:, None] - row * SCALE) ** 2 + (offsets - column * SCALE) ** 2 <= (
        radius * SCALE
    ) ** 2
    return _shrink(inside * 255, size)
