"""The planner's command line.

    python -m scripts estimate [--config_file configs/train.json] [--memory_gb 12] [--any_config_key value]
    python -m scripts estimate --config_file configs/train_diffusion.json [--spatial_size 512] [--autoencoder PRESET]
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

from scripts.bundle.config import ROOT
from scripts.bundle.errors import is_of_user
from scripts.planning import tables
from scripts.planning.config_keys import TRAIN, read_plan
from scripts.planning.estimates import Estimate, estimate_plan
from scripts.planning.generator_estimates import GeneratorEstimate, estimate_generator, is_generator, plan_generator
from scripts.planning.generator_tables import generator_table, generator_verdict
from scripts.planning.recommendations import (
    FACTOR_KEYS,
    Recommendation,
    leanest,
    recommend_downsample_factors,
    write_overlay,
)
from scripts.planning.request_checks import positive
from scripts.planning.savings import what_would_fit
from scripts.planning.self_test import check_all
from scripts.planning.slab_costs import slab_table


def estimate(
    *unexpected: Any,
    config_file: str | Sequence[str] = TRAIN,
    spatial_size: int | Sequence[int] | None = None,
    volume_size: int | Sequence[int] | None = None,
    memory_gb: float | None = None,
    autoencoder: str | Sequence[str] | None = None,
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
        memory_gb: also print whether it fits into this many GiB, and if not, which changes would make it fit; with a config
            that only infers, also what slabs hold within it on a GPU.
        device: cuda or cpu, whose memory rules apply. No such device is needed.
        json: print JSON.
        overrides: any config key, e.g. --channels "[16,32,64]" --batch_size 2.
    """
    _refuse(unexpected)
    budget = None if memory_gb is None else positive("memory_gb", memory_gb)
    if is_generator(config_file):
        if volume_size is not None:
            raise ValueError("`volume_size` is for an autoencoder; the size of a generator's volumes is `spatial_size`.")
        _estimate_generator(config_file, spatial_size, autoencoder, budget, device, json, overrides)
        return
    if autoencoder is not None:
        raise ValueError("`autoencoder` is for the config of a generator, such as configs/train_diffusion.json.")
    plan = read_plan(config_file, device=device, **overrides)
    found = estimate_plan(plan, spatial_size, volume_size, device)
    fits = None if budget is None else found.fits(budget)
    streams = plan.patch_size is None and device == "cuda"  # a config that infers, with weights that fix the network
    changes = []
    if budget is not None and not fits and not streams:
        changes = what_would_fit(plan, found.spatial_size, found.volume_size, budget, device)
    if json:
        _print_json({**_as_dict(found), "fits": fits, "changes": [asdict(change) for change in changes]})
        return
    print(tables.estimate_table(found))
    if streams:
        if budget is not None:
            print("\n" + tables.one_pass_verdict(found, budget))
        print("\n" + slab_table(plan.network, found.volume_size, budget, plan.amp_dtype))
    elif budget is not None:
        print("\n" + tables.verdict(found, budget, changes))


def _estimate_generator(
    config_file: str | Sequence[str],
    spatial_size: int | Sequence[int] | None,
    autoencoder: str | Sequence[str] | None,
    budget: float | None,
    device: str,
    json: bool,
    overrides: dict[str, Any],
) -> None:
    plan = plan_generator(config_file, spatial_size, autoencoder, device=device, **overrides)
    found = estimate_generator(plan, device)
    if json:
        _print_json({**_as_dict(found), "fits": None if budget is None else found.fits(budget)})
        return
    print(generator_table(found))
    if budget is not None:
        print("\n" + generator_verdict(found, budget))


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
                {**asdict(item), "estimate": _as_dict(item.estimate), "generator": _as_dict(generator)}
                for item, generator in zip(found, generators)
            ]
        )
    elif found:
        print(tables.recommendations_table(found, [generator.training_bytes for generator in generators]))
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


def _generator_of(recommendation: Recommendation, device: str) -> GeneratorEstimate:
    """What the generator of ``train_diffusion.json`` needs on the latents of a recommended autoencoder."""
    size, overlay = recommendation.padded_size, recommendation.overlay
    autoencoder = read_plan(device=device, **{key: value for key, value in overlay.items() if key != "patch_size"}).network
    return estimate_generator(plan_generator(DIFFUSION, size, autoencoder, device=device), device)


def _as_dict(estimate: Estimate | GeneratorEstimate) -> dict[str, Any]:
    totals = [
        name for name, value in vars(type(estimate)).items() if isinstance(value, property) and name.endswith("_bytes")
    ]
    return {**asdict(estimate), **{name: getattr(estimate, name) for name in totals if name != "needed_bytes"}}


def _print_json(content: Any) -> None:
    print(jsonlib.dumps(content, indent=2))


DIFFUSION = str(ROOT / "configs" / "train_diffusion.json")
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
