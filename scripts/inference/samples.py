"""Which samples a run makes, how each is made, and how it is written: as NIfTI, with everything in a JSON file beside it."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.inferers import Inferer
from monai.transforms import Transform
from monai.utils.enums import CommonKeys as Keys

from scripts.autoencoderkl import AutoencoderKL
from scripts.bundle.files import content_hash, write_atomically
from scripts.bundle.processes import share_of
from scripts.bundle.progress import ProgressBar
from scripts.data.restored_volumes import NiftiHeader, Record, nifti_bytes, restore, rows_of
from scripts.diffusion.generator import Generator
from scripts.diffusion.guidance import Guidance
from scripts.diffusion.latent_space import LatentSpace, ranges
from scripts.diffusion.latent_unet import NUM_TIMESTEPS
from scripts.diffusion.solvers import SOLVERS, draw_noise, integrate
from scripts.diffusion.validation import FlowInferer
from scripts.layers.factors import padded_size
from scripts.layers.resampling import pad_to_multiple
from scripts.training.repeatable_batches import derive_seed

__all__ = ["DrawStartd", "SampleInferer", "SaveSampled", "plan_samples"]

PLAN = "plan"  # key of what a sample is made by, as JSON text
HEADER = "synthetic volume of a generative model, no patient"  # up to 79 characters
logger = logging.getLogger(__name__)


def plan_samples(
    guidance: Guidance,
    output_dir: str,
    num_samples: int,
    seed: int,
    num_inference_steps: int,
    solver: str,
    conditions: Mapping[str, Any],
    spatial_size: int | Sequence[int] | None,
    spacing: float | Sequence[float] | None,
    amp_dtype: str | None,
) -> list[dict[str, str]]:
    """
    This process's share of the samples that an earlier run into the folder did not make to the end.

    Size and spacing of a sample are drawn from those of the training volumes, together, unless they are given.

    Args:
        guidance: with the generator that makes them, see :py:class:`scripts.diffusion.Guidance`.
        output_dir: folder of the samples, ``sample_0000.nii.gz`` and so on.
        num_samples: how many the folder is to hold.
        seed: of the run; a sample depends on it and on its number.
        num_inference_steps: steps from noise to latent.
        solver: see :py:func:`scripts.diffusion.integrate`.
        conditions: by name; what is missing is left to the generator.
        spatial_size: voxels along each axis, or one number for all, or None.
        spacing: mm along each axis, or one number for all, or None.
        amp_dtype: of mixed precision, None without.

    Returns:
        ``[{"image": path, "plan": JSON text}, ...]``

    Raises:
        ValueError: for a setting that cannot be, a condition that training did not see, or volumes too small to make.
    """
    _check(num_samples, num_inference_steps, solver)
    generator, space = guidance.generator, guidance.generator.space
    told = space.conditions.checked(conditions)
    size = _checked_geometry(space, "spatial_size", spatial_size)
    step = _checked_geometry(space, "spacing", spacing)
    _refuse_small(generator, size)
    items = []
    for index in range(num_samples):
        geometries = space.description["geometries"]
        counts = np.array([each["count"] for each in geometries], dtype=float)
        drawn = geometries[np.random.default_rng((seed, index)).choice(len(geometries), p=counts / counts.sum())]
        plan = {
            "synthetic": True,
            "index": index,
            "seed": seed,
            "spatial_size": list(size or drawn["size"]),
            "spacing": list(map(float, step or drawn["spacing"])),
            "conditions": told,
            **guidance.settings,
            "num_inference_steps": num_inference_steps,
            "solver": solver,
            "amp_dtype": amp_dtype,
            "generator_sha256": generator.sha256,
            "autoencoder_sha256": space.description["autoencoder"]["sha256"],
        }
        items.append({"image": str(Path(output_dir) / f"sample_{index:04d}.nii.gz"), PLAN: json.dumps(plan)})
    missing = [item for item in items if not _is_whole(Path(item["image"]), json.loads(item[PLAN]))]
    if len(missing) < len(items):
        logger.info(f"{len(items) - len(missing)} of {len(items)} samples are there already")
    _warn_of_others(Path(output_dir), missing, num_samples)
    return share_of(missing)


def _warn_of_others(output_dir: Path, missing: Sequence[Mapping[str, str]], num_samples: int) -> None:
    """Samples of other settings in the folder: those of the same number are replaced, others stay among the new ones."""
    replaced = sum(_description_path(Path(item["image"])).is_file() for item in missing)
    if replaced:
        numbers = [path.stem.removeprefix("sample_") for path in output_dir.glob("sample_*.json")]
        beyond = sum(number.isdecimal() and int(number) >= num_samples for number in numbers)
        logger.warning(
            f"{output_dir} has samples of other settings, or damaged ones: {replaced} are replaced, and {beyond} stay, with "
            f"numbers from {num_samples} on. Give each setting an `output_dir` of its own to keep them apart."
        )


def _check(num_samples: int, num_inference_steps: int, solver: str) -> None:
    for name, value in (("num_samples", num_samples), ("num_inference_steps", num_inference_steps)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"`{name}` is {value!r}; it must be a positive integer.")
    if solver not in SOLVERS:
        raise ValueError(f"`solver` is {solver!r}; it must be one of {', '.join(SOLVERS)}.")


def _checked_geometry(space: LatentSpace, name: str, value: Any) -> Sequence[Any] | None:
    """``spatial_size`` or ``spacing``, a number for each axis. What is none is refused; training may not have seen it."""
    if value is None:
        return None
    axes, whole = len(space.factors), name == "spatial_size"
    types: Any = int if whole else (int, float)
    seen = space.seen("size" if whole else "spacing")
    kind, unit = ("integers", "voxels") if whole else ("numbers", "mm")
    values = list(value) if isinstance(value, (list, tuple)) else [value] * axes
    if len(values) != axes or not all(isinstance(n, types) and not isinstance(n, bool) and 0 < n < math.inf for n in values):
        raise ValueError(f"`{name}` is {value!r}; it must be {axes} positive {kind} ({unit}), or one for all axes.")
    if not all(low <= n <= high for n, (low, high) in zip(values, seen)):
        logger.warning(f"`{name}` {values}: training saw {ranges(seen)} {unit}; expect less of what lies outside")
    return values


def _refuse_small(generator: Generator, spatial_size: Sequence[int] | None) -> None:
    """Volumes below both the network's coarsest voxel and all that training saw would be nothing but one value."""
    space = generator.space
    least = [min(factor * generator.network.multiple, low) for factor, (low, _) in zip(space.factors, space.seen("size"))]
    if spatial_size is not None and any(n < smallest for n, smallest in zip(spatial_size, least)):
        raise ValueError(
            f"`spatial_size` {list(spatial_size)} is too small for this generator, which needs at least {least} voxels; "
            f"training saw {ranges(space.seen('size'))}."
        )


class DrawStartd(Transform):
    """
    What a sample starts from: the noise and what the network is told. The latent of the sample's size is padded at its end
    to what the network divides, as in training.

    Args:
        generator: that makes the samples.
    """

    def __init__(self, generator: Generator) -> None:
        self.space, self.network = generator.space, generator.network

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        plan = json.loads(data[PLAN])
        latent_size = [n // f for n, f in zip(padded_size(plan["spatial_size"], self.space.factors), self.space.factors)]
        size = padded_size(latent_size, [self.network.multiple] * len(latent_size))
        shape = (self.space.latent_channels, *size)
        told = self.space.conditions.vector(plan["conditions"], plan["spatial_size"], plan["spacing"])
        seed = derive_seed(plan["seed"], plan["index"])
        return {
            **data,
            Keys.IMAGE: draw_noise(shape, seed),
            "noise_seed": torch.tensor(seed),
            "context": told,
            "latent_size": torch.tensor(latent_size),
        }


class SampleInferer(Inferer):
    """
    From noise to a volume: along the flow to a latent, and through the autoencoder's decoder.

    Args:
        guidance: of the generator, see :py:func:`plan_samples`.
        autoencoder: that decodes, on its device.
        decoder: inferer that calls it, such as :py:class:`scripts.inference.StreamingInferer`.
        num_inference_steps: see :py:func:`plan_samples`.
        solver: ditto.
        amp: whether the network of the generator uses mixed precision. The state is float32 in any case.
        amp_dtype: ``"bfloat16"`` or ``"float16"``.
        progress: whether to show a bar of the steps of each sample.
    """

    def __init__(
        self,
        guidance: Guidance,
        autoencoder: AutoencoderKL,
        decoder: Inferer,
        num_inference_steps: int,
        solver: str,
        amp: bool,
        amp_dtype: str,
        progress: bool = False,
    ) -> None:
        self.generator, self.autoencoder, self.decoder = guidance.generator, autoencoder, decoder
        self.num_inference_steps, self.solver, self.guidance = num_inference_steps, solver, guidance
        self.predict, self.progress = FlowInferer(amp, amp_dtype), progress

    def __call__(  # type: ignore[override]
        self,
        inputs: torch.Tensor,
        network: Any,
        context: torch.Tensor,
        latent_size: torch.Tensor,
        noise_seed: torch.Tensor,
    ) -> torch.Tensor:
        """
        Args:
            inputs: noise, ``1xCxHxWxD``.
            network: of the generator.
            context: vector of conditions, ``1xK``.
            latent_size: size of the latent without padding, ``1x3``.
            noise_seed: of the noise that the solver adds, ``1``.

        Returns:
            the volume in the range of the autoencoder, ``1xCxHxWxD`` on the device of ``inputs``, in sizes that are
            multiples of the total factor.
        """
        latent = self.sample(inputs, network, context, latent_size, noise_seed)
        return self.decoder(latent.to(inputs.device), self.autoencoder)

    def sample(
        self,
        noise: torch.Tensor,
        network: Any,
        context: torch.Tensor,
        latent_size: torch.Tensor,
        noise_seed: torch.Tensor,
    ) -> torch.Tensor:
        """
        The latent as the autoencoder knows it, without padding. In training the padding repeats the last voxels, and the
        loss leaves it out: what is predicted of it is arbitrary, so it is filled again at each step.
        """
        device = next(network.parameters()).device
        noise, context = noise.to(device), context.to(device)
        size = latent_size[0].tolist()
        extent = torch.tensor([[n / padded for n, padded in zip(size, noise.shape[2:])]], device=device)
        flow, multiples = self.generator.flow, [self.generator.network.multiple] * len(size)

        def velocity(state: torch.Tensor, time: float) -> torch.Tensor:
            def predict(states: torch.Tensor, network: Any, context: torch.Tensor) -> torch.Tensor:
                timesteps = torch.full((len(context),), NUM_TIMESTEPS * time, device=device)
                known = {"timesteps": timesteps, "context": context, "extent": extent.expand(len(context), -1)}
                return self.predict(states, network, **known)

            clean = _without_padding(self.guidance.clean(predict, network, state, time, context), size)
            return (pad_to_multiple(clean, multiples) - state) / time

        num_values = float(noise.shape[1] * np.prod(size))
        steps = self.num_inference_steps
        times = flow.sampling_times(steps, num_values)
        with ProgressBar(total=steps, desc="sampling", unit="step", leave=False, disable=not self.progress) as bar:
            state = integrate(velocity, noise, times, self.solver, int(noise_seed), bar.update)
        return self.generator.space.restored(_without_padding(state, size))


def _without_padding(z: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    for axis, n in enumerate(size, start=2):
        z = z.narrow(axis, 0, n)
    return z


class SaveSampled(Transform):
    """
    Write a sample as NIfTI, in the units that the training volumes had, and then the JSON file that says how it was made.

    Args:
        key: of the volume, ``CxHxWxD`` in the range of the autoencoder.
        space: of the generator.
    """

    def __init__(self, key: str, space: LatentSpace) -> None:
        self.key, self.space = key, space

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        plan = json.loads(data[PLAN])
        path = Path(data["path"])
        record = _record(path.name, plan, self.space.description)
        content = nifti_bytes(restore(data[self.key], record), record, HEADER)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(content, path)
        window = {name: getattr(record, name) for name in ("intensity_low", "intensity_high")}
        known = {**plan, **window, "volume_sha256": content_hash(content)}
        write_atomically(json.dumps(known, indent=2).encode(), _description_path(path))
        logger.info(f"{path}")
        return dict(data)


def _record(source: str, plan: Mapping[str, Any], known: Mapping[str, Any]) -> Record:
    """The record of a sample: axes to the right, anterior and superior, the origin in the volume's middle."""
    size, spacing = plan["spatial_size"], plan["spacing"]
    affine = np.diag([*spacing, 1.0])
    affine[: len(size), -1] = [-(n - 1) / 2 * step for n, step in zip(size, spacing)]
    channels = len(known["intensity_low"])
    stored = {name: known[name] for name in ("data_type", "scl_slope", "scl_inter")}
    return Record(
        **vars(NiftiHeader.of_affine(affine, qform_code=1, **stored)),
        source=source,
        shape=(*size, channels) if channels > 1 else tuple(size),
        preprocessed_shape=tuple(size),
        preprocessed_affine=rows_of(affine),
        intensity_low=tuple(known["intensity_low"]),
        intensity_high=tuple(known["intensity_high"]),
    )


def _description_path(path: Path) -> Path:
    return path.with_name(path.name.removesuffix(".nii.gz") + ".json")


def _is_whole(path: Path, plan: Mapping[str, Any]) -> bool:
    """Whether a sample lies there that was made by this plan."""
    try:
        found = json.loads(_description_path(path).read_text())
        made_so = isinstance(found, dict) and all(found.get(name) == value for name, value in plan.items())
        return made_so and found.get("volume_sha256") == content_hash(path.read_bytes())
    except (OSError, ValueError):
        return False
