"""The shipped weights on the volumes that their training never saw: the table and the pictures of the model card.

    python -m benchmarks.shipped_weights [--pictures docs]

It needs the clinical volumes (`make clinical-data`).
"""

from __future__ import annotations

from pathlib import Path

import fire
import torch
from monai.bundle import ConfigParser

from benchmarks.cost import print_table
from benchmarks.quality import measure, volume_name
from scripts.inferer import ReconstructionInferer
from scripts.picture import draw_reconstruction
from scripts.weights import load_weights

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
    inferer = ReconstructionInferer(parser["amp"], parser["amp_dtype"])
    cells = []
    for item in parser.get_parsed_content("validate#dataset"):
        image = item["image"].as_tensor()[None]
        with torch.no_grad():
            reconstruction = inferer(image.to(device), network).clamp(0, 1).cpu()
        found = measure(reconstruction, image, list(network.total_downsample_factor), network.latent_channels)
        name = volume_name(item)
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
        if pictures is not None:
            spacing = tuple(float(s) for s in item["image"].pixdim)
            figure = draw_reconstruction(image[0, 0], reconstruction[0, 0], spacing)
            figure.savefig(Path(pictures) / f"reconstruction_{name}.png", dpi=100)
    header = ["volume", "PSNR", "foreground", "SSIM", "MAE", "block DCT", "trilinear", "grid: image, network, DCT"]
    print_table(header, cells)


if __name__ == "__main__":
    fire.Fire(evaluate)
