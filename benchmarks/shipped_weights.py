"""The shipped weights on volumes that they were not trained on: the table and the pictures of the model card.

    python -m benchmarks.shipped_weights [--pictures docs]

It needs the clinical volumes (`make clinical-data`).
"""

from __future__ import annotations

import fire
from monai.bundle import ConfigParser

from benchmarks.quality import measure_volumes
from benchmarks.tables import print_table
from scripts.bundle.weights import load_weights

CONFIGS = ["configs/train.json", "configs/shipped_weights.json"]


def evaluate(pictures: str | None = None, device: str = "cpu") -> None:
    """
    Print a row for each volume.

    Args:
        pictures: folder for a picture of each.
        device: where to run.
    """
    parser = ConfigParser()
    parser.read_config(CONFIGS)
    parser.update({"device": device})
    network = parser.get_parsed_content("network").eval()
    load_weights(network, "models/model.pt")
    cells = []
    for name, found in measure_volumes(parser, network, pictures and f"{pictures}/reconstruction_").items():
        cells.append(
            [
                f"`{name}`",
                f"**{found['psnr']:.2f} dB**",
                f"{found['foreground_psnr']:.2f} dB",
                f"{found['ssim']:.3f}",
                f"{found['mae']:.4f}",
                f"{found['dct_psnr']:.2f} dB",
                f"{found['trilinear_psnr']:.2f} dB",
                f"{found['image_grid']:.3f}, {found['grid']:.3f}, {found['dct_grid']:.3f}",
            ]
        )
    header = ["volume", "PSNR", "foreground", "SSIM", "MAE", "block DCT", "trilinear", "grid: image, network, DCT"]
    print_table(header, cells)


if __name__ == "__main__":
    fire.Fire(evaluate)
