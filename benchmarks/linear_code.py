"""The quality of the linear shortcut by itself, before any training: as initialised, and after each of its two fits.

    python -m benchmarks.linear_code --network 8x --data sample

Prints a row for each in Markdown, with the PSNR of every validation volume. The first row is the block-wise cosine transform
with as many numbers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import fire
import torch
from monai.bundle import ConfigParser
from monai.metrics import PSNRMetric
from monai.utils import set_determinism

from benchmarks.quality import at_any_size, read_recipe, validation_volumes
from benchmarks.tables import print_table
from scripts.evaluation.block_dct import block_dct_reconstruction
from scripts.training.repeatable_batches import training_patches
from scripts.training.shortcut_fit import CODE_PATCHES, NEIGHBOUR_PATCHES


def main(network: str = "8x", data: str = "sample", **overrides: Any) -> None:
    """
    Print the table.

    Args:
        network: name of a preset with a linear shortcut.
        data: ``sample`` or ``clinical``, folders below ``data``.
        overrides: keys of ``configs/train.json``, such as ``latent_channels``.
    """
    found = measure(read_recipe(network, data, **overrides))
    volumes = next(iter(found.values()))
    rows = ([code, *(f"{psnr:.2f} dB" for psnr in by_volume.values())] for code, by_volume in found.items())
    print_table(["linear code", *volumes], rows)


@torch.no_grad()
def measure(parser: ConfigParser) -> dict[str, dict[str, float]]:
    """
    Fit the shortcut as training does.

    Args:
        parser: of :py:func:`benchmarks.quality.read_recipe`.

    Returns:
        PSNR by the name of the code, then by that of the validation volume.
    """
    set_determinism(seed=parser.get_parsed_content("seed"))
    network: Any = parser.get_parsed_content("network_def")
    shortcut, factors = network.shortcut, network.total_downsample_factor
    images = {name: item.as_tensor()[None] for name, item in validation_volumes(parser)}
    loader = parser.get_parsed_content("train#dataloader")
    patches = training_patches(loader.dataset, parser.get_parsed_content("train#sampler"))

    def linear(image: torch.Tensor) -> torch.Tensor:
        return at_any_size(shortcut, image, factors)

    def strongest(image: torch.Tensor) -> torch.Tensor:
        return block_dct_reconstruction(image, factors, network.latent_channels)

    def psnr(code: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        metric: Any = PSNRMetric(max_val=1.0)
        return {name: metric(code(image).clamp(0, 1), image).item() for name, image in images.items()}

    found = {"strongest frequencies of each volume": psnr(strongest), "lowest frequencies": psnr(linear)}
    shortcut.fit(itertools.islice(patches, CODE_PATCHES))
    found["principal components"] = psnr(linear)
    shortcut.fit_neighbours(itertools.islice(patches, NEIGHBOUR_PATCHES))
    found["and neighbours"] = psnr(linear)
    return found


if __name__ == "__main__":
    fire.Fire(main)
