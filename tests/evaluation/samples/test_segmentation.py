"""The small segmentation network, on bright boxes."""

from __future__ import annotations

import pytest
import torch

from scripts.evaluation.samples import segmentation
from scripts.evaluation.samples.segmentation import Pair, dice, segment, train_segmenter

CLASSES = (2, 5)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for size in ("PATCH_SIZE", "WINDOW_SIZE"):
        monkeypatch.setattr(segmentation, size, (16, 16, 16))


def boxes(seed: int) -> Pair:
    """Two boxes at random places, the second brighter, in noise; one side is shorter than a patch."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.zeros(1, 24, 20, 12, dtype=torch.uint8)
    for label, half in zip(CLASSES, (0, 12)):
        x, y, z = (int(torch.randint(0, high, (), generator=generator)) for high in (4, 12, 4))
        labels[:, half + x : half + x + 8, y : y + 8, z : z + 8] = label
    return 30 * labels + 10 * torch.rand(labels.shape, generator=generator), labels


def test_trained_network_finds_the_classes_in_other_volumes():
    network = train_segmenter([[boxes(seed) for seed in range(8)]], CLASSES, steps=80, seed=0)
    image, labels = boxes(100)
    only_first = torch.where(labels == 2, labels, 0)
    found = dice(network, [(image, labels), (image, only_first)], CLASSES)
    assert found.shape == (2, 2)
    assert found[0].min() > 0.9 and found[1, 0] == found[0, 0] and found[1, 1].isnan()
    assert segment(1000 + 7 * image, network).equal(segment(image, network))  # the scale of the intensities does not matter


def test_same_seed_gives_the_same_network():
    pairs = [boxes(seed) for seed in range(3)]
    first, again, other = (train_segmenter([pairs], CLASSES, steps=2, seed=seed) for seed in (0, 0, 1))
    weights, same, others = (each.state_dict().values() for each in (first, again, other))
    assert all(map(torch.equal, weights, same)) and not all(map(torch.equal, weights, others))


def test_batches_have_as_many_pairs_of_each_pool(monkeypatch):
    few, many = [boxes(0)], [boxes(seed) for seed in range(1, 9)]
    drawn = []
    patches = segmentation._patches
    monkeypatch.setattr(segmentation, "_patches", lambda pool, seed: drawn.append(len(pool)) or patches(pool, seed))
    train_segmenter([few, many], CLASSES, steps=1, seed=0)
    train_segmenter([many], CLASSES, steps=1, seed=0)
    assert drawn == [1, 8, 8, 8]
