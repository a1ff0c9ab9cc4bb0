"""Handwritten digits of 8x8 pixels, upright to learn from, and turned and inverted to adapt to with few labels.

The images come with scikit-learn: Alpaydin and Kaynak 1998, UCI "Optical Recognition of Handwritten Digits", CC BY 4.0.
"""

import math
from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_peft.tasks.batches import ResumableLoader, Shuffle
from lightning_peft.tasks.extras import optional

DOMAINS = ("source", "target")
SHARES = {"test": 0.25, "val": 0.15}


def rotate(images: Tensor, degrees: float) -> Tensor:
    """(batch, channels, height, width) counter-clockwise; other angles than quarter turns by interpolation"""
    if degrees % 90 == 0:
        return torch.rot90(images, int(degrees // 90), (-2, -1))
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    theta = torch.tensor([[cos, -sin, 0.0], [sin, cos, 0.0]]).expand(len(images), 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


class Digits(LightningDataModule):
    """images of digits -> {pixel_values: (batch, 1, 8, 8) in [-1, 1], labels: (batch,)}

    domain "source": upright, all training labels. domain "target": turned by `rotate` degrees, inverted if `invert`,
    and with `labels` labels for training, as many of each digit as can be (None: all). The three splits hold the same
    images in both domains, so no test image was ever trained on; they do not depend on `seed`, which picks the labels
    and their order.
    """

    classes = [str(digit) for digit in range(10)]
    num_classes = 10

    def __init__(
        self,
        domain: Literal["source", "target"] = "target",
        rotate: float = 90,
        invert: bool = True,
        labels: int | None = 150,
        batch_size: int = 32,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if domain not in DOMAINS:
            raise ValueError(f"Unknown domain={domain!r}. Known: {', '.join(DOMAINS)}.")
        if labels is not None and labels < 10:
            raise ValueError(f"labels={labels}: ten are needed at least, one of each digit; None takes all.")
        self.domain, self.rotate, self.invert, self.labels = domain, rotate, invert, labels
        self.batch_size, self.seed = batch_size, seed

    @cached_property
    def images(self) -> tuple[Tensor, Tensor]:
        """(1797, 1, 8, 8) in [-1, 1] as the domain shows them, (1797,)"""
        images, labels = optional("sklearn.datasets", "The data set Digits").load_digits(return_X_y=True)
        pixels = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
        if self.domain == "target":
            pixels = rotate(pixels, self.rotate) * (-1 if self.invert else 1)
        return pixels, torch.tensor(labels)

    @cached_property
    def splits(self) -> dict[str, list[int]]:
        """The numbers of the images in "train", "val" and "test"."""
        labels = self.images[1].tolist()
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).tolist()
        start, parts = 0, {}
        for name, share in SHARES.items():
            parts[name] = order[start : start + round(share * len(labels))]
            start += len(parts[name])
        train = order[start:]
        few = self.labels if self.domain == "target" else None
        return {"train": train if few is None else self.few(train, labels, few), **parts}

    def few(self, train: list[int], labels: list[int], count: int) -> list[int]:
        """`count` of the training images, the digits in turn."""
        if count > len(train):
            raise ValueError(f"labels={count}: there are {len(train)} training images.")
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(self.seed)).tolist()
        seen = [0] * 10
        turn = {}
        for place in order:
            index = train[place]
            turn[index] = seen[labels[index]]
            seen[labels[index]] += 1
        return sorted(turn, key=lambda index: (turn[index], labels[index]))[:count]

    def rows(self, split: str) -> list[dict[str, Tensor]]:
        """The images of a split with their labels."""
        pixels, labels = self.images
        return [{"pixel_values": pixels[index], "labels": labels[index]} for index in self.splits[split]]

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        rows = self.rows("train")
        return ResumableLoader(rows, sampler=Shuffle(len(rows), self.seed), batch_size=self.batch_size)  # type: ignore[arg-type]

    @override
    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.rows("val"), batch_size=256)  # type: ignore[arg-type]

    @override
    def test_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.rows("test"), batch_size=256)  # type: ignore[arg-type]

    predict_dataloader = test_dataloader
