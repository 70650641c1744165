"""The planner's command line.

    python -m scripts estimate [--config_file configs/train.json] [--memory_gb 12] [--any_config_key value]
    python -m scripts estimate --config_file configs/train_diffusion.json [--spatial_size 512] [--autoencoder PRESET]
        [--spatial_keys "['label']" --num_classes 132]
    python -m scripts recommend --spatial_size "[256,256,64]" --spacing "[0.8,0.8,3]" --memory_gb 8 [--output my.json]
    python -m scripts check

Exit code 0; 1 when a check fails or nothing fits; 2 for a bad request, with one line on stderr that says what is wrong.
"""

from __future__ import annotations

import json as jsonlib
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import fire

from scripts.bundle.errors import is_of_user
from scripts.planning import tables
from scripts.planning.costs import Estimate
from scripts.planning.estimates import estimate_plan, what_would_fit
from scripts.planning.generator_estimates import estimate_generator, plan_generator
from scripts.planning.plans import TRAIN, is_generator, positive, read_plan
from scripts.planning.recommendations import (
    FACTOR_KEYS,
    Recommendation,
    leanest,
    recommend_downsample_factors,
    write_overlay,
)
from scripts.planning.self_test import check_all


def estimate(
    *unexpected: Any,
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
        spatial_size: of the training patch, voxels; one number for a cube. Without it, the config's patch_size. For a
            generator, of the volumes; without it, that of the largest latent in dataset_dir.
        volume_size: of the volume that is reconstructed, voxels. Without it, spatial_size.
        autoencoder: for a generator, the config or preset of the autoencoder that makes the latents. Without it, that of the
            latents in dataset_dir, or train.json where spatial_size is set.
        num_classes: for a generator with spatial_size and --spatial_keys "['label']", number of classes of the label map,
            without the background; other keys are images. Without spatial_size, the latents say what they are.
        memory_gb: also print whether it fits into this many GiB, and if not, which changes would make it fit; with a config
            that only infers, also what slabs hold within it on a GPU.
        device: cuda or cpu, whose memory rules apply. No such device is needed.
        json: print JSON.
        overrides: any config key, e.g. --channels "[16,32,64]" --batch_size 2.
    """
    _refuse(unexpected)
    budget = None if memory_gb is None else positive("memory_gb", memory_gb)
    for_generator = is_generator(config_file)
    if for_generator and volume_size is not None:
        raise ValueError("`volume_size` is for an autoencoder; the size of a generator's volumes is `spatial_size`.")
    for name, value in (("autoencoder", autoencoder), ("num_classes", num_classes)):
        if value is not None and not for_generator:
            raise ValueError(f"`{name}` is for the config of a generator, such as configs/train_diffusion.json.")
    if for_generator:
        generator = plan_generator(config_file, spatial_size, autoencoder, num_classes, device=device, **overrides)
        found = estimate_generator(generator, device)
    else:
        plan = read_plan(config_file, device=device, **overrides)
        found = estimate_plan(plan, spatial_size, volume_size, device)
    fits = None if budget is None else found.fits(budget)
    trains = not for_generator and plan.patch_size is not None
    changes = []
    if budget is not None and not fits and trains:
        changes = what_would_fit(plan, found.spatial_size, found.volume_size, budget, device)
    if json:
        _print_json({**found.as_dict(), "fits": fits, "changes": [asdict(change) for change in changes]})
        return
    print(tables.estimate_table(found))
    if budget is not None:
        print("\n" + tables.verdict(found, budget, changes))
    if not (for_generator or trains) and device == "cuda":
        print("\n" + tables.slab_table(plan.network, found.volume_size, budget, plan.amp_dtype))


def recommend(
    *unexpected: Any,
    spatial_size: int | Sequence[int] | None = None,
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
        spatial_size: of the volumes, voxels, in the order of the axes after orientation to RAS.
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
    _refuse(unexpected)
    if spatial_size is None:
        raise ValueError('recommend needs the size of the volumes, e.g. --spatial_size "[256,256,64]".')
    found = recommend_downsample_factors(
        spatial_size,
        target_latent_size,
        memory_gb,
        spacing=spacing,
        voxels_per_latent=voxels_per_latent,
        count=count,
        device=device,
        **overrides,
    )
    generators = [_generator_of(item, device) for item in found]
    if memory_gb is not None:
        order = sorted(range(len(found)), key=lambda i: not generators[i].fits(memory_gb))
        found, generators = [found[i] for i in order], [generators[i] for i in order]
    if json:
        _print_json(
            [
                {**vars(item), "estimate": item.estimate.as_dict(), "generator": generator.as_dict()}
                for item, generator in zip(found, generators)
            ]
        )
    elif found:
        print(tables.recommendations_table(found, generators))
    if not found:
        sys.exit(_what_would_fit(spatial_size, positive("memory_gb", memory_gb), device, overrides))
    if output is not None:
        if rank not in range(1, len(found) + 1):
            raise ValueError(f"`rank` is {rank!r}; it must be one of 1 to {len(found)}.")
        write_overlay(found[rank - 1], output)
        print(f"{output}: --config_file \"['configs/train.json','{output}']\"", file=sys.stderr)


def check(*unexpected: Any, json: bool = False, **unknown: Any) -> None:
    """
    Build the default configuration and every preset, train it for two steps on a small volume, encode and decode.

    Args:
        json: print JSON.
    """
    _refuse([*unexpected, *(f"--{key}" for key in unknown)])
    results = check_all()
    if json:
        _print_json([asdict(result) for result in results])
    else:
        print(tables.checks_table(results))
    if any(result.error is not None for result in results):
        sys.exit(1)


def _refuse(unexpected: Sequence[Any]) -> None:
    if unexpected:
        raise ValueError(f"unexpected argument: {unexpected[0]}.")


def _what_would_fit(spatial_size: Any, memory_gb: float, device: str, overrides: dict[str, Any]) -> str:
    """The message for a budget that no configuration fits, with changes that would fit."""
    least, changes = leanest(spatial_size, memory_gb, device, **overrides)
    factors = ", ".join(f"{key} {least.overlay[key]}" for key in FACTOR_KEYS)
    return f"nothing fits, not even with {factors}:\n{tables.verdict(least.estimate, memory_gb, changes)}"


def _generator_of(recommendation: Recommendation, device: str) -> Estimate:
    """What the generator of ``train_diffusion.json`` needs on the latents of a recommended autoencoder."""
    overlay = {key: value for key, value in recommendation.overlay.items() if key != "patch_size"}
    autoencoder = read_plan(device=device, **overlay).network
    plan = plan_generator(spatial_size=recommendation.padded_size, autoencoder=autoencoder, device=device)
    return estimate_generator(plan, device)


def _print_json(content: Any) -> None:
    print(jsonlib.dumps(content, indent=2))


COMMANDS = {"estimate": estimate, "recommend": recommend, "check": check}


def main(arguments: Sequence[str]) -> None:
    """Run one command; see the module's docstring for the exit codes."""
    first = arguments[0] if arguments else "--help"
    if not first.startswith("-") and first not in COMMANDS:
        sys.exit(_bad_request(f"there is no command {first!r}; it must be one of {', '.join(COMMANDS)}."))
    if "--help" in arguments[1:]:
        arguments = [first, "--", "--help"]  # fire would take it for a config key
    try:
        fire.Fire(COMMANDS, command=list(arguments), name="python -m scripts")
    except Exception as error:
        if not is_of_user(error):
            raise
        sys.exit(_bad_request(str(error)))


def _bad_request(message: str) -> int:
    print(" ".join(message.split()), file=sys.stderr)
    return 2


if __name__ == "__main__":
    main(sys.argv[1:])
