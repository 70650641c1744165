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

from benchmarks.machine import described
from benchmarks.tables import print_table
from scripts.evaluation.samples.segmentation import Pair, train_segmenter

__all__ = ["usefulness"]

STEPS = 450


def usefulness(
    real: str,
    generated: str | None = None,
    generated_by_few: str | None = None,
    few: int = 16,
    steps: int = STEPS,
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
    dataset = read_dataset(real)
    pairs, held_out = (load_pairs(real, dataset[part]) for part in ("training", "validation"))
    pools = {f"{few} real": [pairs[:few]], f"{len(pairs)} real": [pairs]}
    if generated is not None:
        made = load_pairs(generated, read_dataset(generated)["training"])
        pools[f"{len(made)} generated"] = [made]
    if generated_by_few is not None:
        made = load_pairs(generated_by_few, read_dataset(generated_by_few)["training"])
        pools[f"{few} real and {len(made)} generated"] = [pairs[:few], made]

    names = {int(label): name for label, name in dataset["labels"].items() if int(label)}
    results = Path(output)
    results.mkdir(parents=True, exist_ok=True)
    print(f"{described('cpu', 'float32')}; {len(held_out)} held-out volumes, {steps} steps:\n", flush=True)
    for seed, (row, of_row) in itertools.product(range(seeds), pools.items()):
        path = result_path(results, row, steps, seed)
        if not path.exists():
            path.write_text(json.dumps(measure(of_row, held_out, list(names), steps, seed)))
    print_table(
        ["trained on", "mean Dice", "of each seed", "range", *names.values(), "processor time"],
        (
            cells(row, [json.loads(result_path(results, row, steps, seed).read_text()) for seed in range(seeds)])
            for row in pools
        ),
    )


def read_dataset(folder: str) -> dict[str, Any]:
    """The content of a folder's ``dataset.json``."""
    content: dict[str, Any] = json.loads((Path(folder) / "dataset.json").read_text())
    return content


def load_pairs(folder: str, items: Sequence[dict[str, str]]) -> list[Pair]:
    """The images of a list with their labels, ``1xHxWxD``, as they are stored."""
    volumes = ([nib.load(Path(folder) / item[key]) for key in ("image", "label")] for item in items)
    return [tuple(torch.from_numpy(np.asarray(volume.dataobj))[None] for volume in pair) for pair in volumes]


def result_path(folder: Path, row: str, steps: int, seed: int) -> Path:
    """The file of one network's numbers."""
    return folder / f"{row.replace(' ', '-')}_{steps}-steps_seed-{seed}.json"


def measure(pools: Sequence[Sequence[Pair]], held_out: Sequence[Pair], classes: Sequence[int], steps: int, seed: int) -> Any:
    """Processor time of a training, seconds, and the Dice of each class, averaged over the volumes that have it."""
    start = time.process_time()
    segmenter = train_segmenter(pools, classes, steps, seed)
    seconds = time.process_time() - start
    return {"seconds": seconds, "dice": segmenter.dice(held_out).nanmean(0).tolist()}


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
