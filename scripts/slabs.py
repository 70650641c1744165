"""The network in slabs: each layer over the whole volume before the next, with the result of one pass.

Feature maps are kept in the host's memory, or in files where that is too small, and go through the device in slabs along one
axis. A slab includes the neighbouring rows that a convolution reads, and their results are cut off; group norms take their
statistics over the whole map. So the result is that of the whole volume up to rounding, without the seams of tiles.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import math
import tempfile
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from monai.networks.blocks import Convolution
from monai.networks.blocks import Upsample as MonaiUpsample
from monai.networks.nets.autoencoderkl import AEKLDownsample

from scripts.bundle.machine import GIB, MIB, free_memory
from scripts.bundle.progress import ProgressBar
from scripts.layers.factors import padded_size
from scripts.layers.lean_blocks import GroupNorm, ResidualBlock, RMSNorm, SpatialAttention
from scripts.layers.resampling import Downsample, SubpixelDownsample, SubpixelUpsample, Upsample, pad_at_end

CHANNEL_BLOCK = 16  # libraries reorder maps in blocks of this many channels

M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
SHARE_FOR_MAPS = 0.35  # of the budget on the CPU, or of the host's free memory; further maps go to files
# Bytes per value of a slab, for any type: the value, its normed form, the library's reordered copies (partly in float32),
# and what the allocator keeps of earlier slabs
INPUT_BYTES, RESULT_BYTES = 14, 10
# Least number of values in a convolution's slab, if the budget allows: for fewer in float32, PyTorch on the CPU uses another
# algorithm, which is four times slower and needs more memory (between 1.3 and 1.6 million, PyTorch 2.14.1)
LEAST_VALUES = 1_600_000
LAYERS = "{l_bar}{bar}| layer {n:.1f}/{total} [{elapsed}]"  # without the time left, as layers differ too much
NORMS = (GroupNorm, RMSNorm)
Slabwise = Callable[[torch.Tensor], torch.Tensor]


def stream(network: Any, x: torch.Tensor, operation: str, memory_gb: float, progress: bool = False) -> torch.Tensor:
    """
    Run ``network`` slab by slab. A slab has at least one row of the layer's coarser side, and attention reads its whole map:
    where one of these needs more than ``memory_gb``, the run does too.

    Args:
        network: a :py:class:`scripts.autoencoderkl.AutoencoderKL`, on the device where it is to run.
        x: images ``BxCxHxWxD`` (or 1D, 2D) of any size, or latents to decode; on any device.
        operation: ``"reconstruct"``, ``"encode"`` or ``"decode"``.
        memory_gb: budget, see :py:class:`scripts.inference.StreamingInferer`.
        progress: whether to show a progress bar over the layers.

    Returns:
        float32 on the host: up to rounding the result of ``network.reconstruct`` or ``network.decode``, or the mean from
        ``network.encode``. Sizes that the total factor does not divide are padded before encoding.
    """
    x = x.detach().as_subclass(torch.Tensor).cpu()
    layers = _count_layers(network, operation)
    bar = ProgressBar(total=layers, desc=f"{operation} in slabs", leave=False, bar_format=LAYERS, disable=not progress)
    with torch.no_grad(), tempfile.TemporaryDirectory(prefix="feature-maps-") as folder, bar:
        run = SlabRun(network, x, operation, int(memory_gb * GIB), Path(folder), bar)
        if operation == "decode":
            return run.decode(FeatureMap(x, run.dim)).tensor()
        sizes = x.shape
        padded = PaddedImage(x, network.total_downsample_factor, run.dim)
        del x
        z_mu = run.encode(padded)
        if operation == "encode":
            return z_mu.tensor().clone()  # its file is deleted with the folder
        del padded
        image = run.decode(z_mu).tensor()
    for dim in range(2, image.ndim):
        image = image.narrow(dim, 0, sizes[dim])
    return image


class FeatureMap:
    """
    A map that is read and written in slabs.

    Args:
        tensor: the map, or the file that holds it.
        dim: dimension along which slabs are cut.
        shape: of a map in a file.
        dtype: of a map in a file.
    """

    def __init__(
        self, tensor: torch.Tensor | Path, dim: int, shape: Sequence[int] = (), dtype: torch.dtype = torch.float32
    ) -> None:
        self._content, self.dim = tensor, dim
        self.shape = torch.Size(shape) if isinstance(tensor, Path) else tensor.shape
        self.dtype = dtype if isinstance(tensor, Path) else tensor.dtype
        self.moments: torch.Tensor | None = None  # number, sum and sum of squares of each channel's values, 3xBxC

    @property
    def rows(self) -> int:
        """Size along ``dim``."""
        return self.shape[self.dim]

    @property
    def row_values(self) -> int:
        """Values of one row, its channels rounded up to the blocks in which libraries reorder them."""
        channels = self.shape[1] if self.shape[1] == 1 else -(-self.shape[1] // CHANNEL_BLOCK) * CHANNEL_BLOCK
        return self.shape.numel() // self.rows // self.shape[1] * channels

    def tensor(self) -> torch.Tensor:
        """The whole map. Of one in a file, the parts in use count as memory of the process until the tensor is deleted."""
        if isinstance(self._content, torch.Tensor):
            return self._content
        return torch.from_file(str(self._content), shared=True, size=self.shape.numel(), dtype=self.dtype).view(self.shape)

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Rows from ``start`` up to ``stop``."""
        return self.tensor().narrow(self.dim, start, stop - start)

    def write(self, start: int, slab: torch.Tensor) -> None:
        """Replace the rows from ``start`` on."""
        self.read(start, start + slab.shape[self.dim]).copy_(slab)


class PaddedImage(FeatureMap):
    """An image that reads as if its edges were repeated until the factors divide it."""

    def __init__(self, image: torch.Tensor, factors: Sequence[int], dim: int) -> None:
        super().__init__(image, dim)
        self._given = self.shape
        self.shape = torch.Size([*image.shape[:2], *padded_size(image.shape[2:], factors)])

    def read(self, start: int, stop: int) -> torch.Tensor:
        last = self._given[self.dim]
        # at least one row, which is then repeated
        slab = self.tensor().narrow(self.dim, min(start, last - 1), max(min(stop, last) - start, 1))
        sizes = [stop - start if dim == self.dim else self.shape[dim] for dim in range(2, slab.ndim)]
        return slab if sizes == list(slab.shape[2:]) else pad_at_end(slab, sizes)


class SlabRun:
    """One pass through a network; see :py:func:`stream`."""

    def __init__(
        self, network: Any, x: torch.Tensor, operation: str, budget: int, folder: Path, bar: ProgressBar | None
    ) -> None:
        self.network, self.folder, self.bar = network, folder, bar
        self.device = next(network.parameters()).device
        factors = network.total_downsample_factor
        latent = [n if operation == "decode" else -(-n // f) for n, f in zip(x.shape[2:], factors)]
        self.axis = latent.index(max(latent))  # the longest, for thin slabs
        self.dim = self.axis + 2
        self.total = factors[self.axis]
        self.has_statistics = any(isinstance(module, GroupNorm) for module in network.modules())
        self.image_shape = [len(x), network.arguments["out_channels"], *(n * f for n, f in zip(latent, factors))]
        self._names = itertools.count()
        self._held = 0  # bytes of maps in memory
        if self.device.type == "cpu":
            _return_freed_memory()
            # slabs, maps and the result share one memory
            budget -= 4 * math.prod(self.image_shape)  # also when encoding, so that slabs are those of a reconstruction
            self.for_maps = int(SHARE_FOR_MAPS * budget)
            self.for_slabs = budget - self.for_maps
        else:
            self.for_maps = int(SHARE_FOR_MAPS * (free_memory() or 0))
            self.for_slabs = budget - sum(tensor.nbytes for tensor in network.state_dict().values())

    def encode(self, image: FeatureMap) -> FeatureMap:
        """``z_mu`` of a padded image, float32."""
        network = self.network
        x = image
        norm: Slabwise = _identity
        for block in network.encoder.blocks:
            x, norm = self._block(block, x, norm)
        mean, shortcut = network.quant_conv_mu, network.shortcut
        if shortcut is None:
            return self._stream(lambda h: mean(h).float(), [(x, 1)], halo=0)
        sources = [(x, 1), (image, self.total)]
        return self._stream(lambda h, image: shortcut.encode(image, mean(h)).float(), sources, halo=0)

    def decode(self, z: FeatureMap) -> FeatureMap:
        """The image of a latent, float32."""
        network, decoder = self.network, self.network.decoder
        image = FeatureMap(torch.empty(self.image_shape, dtype=torch.float32), self.dim)
        linear, refine = None, decoder.refine
        if network.shortcut is not None:
            linear = self._stream(network.shortcut.decode, [(z, 1)], self.total, halo=network.shortcut.halo)
        x = self._stream(network.post_quant_conv, [(z, 1)], halo=0)
        norm: Slabwise = _identity
        *blocks, last = decoder.blocks
        for i, block in enumerate(blocks):
            if i == decoder.last_level and linear is not None:
                x = self._stream(lambda x, linear: x + refine(linear), [(x, 1), (linear, refine.factors[self.axis])], into=x)
            x, norm = self._block(block, x, norm)
        _, rows_out = _rates(last, self.axis)
        sources = [(x, 1)] if linear is None else [(x, 1), (linear, rows_out)]
        return self._stream(
            lambda x, *linear: sum(linear, start=last(norm(x))), sources, rows_out, into=image, enlarged=_enlargement(last)
        )

    def _block(self, block: nn.Module, x: FeatureMap, norm: Slabwise) -> tuple[FeatureMap, Slabwise]:
        """A map after ``block``, and a norm that is not applied yet: whatever reads the map applies it."""
        if isinstance(block, NORMS):
            return x, _norm_of(block, x)
        if isinstance(block, ResidualBlock):
            return self._residual(block, x), _identity
        if isinstance(block, SpatialAttention):
            return self._stream(block, [(x, 1)], halo=x.rows), _identity  # every voxel depends on the whole map
        rows_in, rows_out = _rates(block, self.axis)
        enlarged = _enlargement(block)
        return self._stream(lambda slab: block(norm(slab)), [(x, rows_in)], rows_out, enlarged=enlarged), _identity

    def _residual(self, block: Any, x: FeatureMap) -> FeatureMap:
        first = _norm_of(block.norm1, x)
        h = self._stream(lambda x: block.conv1(F.silu(first(x), inplace=True)), [(x, 1)])
        second = _norm_of(block.norm2, h)
        return self._stream(
            lambda h, x: block.conv2(F.silu(second(h), inplace=True)) + block.nin_shortcut(x),
            [(h, 1), (x, 1)],
            into=x if block.in_channels == block.out_channels else None,
        )

    def _stream(
        self,
        operation: Callable[..., torch.Tensor],
        sources: Sequence[tuple[FeatureMap, int]],
        rows_out: int = 1,
        *,
        halo: int = 1,
        into: FeatureMap | None = None,
        enlarged: int = 0,
    ) -> FeatureMap:
        """
        Run ``operation`` over maps in slabs.

        Args:
            operation: takes a slab of each map and returns one of the result.
            sources: maps, each with its number of rows per unit. All maps have the same number of units.
            rows_out: rows of the result per unit.
            halo: number of units on each side of a slab that its result depends on.
            into: where to write. It may be a source that ``operation`` reads voxel by voxel, without the halo.
            enlarged: values of an enlarged map that ``operation`` computes, for each value of the first source's slab.
        """
        units = sources[0][0].rows // sources[0][1]
        unit_bytes = INPUT_BYTES * sum(source.row_values * rows for source, rows in sources)
        unit_bytes += enlarged * INPUT_BYTES * sources[0][0].row_values * sources[0][1]
        least = 1
        if halo > 0 and self.device.type == "cpu" and not torch.is_autocast_enabled("cpu"):
            values = sources[0][0].shape.numel() // units
            least = max(1, min(-(-LEAST_VALUES // values), self.for_slabs // unit_bytes))
        result = into
        moments: torch.Tensor | None = None
        start, thickness = 0, max(1, least - 2 * halo)  # the first slab shows shape and type of the result
        while start < units:
            stop = units if halo >= units else min(start + thickness, units)
            last = min(max(stop + halo, least), units)
            first = max(min(start - halo, last - least), 0)
            slab = operation(*(x.read(first * rows, last * rows).to(self.device) for x, rows in sources))
            slab = slab.narrow(self.dim, (start - first) * rows_out, (stop - start) * rows_out)
            if result is None:
                result = self._new_map([*slab.shape[: self.dim], units * rows_out, *slab.shape[self.dim + 1 :]], slab.dtype)
            result.write(start * rows_out, slab)
            if self.has_statistics:
                found = self._moments(slab)
                moments = found if moments is None else moments + found
            if start == 0:
                unit_bytes += RESULT_BYTES * rows_out * result.row_values
                thickness = max(thickness, self.for_slabs // unit_bytes - 2 * halo)
            if self.bar is not None:
                self.bar.update((stop - start) / units)
            start = self._next_start(start, stop, thickness, units)
            del slab  # before the next one is computed
        assert result is not None  # a map has at least one row
        result.moments = moments
        return result

    def _moments(self, slab: torch.Tensor) -> torch.Tensor:
        """
        Number of voxels, sum and sum of squares for each channel, ``3xBxC`` in float64. The variance in the slab is computed
        around the channel's mean: in float32, small deviations would be lost beside large squares.
        """
        found = []
        for channel in slab.flatten(0, 1):
            values = channel.float()
            mean = values.mean()
            variance = (values - mean).square_().mean()
            found.append(torch.stack([mean, variance]))
        mean, variance = torch.stack(found, dim=1).double().cpu().view(2, *slab.shape[:2])
        count = slab[0, 0].numel()
        return count * torch.stack([torch.ones_like(mean), mean, variance + mean.square()])

    def _next_start(self, start: int, stop: int, thickness: int, units: int) -> int:
        """Where the slab after the one from ``start`` up to ``stop`` starts; the planner leaves out those that are alike."""
        return stop

    def _new_map(self, shape: Sequence[int], dtype: torch.dtype) -> FeatureMap:
        nbytes = math.prod(shape) * dtype.itemsize
        if self._held + nbytes <= self.for_maps:
            self._held += nbytes
            made = FeatureMap(torch.empty(shape, dtype=dtype), self.dim)
            weakref.finalize(made, self._release, nbytes)
            return made
        path = self.folder / str(next(self._names))
        made = FeatureMap(path, self.dim, shape, dtype)
        weakref.finalize(made, path.unlink, missing_ok=True)
        return made

    def _release(self, nbytes: int) -> None:
        self._held -= nbytes


def _count_layers(network: Any, operation: str) -> int:
    """The number of layers that an operation of a network streams."""
    blocks: list[nn.Module] = []
    layers = 0
    if operation != "decode":
        blocks += network.encoder.blocks
        layers += 1  # z_mu
    if operation != "encode":
        blocks += network.decoder.blocks
        layers += 1 + 2 * (network.shortcut is not None)  # post_quant_conv; the linear image, and the layer that reads it
    convolutions = (2 if isinstance(block, ResidualBlock) else 1 for block in blocks if not isinstance(block, NORMS))
    return layers + sum(convolutions)


def _return_freed_memory() -> None:
    """Make glibc return freed blocks of more than a MiB at once; by default it keeps those of up to 32 MiB."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MIB)


def _identity(x: torch.Tensor) -> torch.Tensor:
    return x


def _norm_of(norm: GroupNorm | RMSNorm, x: FeatureMap) -> Slabwise:
    """``norm`` with the statistics of the whole map ``x``, where it has any, to be applied to slabs of it."""
    if isinstance(norm, RMSNorm):
        return norm
    assert x.moments is not None
    by_group = x.moments.unflatten(2, (norm.num_groups, -1)).sum(3)
    mean = by_group[1] / by_group[0]
    variance = (by_group[2] / by_group[0] - mean.square()).clamp(min=0)
    size, channels = x.shape[:2]
    per_group = channels // norm.num_groups
    weight, bias = norm.weight.repeat(size), norm.bias.repeat(size)
    mean, variance = (s.repeat_interleave(per_group, dim=1).flatten().to(norm.weight) for s in (mean, variance))

    def normalise(slab: torch.Tensor) -> torch.Tensor:
        # with given statistics, batch norm is an affine map of each channel, in the slab's own type
        merged = slab.reshape(1, -1, *slab.shape[2:])
        return F.batch_norm(merged, mean, variance, weight, bias, eps=norm.eps).view(slab.shape)

    return normalise


def _enlargement(block: Any) -> int:
    """Values of the enlarged map that a layer computes for each value of its input; 0 for a layer that computes none."""
    return math.prod(block.factors) if isinstance(block, Upsample) and block.interpolation else 0


def _rates(block: Any, axis: int) -> tuple[int, int]:
    """Rows along ``axis`` of a layer's input and of its result, for one unit. No layer reads further than the next unit."""
    if isinstance(block, Downsample):
        stride: Any = block.conv.conv.stride
        return stride[axis], 1
    if isinstance(block, AEKLDownsample):
        return 2, 1
    if isinstance(block, SubpixelDownsample):
        return block.factors[axis], 1
    if isinstance(block, (Upsample, SubpixelUpsample)):
        return 1, block.factors[axis]
    if isinstance(block, MonaiUpsample):
        return 1, 2
    if isinstance(block, Convolution):
        return 1, 1
    raise TypeError(f"there is no rule to run a {type(block).__name__} in slabs; add one to {__name__}.")
