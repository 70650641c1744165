"""The inferers around a generator: samples, from noise to a volume, and the encoding of spatial conditions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from monai.inferers import Inferer
from torch import Tensor

from scripts.data.spatial_kinds import SpatialKind
from scripts.diffusion.sampler import Sampler
from scripts.layers.resampling import pad_to_multiple


class SampleInferer(Inferer):
    """
    From noise to a volume: along the flow to a latent, and through the autoencoder's decoder.

    Args:
        sampler: sampler that makes the latents.
        autoencoder: :py:class:`scripts.autoencoderkl.AutoencoderKL` that decodes them, on its device.
        decoder: inferer that calls it, such as :py:class:`scripts.inference.StreamingInferer`.
        encoder: encoder of the spatial conditions; None where samples have none.
    """

    def __init__(
        self, sampler: Sampler, autoencoder: torch.nn.Module, decoder: Inferer, encoder: SpatialEncoder | None = None
    ) -> None:
        self.sampler, self.autoencoder, self.decoder, self.encoder = sampler, autoencoder, decoder, encoder

    def __call__(  # type: ignore[override]
        self,
        inputs: Tensor,
        network: Any,
        context: Tensor,
        latent_size: Tensor,
        noise_seed: Tensor,
        spatial: Mapping[str, Tensor],
    ) -> Tensor:
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
        latents = {} if self.encoder is None else self.encoder.encode_planes(spatial, self.autoencoder)
        latent = self.sampler(inputs.as_subclass(Tensor), context, latent_size[0].tolist(), int(noise_seed), latents)
        return self.decoder(latent.to(inputs.device), self.autoencoder)


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
        self, inputs: Tensor, network: Any, spatial: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """The latents of images, ``BxCxHxWxD``, and as further channels those of the conditions, in their order."""
        return torch.cat([self.encoder(inputs, network), *self.encode_planes(spatial or {}, network).values()], 1)

    def encode_planes(self, spatial: Mapping[str, Tensor], network: Any) -> dict[str, Tensor]:
        """
        Encode spatial conditions without a volume that they belong to.

        Args:
            spatial: label maps ``Bx1xHxWxD`` and images in [0, 1], ``BxCxHxWxD`` or ``Bx1xHxWxD`` for all channels, by name.
            network: :py:class:`scripts.autoencoderkl.AutoencoderKL`.

        Returns:
            latents of the planes one after the other, ``B x planes * latent channels x h x w x d``, by name.

        Raises:
            ValueError: for labels that are not among the classes.
        """
        channels, latents = network.arguments["in_channels"], {}
        for key, volume in spatial.items():
            kind = self.kinds[key]
            encode = _encode_linearly if kind.is_label_map and network.shortcut is not None else self.encoder
            planes = kind.planes(volume.as_subclass(Tensor), key)
            latents[key] = torch.cat([encode(plane.expand(-1, channels, -1, -1, -1), network) for plane in planes], 1)
        return latents


def _encode_linearly(plane: Tensor, network: Any) -> Tensor:
    """The linear code of a plane, which is quick: an image has nearly a weighted sum of the latents of its classes."""
    padded = pad_to_multiple(plane, network.total_downsample_factor)
    return network.shortcut.encode(padded.to(next(network.parameters()).device)).to(plane.device)
