"""Whether generated pairs of image and label map are worth training on: the Dice of small segmentation networks.

    python -m benchmarks.usefulness --real data/heads --generated GENERATED --generated_by_few GENERATED_BY_FEW

Each network is trained for the same number of steps, which take the same time whatever it is trained on, and with the same
augmentation (scripts/evaluation/samples/segmentation.py). In the row with real and generated pairs, half of each batch is
real. Each network's result is a file in the output folder; those that are there are not trained again. One thread is enough:
OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import fire
import nibabel as nib
import numpy as np
import torch

from benchmarks.tables import described, print_table
from scripts.evaluation.samples.segmentation import Pair, dice, train_segmenter


def usefulness(
    real: str,
    generated: str | None = None,
    generated_by_few: str | None = None,
    few: int = 16,
    steps: int = 450,
    seeds: int = 3,
    output: str = "eval/usefulness",
) -> None:
    """
    Train networks on real and generated pairs, and print a table of their Dice coefficients.

    Args:
        real: folder with a ``dataset.json`` of the Medical Segmentation Decathlon: its training pairs are trained on, its
            validation pairs are measured on, and its ``labels`` are the columns.
        generated: folder with the ``dataset.json`` of pairs by a generator that was trained on all training pairs; None
            leaves its row out.
        generated_by_few: the same by a generator that was trained on the first ``few`` training pairs.
        few: number of real pairs where there are few.
        steps: of training.
        seeds: networks in each row.
        output: folder of the results.
    """
    dataset, (pairs, held_out) = load_pairs(real, "training", "validation")
    pools = {f"{few} real": [pairs[:few]], f"{len(pairs)} real": [pairs]}
    if generated is not None:
        _, (made,) = load_pairs(generated, "training")
        pools[f"{len(made)} generated"] = [made]
    if generated_by_few is not None:
        _, (made,) = load_pairs(generated_by_few, "training")
        pools[f"{few} real and {len(made)} generated"] = [pairs[:few], made]

    names = {int(label): name for label, name in dataset["labels"].items() if int(label)}
    results: dict[str, list[dict[str, Any]]] = {row: [] for row in pools}
    Path(output).mkdir(parents=True, exist_ok=True)
    print(f"{described('cpu', 'float32')}; {len(held_out)} held-out volumes, {steps} steps:\n", flush=True)
    for seed, (row, of_row) in itertools.product(range(seeds), pools.items()):
        path = Path(output, f"{row.replace(' ', '-')}_{steps}-steps_seed-{seed}.json")
        if not path.exists():
            path.write_text(json.dumps(measure(of_row, held_out, list(names), steps, seed)))
        results[row].append(json.loads(path.read_text()))
    header = ["trained on", "mean Dice", "of each seed", "range", *names.values(), "processor time"]
    print_table(header, (cells(row, found) for row, found in results.items()))


def load_pairs(folder: str, *parts: str) -> tuple[dict[str, Any], list[list[Pair]]]:
    """The ``dataset.json`` of a folder, and the images of each of its lists with their labels, ``1xHxWxD``, as stored."""
    content = json.loads(Path(folder, "dataset.json").read_text())

    def voxels(name: str) -> torch.Tensor:
        return torch.from_numpy(np.asarray(nib.load(Path(folder, name)).dataobj))[None]

    return content, [[(voxels(item["image"]), voxels(item["label"])) for item in content[part]] for part in parts]


def measure(pools: Sequence[Sequence[Pair]], held_out: Sequence[Pair], classes: Sequence[int], steps: int, seed: int) -> Any:
    """Processor time of a training, seconds, and the Dice of each class, averaged over the volumes that have it."""
    start = time.process_time()
    network = train_segmenter(pools, classes, steps, seed)
    seconds = time.process_time() - start
    return {"seconds": seconds, "dice": dice(network, held_out, classes).nanmean(0).tolist()}


def cells(row: str, results: Sequence[dict[str, Any]]) -> list[str]:
    """The cells of a row."""
    means = [mean(result["dice"]) for result in results]
    tissues = [mean(values) for values in zip(*(result["dice"] for result in results))]
    return [
        row,
        f"**{mean(means):.3f}**",
        ", ".join(f"{each:.3f}" for each in means),
        f"{max(means) - min(means):.3f}",
        *(f"{each:.3f}" for each in tissues),
        f"{mean(result['seconds'] for result in results):.0f} s",
    ]


if __name__ == "__main__":
    fire.Fire(usefulness)
