"""A small network that segments volumes: how well it does on real ones says what pairs of image and label map are worth."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from monai.inferers import sliding_window_inference
from monai.losses import DiceCELoss
from monai.metrics import DiceMetric
from monai.networks.nets import UNet
from monai.transforms import (
    Compose,
    NormalizeIntensity,
    NormalizeIntensityd,
    RandCropByPosNegLabeld,
    RandScaleIntensityd,
    RandShiftIntensityd,
    SpatialPadd,
)

Pair = tuple[torch.Tensor, torch.Tensor]
"""An image, ``CxHxWxD``, and its labels, ``1xHxWxD``."""
CHANNELS = (32, 64, 128)
PATCH_SIZE = (32, 32, 32)  # voxels, of training
WINDOW_SIZE = (48, 48, 48)  # voxels, of inference
IN_LABELS = 4  # patches around a voxel that has a label, for one around another voxel
BATCH_SIZE = 2
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 1e-2


@torch.no_grad()
def segment(image: torch.Tensor, network: torch.nn.Module) -> torch.Tensor:
    """The number of each voxel's class, ``1xHxWxD`` from 1, 0 for the background, of an image ``CxHxWxD`` in any scale."""
    device = next(network.parameters()).device
    normalised = torch.as_tensor(NormalizeIntensity()(image))[None].to(device)
    scores: Any = sliding_window_inference(
        normalised, WINDOW_SIZE, BATCH_SIZE, network, mode="gaussian", padding_mode="replicate"
    )
    return scores[0].argmax(0, keepdim=True)


def dice(network: torch.nn.Module, pairs: Sequence[Pair], classes: Sequence[int]) -> torch.Tensor:
    """Dice, a row for each pair and a column for each class; NaN where a label map does not have the class."""
    metric = DiceMetric(include_background=False, reduction="none", num_classes=len(classes) + 1)
    for image, labels in pairs:
        metric(segment(image, network)[None].cpu(), _numbers(labels, classes)[None].cpu())
    found: Any = metric.aggregate()
    return found


def train_segmenter(
    pools: Sequence[Sequence[Pair]], classes: Sequence[int], steps: int, seed: int, device: str = "cpu"
) -> torch.nn.Module:
    """
    Train a U-Net of half a million parameters on random patches of 32x32x32 voxels, two in a batch, four of five around a
    voxel that has a label, half of them changed in brightness and contrast by up to 10 %.

    Args:
        pools: sets of pairs; a batch has as many of each. One or two.
        classes: labels, without 0.
        steps: of the optimizer.
        seed: of the first weights and of everything that is drawn.
        device: where to train.

    Returns:
        a network that gives a score for the background and for each class.
    """
    channels = pools[0][0][0].shape[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = UNet(3, channels, len(classes) + 1, CHANNELS, [2] * (len(CHANNELS) - 1)).to(device)
    loss = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, batch=True)
    optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    drawn = zip(*(_patches(pools[number % len(pools)], seed + number) for number in range(BATCH_SIZE)))
    for patches in itertools.islice(drawn, steps):
        images, labels = (torch.stack(volumes).to(device) for volumes in zip(*patches))
        optimizer.zero_grad()
        loss(network(images), _numbers(labels, classes)).backward()
        optimizer.step()
        schedule.step()
    return network.eval()


def _patches(pairs: Sequence[Pair], seed: int) -> Iterator[Pair]:
    """Random patches of the pairs, each pair once before any comes again."""
    both = ["image", "label"]
    augment = Compose(
        [
            NormalizeIntensityd("image"),
            SpatialPadd(both, PATCH_SIZE, mode="edge"),
            RandCropByPosNegLabeld(both, "label", PATCH_SIZE, pos=IN_LABELS, neg=1, num_samples=1),
            RandScaleIntensityd("image", factors=0.1, prob=0.5),
            RandShiftIntensityd("image", offsets=0.1, prob=0.5),
        ]
    )
    augment.set_random_state(seed)
    generator = torch.Generator().manual_seed(seed)
    while True:
        for index in torch.randperm(len(pairs), generator=generator):
            (found,) = augment(dict(zip(both, pairs[int(index)])))
            yield torch.as_tensor(found["image"]), torch.as_tensor(found["label"])


def _numbers(labels: torch.Tensor, classes: Sequence[int]) -> torch.Tensor:
    """The number of each label among the classes, from 1; 0 for all others."""
    numbers: Any = sum(number * (labels == label) for number, label in enumerate(classes, start=1))
    return numbers
