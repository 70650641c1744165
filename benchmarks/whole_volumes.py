"""Whether a network that was trained on crops keeps its quality on whole volumes, whose norms see other statistics.

    OMP_NUM_THREADS=1 python -m benchmarks.whole_volumes --network 8x --data sample

Takes the weights that `python -m benchmarks.quality train` left and reconstructs each validation volume twice: in one pass,
and in crops of the size of training's, of which every voxel is taken from the one whose centre is nearest.
"""

from __future__ import annotations

from typing import Any

import fire
import torch
from monai.inferers import SlidingWindowInferer
from monai.metrics import PSNRMetric

from benchmarks.cost import print_table
from benchmarks.machine import described
from benchmarks.networks import total_factors
from benchmarks.quality import RESULTS, at_any_size, recipe_of_row, validation_volumes
from scripts.bundle.precision import autocast_dtype, computing_dtype

NEAREST = 0.03  # of a crop's size, the width of a Gaussian window that leaves next to nothing to the other crops


@torch.no_grad()
def main(network: str = "8x", data: str = "sample") -> None:
    """
    Print the table.

    Args:
        network: name of a row of ``quality_rows.json``.
        data: ``sample`` or ``clinical``, folders below ``data``.
    """
    network = str(network)
    parser = recipe_of_row(network, data)
    get = parser.get_parsed_content
    print(f"{described('cpu', computing_dtype(get('amp'), get('amp_dtype')))}:\n")
    trained: Any = parser.get_parsed_content("network_def")
    trained.load_state_dict(torch.load(RESULTS / f"{data}-{network}.pt", weights_only=True))
    trained.eval()

    def whole(image: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", autocast_dtype(get("amp_dtype")), enabled=get("amp")):
            return at_any_size(trained.reconstruct, image, list(total_factors(trained))).float()

    crops = SlidingWindowInferer(parser["patch_size"], overlap=0.5, mode="gaussian", sigma_scale=NEAREST)
    metric: Any = PSNRMetric(max_val=1.0)
    rows = []
    for name, item in validation_volumes(parser):
        image = item.as_tensor()[None]
        found = (metric(code(image).clamp(0, 1), image).item() for code in (whole, lambda x: crops(x, whole)))
        rows.append([name, *(f"{psnr:.2f} dB" for psnr in found)])
    print_table(["volume", "in one pass", f"in crops of {'x'.join(map(str, parser['patch_size']))}"], rows)


if __name__ == "__main__":
    fire.Fire(main)
