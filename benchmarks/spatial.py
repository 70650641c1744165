"""Generated volumes against the truth that they were generated from parts of: thin slices from thick ones, and filled holes.

    python -m benchmarks.spatial slices --samples_dir OUT --dataset_dir PAIRS --factor 4 [--decoded_dir DECODED]
    python -m benchmarks.spatial holes --samples_dir OUT --dataset_dir PAIRS [--decoded_dir DECODED]

PAIRS is a folder that `scripts.data.degrade` wrote, OUT the samples that were generated from its volumes, and
DECODED those volumes, encoded and decoded (`evaluating` of configs/inference.json): the limit of what samples can reach.
Samples get the intensities of what is given by a straight line. Numbers are means over the volumes, in the window of each.
"""

from __future__ import annotations

import itertools
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import fire
import numpy as np
import torch
from monai.data import MetaTensor
from scipy.sparse.linalg import cg

from benchmarks.tables import print_table
from scripts.data.consistency import agree_with_slices, in_units_of
from scripts.data.dataset_tables import dataset_lists
from scripts.data.degrade import average_slices, fill_hole, hole_equations, interpolate_slices
from scripts.data.file_names import output_path
from scripts.data.intensity_window import ScaleIntensityWindowd, intensity_window
from scripts.data.volume_reader import read_volume, state_of
from scripts.evaluation.samples.spatial_evaluation import border_step, fidelity, inside_mae

PERCENTILES = (0.0, 99.9)  # `intensity_percentiles` of the configs
Numbers = dict[str, float]
Scores = dict[str, list[Numbers]]


def slices(
    samples_dir: str, dataset_dir: str, factor: int, axis: int = 2, thick_key: str = "thick", decoded_dir: str | None = None
) -> None:
    """
    Print PSNR and SSIM to the thin volumes.

    Args:
        factor: thin slices in a thick one.
        axis: of the file, along which the slices lie.
        thick_key: key of the thick slices in the pairs.
    """
    scores: Scores = defaultdict(list)
    for truth, _, estimates in _cases(samples_dir, dataset_dir, [thick_key], decoded_dir):
        score = partial(_nearness, truth=truth)
        thick = average_slices(truth, factor, axis)
        cubic = interpolate_slices(thick, factor, axis, truth.shape[axis])
        scores["cubic interpolation"].append(score(cubic))
        scores["cubic interpolation, agreeing"].append(score(agree_with_slices(cubic, thick, factor, axis)))
        for name, samples in estimates.items():
            matched = [in_units_of(thick, sample, average_slices(sample, factor, axis)) for sample in samples]
            _add(scores, name, "", matched, score)
            _add(scores, name, ", agreeing", [agree_with_slices(each, thick, factor, axis) for each in matched], score)
    _print(scores, {"psnr": "{:.2f} dB", "ssim": "{:.4f}"})


def holes(samples_dir: str, dataset_dir: str, decoded_dir: str | None = None) -> None:
    """Print the errors inside the holes (keys ``masked`` and ``hole`` of the pairs) and the steps across their borders, the
    latter beside those of the real volumes."""
    scores: Scores = defaultdict(list)
    for truth, (masked, hole), estimates in _cases(samples_dir, dataset_dir, ["masked", "hole"], decoded_dir):
        inside = hole != 0
        score = partial(_inside, truth=truth, inside=inside)
        given = np.where(inside, masked, truth)  # in the window of the truth
        biharmonic = given.copy()
        biharmonic[inside] = cg(*hole_equations(given, inside, order=2))[0]
        scores["biharmonic filling"].append(score(biharmonic))
        for name, samples in estimates.items():
            matched = [in_units_of(truth[~inside], sample, sample[~inside]) for sample in samples]
            _add(scores, name, ", as it is", [np.where(inside, sample, given) for sample in matched], score)
            _add(scores, name, ", without a step", [fill_hole(sample, given, inside) for sample in matched], score)
    _print(scores, {"mean error": "{:.4f}", "PSNR inside": "{:.2f} dB", "step / real step": "{:.2f}"})


def _cases(
    samples_dir: str, dataset_dir: str, keys: list[str], decoded_dir: str | None
) -> Iterator[tuple[np.ndarray, list[np.ndarray], dict[str, list[np.ndarray]]]]:
    """The volumes that have samples: truth in its window, files of the keys, and estimates by name."""
    samples = defaultdict(list)
    for file in sorted(Path(samples_dir).rglob("*_sample_*.json")):
        samples[json.loads(file.read_text())["spatial_states"][keys[0]]].append(file.with_suffix(".nii.gz"))
    for item in itertools.chain(*dataset_lists(dataset_dir).values()):
        found = samples[state_of(os.path.join(dataset_dir, item[keys[0]]))]
        if not found:
            continue
        image = MetaTensor(torch.from_numpy(_voxels(Path(item["image"])).astype(np.float32))[None])
        scaled = ScaleIntensityWindowd("image", PERCENTILES)({"image": image})["image"]
        low, high = (intensity_window(scaled)[f"intensity_{side}"][0] for side in ("low", "high"))
        estimates = {"sample": [_voxels(path) for path in found]}
        if decoded_dir is not None:
            image_path = Path(item["image"]).relative_to(dataset_dir).as_posix()
            estimates["decoded true latents"] = [_voxels(output_path(decoded_dir, image_path, "reconstruction"))]
        given = [(_voxels(Path(dataset_dir, item[key])) - low) / (high - low) for key in keys]
        yield scaled.as_tensor()[0].numpy().astype(np.float64), given, estimates


def _voxels(path: Path) -> np.ndarray:
    return read_volume(str(path))[0].astype(np.float64)


def _add(scores: Scores, name: str, state: str, volumes: list[np.ndarray], score: Callable[[np.ndarray], Numbers]) -> None:
    """Add the score of the first volume, and of the mean of all."""
    scores[f"{name}{state}"].append(score(volumes[0]))
    if len(volumes) > 1:
        scores[f"mean of {len(volumes)} {name}s{state}"].append(score(np.mean(volumes, axis=0)))


def _nearness(volume: np.ndarray, truth: np.ndarray) -> Numbers:
    return fidelity(*_tensors(volume.clip(0, 1), truth))


def _inside(filled: np.ndarray, truth: np.ndarray, inside: np.ndarray) -> Numbers:
    volume, real, hole = _tensors(filled.clip(0, 1), truth, inside)
    return {
        "mean error": inside_mae(volume, real, hole),
        "PSNR inside": float(-10 * (volume - real)[hole].square().mean().log10()),
        "step / real step": border_step(volume, hole) / border_step(real, hole),
    }


def _tensors(*volumes: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(volume)[None] for volume in volumes]


def _print(scores: Scores, forms: dict[str, str]) -> None:
    volumes = len(next(iter(scores.values())))
    rows = [
        [name, *(form.format(np.mean([one[key] for one in found])) for key, form in forms.items())]
        for name, found in scores.items()
    ]
    print_table([f"{volumes} volumes", *forms], rows)


if __name__ == "__main__":
    fire.Fire({"slices": slices, "holes": holes})
