"""The shipped weights on volumes that they were not trained on: the tables and the pictures of the model card.

    python -m benchmarks.shipped_weights [--pictures docs] [--dataset_dir /data/mine]

It needs the clinical volumes (`make clinical-data`), unless another folder is given.
"""

from __future__ import annotations

from pathlib import Path

import fire
from monai.bundle import ConfigParser

from benchmarks.quality import measure_volumes
from benchmarks.tables import print_table
from scripts.bundle.weights import load_weights

RECIPE = ["configs/synthetic_patches.json", "configs/shipped_weights.json"]
SETS = {"models": [], "models/16x": ["configs/presets/16x.json"]}  # folder of the weights, and the preset of their network
COLUMNS = {
    "volume": "`{volume}`",
    "PSNR": "**{psnr:.2f}** ({dct_psnr:.2f}) dB",
    "foreground": "{foreground_psnr:.2f} ({dct_foreground_psnr:.2f}) dB",
    "edges": "{edge_psnr:.2f} ({dct_edge_psnr:.2f}) dB",
    "SSIM": "{ssim:.3f} ({dct_ssim:.3f})",
    "sharpness": "{sharpness:.2f} ({dct_sharpness:.2f})",
    "MAE": "{mae:.4f} ({dct_mae:.4f})",
    "trilinear": "{trilinear_psnr:.2f} dB",
    "grid: image, network, DCT": "{image_grid:.3f}, {grid:.3f}, {dct_grid:.3f}",
}


def evaluate(pictures: str | None = None, dataset_dir: str | None = None, device: str = "cpu") -> None:
    """
    Print a table for each set of weights, with a row for each volume.

    Args:
        pictures: folder for a picture of each volume by the weights in `models`.
        dataset_dir: volumes to measure instead of those that the training's recipe leaves out.
        device: where to run.
    """
    for folder, presets in SETS.items():
        parser = ConfigParser(ConfigParser.load_config_files(["configs/train.json", *presets, *RECIPE]))
        parser.update({"device": device})
        if dataset_dir is not None:
            files = sorted(str(path) for path in Path(dataset_dir).rglob("*.nii*"))
            parser.update({"data#usable": {"training": [], "validation": [{"image": file} for file in files]}})
        network = parser.get_parsed_content("network").eval()
        load_weights(network, f"{folder}/model.pt")
        start = f"{pictures}/reconstruction_" if pictures and folder == "models" else None
        print(f"\n`{folder}`, in parentheses the block cosine transform of equal size:\n", flush=True)
        rows = measure_volumes(parser, network, start)
        print_table(COLUMNS, ([form.format(volume=name, **found) for form in COLUMNS.values()] for name, found in rows))


if __name__ == "__main__":
    fire.Fire(evaluate)
