"""The planner's command line.

    python -m scripts estimate [--config_file configs/train.json] [--memory_gb 12] [--any_config_key value]
    python -m scripts estimate --config_file configs/train_diffusion.json [--spatial_size 512] [--autoencoder PRESET]
        [--spatial_keys "['label']" --num_classes 132]
    python -m scripts recommend --spatial_size "[256,256,64]" --spacing "[0.8,0.8,3]" --memory_gb 8 [--output my.json]
    python -m scripts check

Exit code 0; 1 when a check fails or nothing fits; 2 for a bad request, which stderr says in one line.
"""

from __future__ import annotations

import json as jsonlib
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import fire
from monai.bundle import ConfigParser

from scripts.bundle.errors import is_of_user, reason
from scripts.bundle.files import write_atomically
from scripts.bundle.json_files import PositiveFloat, checked
from scripts.planning import tables
from scripts.planning.autoencoder_estimates import TRAIN, estimate_changes, estimate_memory, read_plan
from scripts.planning.generator_estimates import estimate_generator, plan_generator
from scripts.planning.recommendations import NothingFits, recommend_downsample_factors
from scripts.planning.self_test import check_all


def estimate(
    *,
    config_file: str | Sequence[str] = TRAIN,
    spatial_size: int | Sequence[int] | None = None,
    volume_size: int | Sequence[int] | None = None,
    memory_gb: float | None = None,
    autoencoder: str | Sequence[str] | None = None,
    num_classes: int | None = None,
    device: str = "cuda",
    json: bool = False,
    **overrides: Any,
) -> None:
    """
    Memory and operations that a configuration needs, for a training step and for reconstructing a volume; with the config of
    a generator, for a training step, for sampling and for decoding.

    Args:
        config_file: a config, or a list of a config and its overlays, as monai.bundle run takes them.
        spatial_size: size of the training patch, voxels; one number for a cube. Without it, the config's patch_size. For a
            generator, of the volumes; without it, that of the largest latent in dataset_dir.
        volume_size: size of the volume that an autoencoder reconstructs, voxels. Without it, spatial_size.
        memory_gb: also print whether it fits into this many GiB, and if not, which options would need less; with a config
            that only infers, also what slabs hold within it on a GPU.
        autoencoder: for a generator with spatial_size, the config or preset of the autoencoder that makes the latents.
            Without it, train.json.
        num_classes: for a generator with spatial_size and --spatial_keys "['label']", number of classes of the label map,
            without the background; other keys are images.
        device: cuda or cpu, whose memory rules apply. No such device is needed.
        json: print JSON.
        overrides: any config key, e.g. --channels "[16,32,64]" --batch_size 2.
    """
    checked(memory_gb, PositiveFloat | None, "memory_gb")
    slabs, changes = "", {}
    if "flow" in ConfigParser.load_config_files(config_file):  # a generator
        generator = plan_generator(config_file, spatial_size, autoencoder, num_classes, device=device, **overrides)
        found = estimate_generator(generator)
    else:
        asked: Any = {"config_file": config_file, "device": device, **overrides}
        found = estimate_memory(spatial_size, volume_size=volume_size, **asked)
        trains = "training" in found.costs
        if memory_gb and trains and not found.fits(memory_gb):
            changes = estimate_changes(found, **asked)
        if not (trains or json) and device == "cuda":
            plan = read_plan(**asked)
            slabs = tables.slab_table(plan.network, found.volume_size, memory_gb, plan.amp_dtype)
    if json:
        fits = found.fits(memory_gb) if memory_gb else None
        print(jsonlib.dumps({**asdict(found), "fits": fits, "changes": changes}, indent=2))
        return
    verdict = tables.verdict(found, memory_gb, changes) if memory_gb else ""
    print("\n\n".join(filter(None, [tables.estimate_table(found), verdict, slabs])))


def recommend(
    *,
    spatial_size: int | Sequence[int],
    target_latent_size: int = 32,
    memory_gb: float | None = None,
    spacing: Sequence[float] | None = None,
    voxels_per_latent: float | None = None,
    count: int = 5,
    output: str | None = None,
    rank: int = 1,
    device: str = "cuda",
    json: bool = False,
    **overrides: Any,
) -> None:
    """
    The configurations that suit a volume and a GPU best. Those come first with which the generator of train_diffusion.json
    fits too.

    Args:
        spatial_size: size of the volumes, voxels, in the order of the axes after orientation to RAS.
        target_latent_size: wanted size of the latent along its longest axis.
        memory_gb: limit in GiB for training and for reconstruction.
        spacing: mm per voxel along each axis.
        voxels_per_latent: wanted voxels for each number of the latent.
        count: how many to list.
        output: write an overlay that `monai.bundle run training` takes after train.json.
        rank: which one to write, 1 for the first.
        device: cuda or cpu, whose memory rules apply. No such device is needed.
        json: print JSON.
        overrides: any config key, e.g. --channels "[16,32,64]" --batch_size 2.
    """
    request: Any = {"spacing": spacing, "voxels_per_latent": voxels_per_latent, "count": count, **overrides}
    try:
        found = recommend_downsample_factors(spatial_size, target_latent_size, memory_gb, device=device, **request)
    except NothingFits as error:
        sys.exit(f"{error}:\n{tables.verdict(error.least.estimate, memory_gb or 0, error.changes)}")
    pairs = []
    for item in found:
        network = read_plan(device=device, **item.overlay).network
        plan = plan_generator(spatial_size=item.overlay["patch_size"], autoencoder=network, device=device)
        pairs.append((item, estimate_generator(plan)))
    if memory_gb is not None:
        pairs.sort(key=lambda pair: not pair[1].fits(memory_gb))
    if json:
        print(jsonlib.dumps([{**asdict(item), "generator": asdict(generator)} for item, generator in pairs], indent=2))
    else:
        print(tables.recommendations_table(pairs))
    if output is not None:
        if rank not in range(1, len(pairs) + 1):
            raise ValueError(f"`rank` is {rank!r}; it must be one of 1 to {len(pairs)}.")
        best = pairs[rank - 1][0]
        write_atomically(jsonlib.dumps({"_desc_": best.reason, **best.overlay}, indent=4).encode(), Path(output))
        print(f"{output}: --config_file \"['configs/train.json','{output}']\"", file=sys.stderr)


def check(*, json: bool = False, **overrides: Any) -> None:
    """
    Build the default configuration and every preset, train it for two steps on a small volume, encode and decode.

    Args:
        json: print JSON.
        overrides: any config key, e.g. --amp false.
    """
    results = check_all(**overrides)
    print(jsonlib.dumps([asdict(result) for result in results], indent=2) if json else tables.checks_table(results))
    if any(result.error is not None for result in results):
        sys.exit(1)


COMMANDS = {"estimate": estimate, "recommend": recommend, "check": check}


def main(arguments: Sequence[str]) -> None:
    """Run one command; see the module's docstring for the exit codes."""
    if "--help" in arguments[1:]:
        arguments = [arguments[0], "--", "--help"]  # fire would take it for a config key
    try:
        fire.Fire(COMMANDS, command=list(arguments), name="python -m scripts")
    except Exception as error:
        if not is_of_user(error):
            raise
        print(" ".join(str(reason(error)).split()), file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
