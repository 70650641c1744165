"""The inferers that reconstruct whole volumes and that make samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from monai.inferers import Inferer

from scripts.bundle.precision import autocast_dtype
from scripts.bundle.progress import ProgressBar
from scripts.data.spatial_conditions import SpatialKind
from scripts.diffusion.sampler import Sampler
from scripts.layers.resampling import pad_to_multiple

__all__ = ["ReconstructionInferer", "SampleInferer", "SpatialEncoder"]


class ReconstructionInferer(Inferer):
    """
    Reconstruct whole volumes of any size, with mixed precision on any device (MONAI's evaluators cast for CUDA only).

    Args:
        amp: whether to use mixed precision.
        amp_dtype: ``"bfloat16"`` or ``"float16"``.
    """

    def __init__(self, amp: bool, amp_dtype: str) -> None:
        self.amp = amp
        self.dtype = autocast_dtype(amp_dtype)

    def __call__(self, inputs: torch.Tensor, network: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """
        Args:
            inputs: images, ``BxCxHxWxD``.
            network: a :py:class:`scripts.autoencoderkl.AutoencoderKL`.

        Returns:
            float32 reconstructions of the same shape.
        """
        with torch.autocast(inputs.device.type, self.dtype, enabled=self.amp):
            return network.reconstruct(inputs).float()


class SampleInferer(Inferer):
    """
    From noise to a volume: along the flow to a latent, and through the autoencoder's decoder.

    Args:
        sampler: sampler that makes the latents.
        autoencoder: :py:class:`scripts.autoencoderkl.AutoencoderKL` that decodes them, on its device.
        decoder: inferer that calls it, such as :py:class:`scripts.inference.StreamingInferer`.
        progress: whether to show a bar of the steps of each sample.
        encoder: encoder of the spatial conditions; None where samples have none.
    """

    def __init__(
        self,
        sampler: Sampler,
        autoencoder: torch.nn.Module,
        decoder: Inferer,
        progress: bool = False,
        encoder: SpatialEncoder | None = None,
    ) -> None:
        self.sampler, self.autoencoder, self.decoder, self.progress = sampler, autoencoder, decoder, progress
        self.encoder = encoder

    def __call__(  # type: ignore[override]
        self,
        inputs: torch.Tensor,
        network: Any,
        context: torch.Tensor,
        latent_size: torch.Tensor,
        noise_seed: torch.Tensor,
        spatial: Mapping[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """
        Args:
            inputs: noise, ``1xCxHxWxD``.
            network: network of the generator, which the sampler has.
            context: vector of conditions, ``1xK``.
            latent_size: size of the latent without padding, ``1x3``.
            noise_seed: seed of the noise that the solver adds, ``1``.
            spatial: spatial conditions that are given, volumes ``1xCxHxWxD``.

        Returns:
            the volume in the range of the autoencoder, ``1xCxHxWxD`` on the device of ``inputs``, in sizes that are
            multiples of the total factor.
        """
        noise, steps = inputs.as_subclass(torch.Tensor), self.sampler.num_inference_steps
        latents = self.encoder.encode_planes(spatial, self.autoencoder) if spatial and self.encoder is not None else {}
        with ProgressBar(total=steps, desc="sampling", unit="step", leave=False, disable=not self.progress) as bar:
            latent = self.sampler(noise, context, latent_size[0].tolist(), int(noise_seed), bar.update, latents)
        return self.decoder(latent.to(noise.device), self.autoencoder)


class SpatialEncoder(Inferer):
    """
    Encode volumes and their spatial conditions by the same network, a plane at a time.

    Args:
        encoder: inferer that encodes volumes, such as :py:class:`scripts.inference.StreamingInferer`.
        kinds: of the conditions.
    """

    def __init__(self, encoder: Inferer, kinds: Mapping[str, SpatialKind]) -> None:
        self.encoder, self.kinds = encoder, kinds

    def __call__(  # type: ignore[override]
        self, inputs: torch.Tensor, network: Any, spatial: Mapping[str, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """
        Args:
            inputs: images, ``BxCxHxWxD``.
            network: :py:class:`scripts.autoencoderkl.AutoencoderKL`.
            spatial: conditions by name, see :py:meth:`encode_planes`; None without.

        Returns:
            their latents, and after them, as further channels, those of the conditions in the order of ``spatial``.
        """
        return torch.cat([self.encoder(inputs, network), *self.encode_planes(spatial or {}, network).values()], 1)

    def encode_planes(self, spatial: Mapping[str, torch.Tensor], network: Any) -> dict[str, torch.Tensor]:
        """
        Encode spatial conditions, with or without a volume that they belong to.

        Args:
            spatial: label maps ``Bx1xHxWxD`` and images in [0, 1], ``BxCxHxWxD`` or ``Bx1xHxWxD`` for all channels, by name.
            network: :py:class:`scripts.autoencoderkl.AutoencoderKL`.

        Returns:
            latents of the planes one after the other, ``B x planes * latent channels x h x w x d``, by name.

        Raises:
            ValueError: for labels that are not among the classes.
        """
        channels = network.arguments["in_channels"]
        latents = {}
        for key, volume in spatial.items():
            kind = self.kinds[key]
            encode = self._linear if kind.is_label_map and network.shortcut is not None else self.encoder
            planes = kind.planes(volume.as_subclass(torch.Tensor), key)
            latents[key] = torch.cat([encode(plane.expand(-1, channels, -1, -1, -1), network) for plane in planes], 1)
        return latents

    def _linear(self, plane: torch.Tensor, network: Any) -> torch.Tensor:
        """The linear code of a plane, which is quick: an image has nearly a weighted sum of the latents of its classes."""
        padded = pad_to_multiple(plane, network.total_downsample_factor)
        return network.shortcut.encode(padded.to(next(network.parameters()).device)).to(plane.device)
