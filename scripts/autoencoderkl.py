"""The factor-aware AutoencoderKL: MONAI's network with a downsample factor that is set per level, per axis and at the input.

Everything that does not concern factors is inherited from :py:class:`monai.networks.nets.AutoencoderKL`. With the default
arguments the classes here are MONAI's: same state-dict keys, same initial weights for the same seed, same outputs.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from monai.networks.blocks import Convolution
from monai.networks.blocks import Upsample as MonaiUpsample
from monai.networks.nets import autoencoderkl as monai_autoencoderkl
from torch.utils.checkpoint import checkpoint

from scripts.layers.factors import per_axis, per_transition
from scripts.layers.float32_convolutions import keep_in_float32
from scripts.layers.lean_blocks import use_lean_blocks
from scripts.layers.linear_shortcut import LinearShortcut, start_as_correction
from scripts.layers.resampling import Downsample, SubpixelDownsample, SubpixelUpsample, Upsample, check_upsample_mode

INITIAL_MODES = ("conv", "pixelshuffle")


def _check_initial_mode(initial_mode: str) -> None:
    if initial_mode not in INITIAL_MODES:
        raise ValueError(f"`initial_mode` is {initial_mode!r}; it must be one of {', '.join(INITIAL_MODES)}.")


def _arguments_of(part: type, arguments: dict[str, Any]) -> dict[str, Any]:
    """Those of ``arguments`` that the constructor of ``part`` takes under the same name."""
    names = inspect.signature(part).parameters
    return {name: value for name, value in arguments.items() if name in names}


def _run(blocks: nn.ModuleList, recompute: bool, x: torch.Tensor) -> torch.Tensor:
    """Run blocks one after the other. With ``recompute`` only their input is kept; the backward pass runs them again."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(_run, blocks, False, x, use_reentrant=False)
    for block in blocks:
        x = block(x)
    return x


def _cast_once(image: torch.Tensor) -> torch.Tensor:
    """Cast an image to the autocast type once; autocast would cast every full-resolution tensor computed from it."""
    device_type = image.device.type
    return image.to(torch.get_autocast_dtype(device_type)) if torch.is_autocast_enabled(device_type) else image


class Encoder(monai_autoencoderkl.Encoder):
    """
    MONAI's AutoencoderKL ``Encoder`` with a factor for each transition and for the first convolution.

    Args:
        spatial_dims: number of spatial dimensions, 1 to 3.
        in_channels: number of image channels.
        channels: feature channels of each level.
        args: the remaining arguments of MONAI's ``Encoder``, in its order.
        downsample_factors: ``len(channels) - 1`` factors, each an integer or one integer per axis; None is 2 everywhere.
        initial_downsample_factor: shrink of the first convolution, an integer or one per axis.
        initial_mode: ``"conv"`` for a strided first convolution, ``"pixelshuffle"`` for space-to-depth and a
            convolution on the small grid.
        norm: ``"group"`` or ``"rms"``, see :py:class:`AutoencoderKL`.
        kwargs: the remaining arguments of MONAI's ``Encoder``, by name.

    Raises:
        ValueError: for a factor that is not a positive integer, a wrong number of factors, or another ``norm``.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        channels: Sequence[int],
        *args: Any,
        downsample_factors: Sequence[int | Sequence[int]] | None = None,
        initial_downsample_factor: int | Sequence[int] = 1,
        initial_mode: str = "conv",
        norm: str = "group",
        **kwargs: Any,
    ) -> None:
        _check_initial_mode(initial_mode)
        factors = per_transition("downsample_factors", downsample_factors, channels, spatial_dims)
        initial = per_axis("initial_downsample_factor", initial_downsample_factor, spatial_dims)
        super().__init__(spatial_dims, in_channels, channels, *args, **kwargs)
        self.downsample_factors, self.initial_downsample_factor = tuple(factors), initial
        use_lean_blocks(self.blocks, norm)
        places = [i for i, b in enumerate(self.blocks) if isinstance(b, monai_autoencoderkl.AEKLDownsample)]
        self.level_starts = [0, *(place + 1 for place in places)]
        self.checkpoint_levels = [False] * len(channels)
        for place, factor, width in zip(places, factors, channels):
            if any(f != 2 for f in factor):
                self.blocks[place] = Downsample(spatial_dims, width, stride=factor)
        if any(f > 1 for f in initial):
            first = Downsample if initial_mode == "conv" else SubpixelDownsample
            self.blocks[0] = first(spatial_dims, in_channels, channels[0], initial)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x: image, ``BxCxHxWxD`` (2D: ``BxCxHxW``).

        Returns:
            features of ``out_channels`` channels on the latent's grid.
        """
        if torch.jit.is_scripting():
            for block in self.blocks:
                x = block(x)
            return x
        return self._by_levels(x)

    @torch.jit.unused
    def _by_levels(self, x: torch.Tensor) -> torch.Tensor:
        ends = [*self.level_starts[1:], len(self.blocks)]
        for start, end, recompute in zip(self.level_starts, ends, self.checkpoint_levels):
            x = _run(self.blocks[start:end], recompute, x)
        return x


class Decoder(monai_autoencoderkl.Decoder):
    """
    MONAI's AutoencoderKL ``Decoder`` with a factor for each transition and for the last convolution.

    Args:
        spatial_dims: number of spatial dimensions, 1 to 3.
        channels: feature channels of each level, in the encoder's order.
        in_channels: number of latent channels.
        out_channels: number of image channels.
        args: the remaining arguments of MONAI's ``Decoder``, in its order.
        upsample_factors: ``len(channels) - 1`` factors in the encoder's order, used in reverse; None is 2 everywhere.
        initial_upsample_factor: enlargement after the last level, an integer or one per axis.
        initial_mode: ``"conv"`` for nearest-neighbour enlargement and a convolution, ``"pixelshuffle"`` for a
            convolution on the small grid and depth-to-space.
        upsample_mode: ``"nearest"`` or ``"trilinear"``: of every enlargement that is followed by a convolution.
        refines_image: take a first image beside the latent. By space-to-depth and a convolution it is added to the features
            at the start of the last level, so that the decoder's correction of it can depend on it.
        norm: ``"group"`` or ``"rms"``, see :py:class:`AutoencoderKL`.
        kwargs: the remaining arguments of MONAI's ``Decoder``, by name.

    Raises:
        ValueError: for a factor that is not a positive integer, a wrong number of factors, another ``upsample_mode`` or
            another ``norm``.
    """

    def __init__(
        self,
        spatial_dims: int,
        channels: Sequence[int],
        in_channels: int,
        out_channels: int,
        *args: Any,
        upsample_factors: Sequence[int | Sequence[int]] | None = None,
        initial_upsample_factor: int | Sequence[int] = 1,
        initial_mode: str = "conv",
        upsample_mode: str = "nearest",
        refines_image: bool = False,
        norm: str = "group",
        **kwargs: Any,
    ) -> None:
        _check_initial_mode(initial_mode)
        factors = per_transition("upsample_factors", upsample_factors, channels, spatial_dims)
        initial = per_axis("initial_upsample_factor", initial_upsample_factor, spatial_dims)
        super().__init__(spatial_dims, channels, in_channels, out_channels, *args, **kwargs)
        check_upsample_mode(upsample_mode, any(hasattr(block, "deconv") for block in self.blocks))
        use_lean_blocks(self.blocks, norm)
        places = [i for i, b in enumerate(self.blocks) if isinstance(b, MonaiUpsample)]
        self.last_level = places[-1] + 1 if places else 1
        self.level_starts = [0, *places]
        self.checkpoint_levels = [False] * len(channels)  # in the encoder's order
        self.refine: SubpixelDownsample | None = None
        if refines_image:
            width = channels[1] if len(channels) > 1 else channels[0]
            self.refine = SubpixelDownsample(spatial_dims, out_channels, width, initial)
        twice = all(f == 2 for factor in factors for f in factor)
        if twice and all(f == 1 for f in initial) and upsample_mode == "nearest":
            return  # MONAI's decoder, bit for bit
        for place, factor, width in zip(places, reversed(factors), reversed(channels)):
            use_convtranspose = hasattr(self.blocks[place], "deconv")
            self.blocks[place] = Upsample(
                spatial_dims, width, scale_factor=factor, use_convtranspose=use_convtranspose, mode=upsample_mode
            )
        if all(f == 1 for f in initial):
            return
        if initial_mode == "pixelshuffle":
            self.blocks[-1] = SubpixelUpsample(spatial_dims, channels[0], out_channels, initial)
        else:
            # a kernel that gives each of the f copies of a voxel its own neighbourhood: at f = 2 it is 3
            kernel_size = [max(3, f // 2 * 2 + 1) for f in initial]
            self.blocks[-1] = Upsample(
                spatial_dims, channels[0], out_channels, initial, kernel_size=kernel_size, mode=upsample_mode
            )

    def forward(self, x: torch.Tensor, image: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            x: latent, ``BxCxHxWxD`` (2D: ``BxCxHxW``).
            image: the first image, of the result's shape, for a decoder that refines one.

        Returns:
            image of ``out_channels`` channels.
        """
        return self._from(0, x, image) if torch.jit.is_scripting() else self._by_levels(x, image)

    @torch.jit.unused
    def _by_levels(self, x: torch.Tensor, image: torch.Tensor | None) -> torch.Tensor:
        *flags, last_flag = reversed(self.checkpoint_levels)
        *starts, last_start = self.level_starts
        for start, end, recompute in zip(starts, self.level_starts[1:], flags):
            x = _run(self.blocks[start:end], recompute, x)
        if last_flag and torch.is_grad_enabled():
            return checkpoint(self._from, last_start, x, image, use_reentrant=False)
        return self._from(last_start, x, image)

    def _from(self, first: int, x: torch.Tensor, image: torch.Tensor | None) -> torch.Tensor:
        """Run the blocks from ``first`` on, in one loop, so that no caller holds a map while later blocks run."""
        for i, block in enumerate(self.blocks):
            if i >= first:
                if i == self.last_level and image is not None and self.refine is not None:
                    x = x.add_(self.refine(image))
                x = block(x)
        return x


class AutoencoderKL(monai_autoencoderkl.AutoencoderKL):
    """
    MONAI's ``AutoencoderKL`` (Rombach et al., https://arxiv.org/abs/2112.10752; Pinaya et al.,
    https://arxiv.org/abs/2209.07162) in which every step between levels, and the first convolution, shrinks the volume by
    a factor that you choose.

    Args:
        spatial_dims: number of spatial dimensions, 1 to 3.
        in_channels: number of image channels.
        out_channels: number of channels of the reconstruction.
        num_res_blocks: residual blocks per level, one number or one per level.
        channels: feature channels of each level, divisible by ``norm_num_groups``.
        attention_levels: for each level, whether it has attention blocks.
        latent_channels: number of latent channels.
        norm_num_groups: groups of the group normalisation.
        norm_eps: epsilon of the normalisation.
        with_encoder_nonlocal_attn: attention block at the end of the encoder. It needs memory that grows with the
            square of the latent's number of voxels, unless ``use_flash_attention`` is set.
        with_decoder_nonlocal_attn: attention block at the start of the decoder, ditto.
        use_checkpoint: recompute activations in the backward pass instead of keeping them; one answer for all levels of
            encoder and decoder, or one per level.
        use_convtranspose: transposed convolutions (kernel = stride = factor) between the decoder's levels.
        include_fc: final linear layer in attention blocks.
        use_combined_linear: one linear layer for query, key and value.
        use_flash_attention: PyTorch's memory-efficient attention.
        downsample_factors: the shrink between two levels, ``len(channels) - 1`` of them, each an integer or one integer
            per spatial axis; None is 2 everywhere.
        initial_downsample_factor: the shrink of the first convolution, undone after the decoder's last level; an
            integer or one per axis.
        initial_mode: ``"conv"``: a strided convolution in, nearest-neighbour enlargement and a convolution out;
            ``"pixelshuffle"``: space-to-depth and a convolution in, a convolution and depth-to-space out, so that no
            feature map has full resolution.
        linear_shortcut: add a linear code beside the network, see :py:class:`scripts.layers.LinearShortcut`. The decoder
            receives its image and adds what that lacks.
        upsample_mode: how the decoder enlarges, before the convolution: ``"nearest"``, as MONAI's network does, or
            ``"trilinear"``, as :py:class:`monai.apps.generation.maisi.networks.autoencoderkl_maisi.AutoencoderKlMaisi` does.
        norm: ``"group"``, MONAI's group normalisation, whose statistics are those of the whole volume or patch; or
            ``"rms"``, which divides the channels of each voxel by their root mean square, as the Deep Compression
            Autoencoder does (:py:func:`scripts.layers.lean_blocks.rms_norm`), so that a network which was trained on
            patches computes the same on whole volumes.

    Raises:
        ValueError: for an argument that does not fit, with its name, its value and what it needs.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int = 1,
        out_channels: int = 1,
        num_res_blocks: Sequence[int] | int = (2, 2, 2, 2),
        channels: Sequence[int] = (32, 64, 64, 64),
        attention_levels: Sequence[bool] = (False, False, True, True),
        latent_channels: int = 3,
        norm_num_groups: int = 32,
        norm_eps: float = 1e-6,
        with_encoder_nonlocal_attn: bool = True,
        with_decoder_nonlocal_attn: bool = True,
        use_checkpoint: Sequence[bool] | bool = False,
        use_convtranspose: bool = False,
        include_fc: bool = True,
        use_combined_linear: bool = False,
        use_flash_attention: bool = False,
        downsample_factors: Sequence[int | Sequence[int]] | None = None,
        initial_downsample_factor: int | Sequence[int] = 1,
        initial_mode: str = "conv",
        linear_shortcut: bool = False,
        upsample_mode: str = "nearest",
        norm: str = "group",
    ) -> None:
        arguments = dict(locals())  # before there are other local names
        del arguments["self"]
        nn.Module.__init__(self)  # MONAI's constructor would build its own encoder and decoder first
        if spatial_dims not in (1, 2, 3):
            raise ValueError(f"`spatial_dims` is {spatial_dims!r}; it must be 1, 2 or 3.")
        levels = len(channels)
        num_res_blocks = [num_res_blocks] * levels if isinstance(num_res_blocks, int) else list(num_res_blocks)
        use_checkpoint = [use_checkpoint] * levels if isinstance(use_checkpoint, bool) else list(use_checkpoint)
        if levels == 0:
            raise ValueError("`channels` is empty; it needs at least one level.")
        if any(width % norm_num_groups != 0 for width in channels):
            raise ValueError(
                f"`channels` is {list(channels)!r}; `norm_num_groups`, {norm_num_groups}, must divide all of them."
            )
        per_level = {
            "attention_levels": attention_levels,
            "num_res_blocks": num_res_blocks,
            "use_checkpoint": use_checkpoint,
        }
        for name, values in per_level.items():
            if len(values) != levels:
                raise ValueError(
                    f"`{name}` is {list(values)!r}; it needs one value per level of `channels` {list(channels)!r}."
                )
        if linear_shortcut and in_channels != out_channels:
            raise ValueError(
                f"`linear_shortcut` needs as many `out_channels` as `in_channels`, not {out_channels} and {in_channels}."
            )
        arguments["num_res_blocks"] = num_res_blocks
        arguments["channels"] = list(channels)
        arguments["attention_levels"] = [bool(level) for level in attention_levels]

        of_encoder = {"out_channels": latent_channels, "with_nonlocal_attn": with_encoder_nonlocal_attn}
        encoder = Encoder(
            **_arguments_of(monai_autoencoderkl.Encoder, {**arguments, **of_encoder}),
            downsample_factors=downsample_factors,
            initial_downsample_factor=initial_downsample_factor,
            initial_mode=initial_mode,
            norm=norm,
        )
        self.downsample_factors = encoder.downsample_factors
        self.initial_downsample_factor = encoder.initial_downsample_factor
        self.total_downsample_factor = tuple(
            math.prod(f) for f in zip(self.initial_downsample_factor, *self.downsample_factors)
        )
        of_decoder = {"in_channels": latent_channels, "with_nonlocal_attn": with_decoder_nonlocal_attn}
        decoder = Decoder(
            **_arguments_of(monai_autoencoderkl.Decoder, {**arguments, **of_decoder}),
            upsample_factors=self.downsample_factors,
            initial_upsample_factor=self.initial_downsample_factor,
            initial_mode=initial_mode,
            upsample_mode=upsample_mode,
            refines_image=linear_shortcut,
            norm=norm,
        )
        self.encoder: nn.Module = encoder
        self.decoder: nn.Module = decoder
        arguments["downsample_factors"] = [list(f) for f in self.downsample_factors]
        arguments["initial_downsample_factor"] = list(self.initial_downsample_factor)
        del arguments["use_checkpoint"], arguments["use_flash_attention"]  # they do not change what weights compute
        for name, value in {"upsample_mode": "nearest", "norm": "group"}.items():
            if arguments[name] == value:
                del arguments[name]  # so that files written before there was a choice still describe this network
        self.arguments = arguments
        self.latent_channels = latent_channels
        self.use_checkpoint = any(use_checkpoint)
        self.encoder.checkpoint_levels = self.decoder.checkpoint_levels = use_checkpoint
        self.quant_conv_mu = self._latent_conv(spatial_dims, latent_channels)
        self.quant_conv_log_sigma = self._latent_conv(spatial_dims, latent_channels)
        self.post_quant_conv = self._latent_conv(spatial_dims, latent_channels)
        self.shortcut: LinearShortcut | None = None
        if linear_shortcut:
            self.shortcut = LinearShortcut(in_channels, latent_channels, self.total_downsample_factor)
            start_as_correction(self)
        keep_in_float32(self)  # some of its convolutions, under the CPU's autocast

    @staticmethod
    def _latent_conv(spatial_dims: int, latent_channels: int) -> Convolution:
        return Convolution(spatial_dims, latent_channels, latent_channels, kernel_size=1, padding=0, conv_only=True)

    def latent_shape(self, spatial_shape: Sequence[int]) -> tuple[int, ...]:
        """
        Shape of the latent of one volume.

        Args:
            spatial_shape: spatial size of the volume in voxels, divisible by ``total_downsample_factor``.

        Returns:
            ``(latent_channels, *spatial)``.

        Raises:
            ValueError: when the number of axes is wrong, or a size is not divisible.
        """
        self._check_divisible(spatial_shape)
        return (self.latent_channels, *(n // f for n, f in zip(spatial_shape, self.total_downsample_factor)))

    def _check_divisible(self, spatial_shape: Sequence[int]) -> None:
        factors = self.total_downsample_factor
        if len(spatial_shape) != len(factors):
            raise ValueError(
                f"the spatial shape {tuple(spatial_shape)} has {len(spatial_shape)} axes; the network has {len(factors)}."
            )
        for axis, (size, factor) in enumerate(zip(spatial_shape, factors)):
            if size % factor != 0 or size == 0:
                below = max(1, size // factor) * factor
                raise ValueError(
                    f"the size of spatial axis {axis} is {size}, which the total downsample factor {factor} does not "
                    f"divide; {below} and {below + factor} work. Whole volumes of any size can be reconstructed."
                )

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Encode an image into the mean and standard deviation of its latent.

        Args:
            x: image of shape ``BxCxHxWxD`` (2D: ``BxCxHxW``), sizes divisible by ``total_downsample_factor``.

        Returns:
            ``z_mu`` and ``z_sigma``, each ``B`` times ``latent_shape``.

        Raises:
            ValueError: when a spatial size is not divisible by the total factor.
        """
        self._check_divisible(x.shape[2:])
        x = _cast_once(x)
        h = self.encoder(x)
        z_mu = self.quant_conv_mu(h)
        z_log_var = torch.clamp(self.quant_conv_log_sigma(h), -30.0, 20.0)
        if self.shortcut is not None:
            z_mu = self.shortcut.encode(x, z_mu)
        return z_mu, torch.exp(z_log_var / 2)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """
        Decode a latent.

        Args:
            z: latent, ``B`` times ``latent_shape``.

        Returns:
            image of shape ``BxCxHxWxD`` (2D: ``BxCxHxW``).
        """
        if self.shortcut is None:
            return self.decoder(self.post_quant_conv(z))
        linear = self.shortcut.decode(z)
        image = self.decoder(self.post_quant_conv(z), linear)
        return image + linear if torch.is_grad_enabled() else image.add_(linear)

    def reconstruct(self, x: torch.Tensor) -> torch.Tensor:
        """
        Encode an image of any size, take the mean, decode. Sizes that the total factor does not divide are padded by
        repeating the last voxel, and cropped back.

        Args:
            x: image of shape ``BxCxHxWxD`` (2D: ``BxCxHxW``).

        Returns:
            reconstruction of the same shape.
        """
        if not torch.jit.is_scripting():  # noqa: SIM102  TorchScript leaves out what follows, in this form alone
            if self._is_divisible(x):
                return self._decoded_mean(x)
        # For TorchScript and torch.export: slices of an unknown length would fix the size
        padding: list[int] = []
        for axis, factor in enumerate(self.total_downsample_factor):
            size = x.shape[axis + 2]
            padding = [0, (size + factor - 1) // factor * factor - size] + padding  # the last axis comes first
        image = self._decoded_mean(F.pad(x, padding, mode="replicate"))
        for axis in range(x.dim() - 2):
            image = image.index_select(axis + 2, torch.arange(x.shape[axis + 2], device=x.device))
        return image

    @torch.jit.unused
    def _is_divisible(self, x: torch.Tensor) -> bool:
        """Whether it is known that no padding is needed. Exported for all sizes, the network computes it at each call."""
        any_size = torch.jit.is_tracing() or torch.compiler.is_compiling()
        return not any_size and all(n % f == 0 for n, f in zip(x.shape[2:], self.total_downsample_factor))

    def _decoded_mean(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            x = _cast_once(x)
        z_mu = self.quant_conv_mu(self.encoder(x))
        if self.shortcut is not None:
            z_mu = self.shortcut.encode(x, z_mu)
        return self.decode(z_mu)


class Reconstructor(AutoencoderKL):
    """
    :py:class:`AutoencoderKL` with the same weights whose ``forward`` returns the reconstruction alone, so that bundle
    tools (``verify_net_in_out``, ``ckpt_export``, ``onnx_export``) work on it as it is.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """
        Args:
            x: image of shape ``BxCxHxWxD`` (2D: ``BxCxHxW``) and any spatial size.

        Returns:
            reconstruction of the same shape.
        """
        return self.reconstruct(x)
