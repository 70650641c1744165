"""Which training latent is nearest to a sample, mirrored ones included: a generator may have learned volumes by heart."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from scripts.autoencoderkl import AutoencoderKL
from scripts.diffusion.latent_space import LatentSpace

__all__ = ["MirroredLatents", "Nearest", "NearestLatents"]


@dataclass(frozen=True)
class Nearest:
    """
    Args:
        path: of the training latent.
        mirrored: along which axes it was mirrored.
        distance: root mean square of the difference, in deviations of the latents in units of the image.
    """

    path: str
    mirrored: tuple[int, ...]
    distance: float


class MirroredLatents:
    """
    What the latent of a mirrored volume is. Its voxels change places, and within a block the linear code changes too: what
    rises to the left rises to the right. That change is one matrix for each axis, found by mirroring each function of the
    code. What the network adds to the linear code, and latents without one, only change places.

    Args:
        autoencoder: that made the latents.
    """

    def __init__(self, autoencoder: AutoencoderKL) -> None:
        axes = len(autoencoder.total_downsample_factor)
        self.changes: list[torch.Tensor | None] = [None] * axes
        if autoencoder.shortcut is not None:
            shortcut = autoencoder.shortcut
            functions = torch.eye(autoencoder.latent_channels).reshape(-1, autoencoder.latent_channels, *[1] * axes)
            with torch.no_grad():
                blocks = shortcut.decode(functions.to(shortcut.scale))
                self.changes = [shortcut.encode(blocks.flip(axis + 2)).flatten(1).t().cpu() for axis in range(axes)]

    def __call__(self, z: torch.Tensor) -> Iterable[tuple[tuple[int, ...], torch.Tensor]]:
        """Each combination of axes, and the latent ``CxHxWxD`` mirrored along them."""
        axes = range(len(self.changes))
        for mirrored in itertools.chain.from_iterable(itertools.combinations(axes, n) for n in range(len(axes) + 1)):
            changed = z
            for axis in mirrored:
                change = self.changes[axis]
                changed = changed.flip(axis + 1)
                changed = changed if change is None else torch.einsum("ij,j...->i...", change, changed)
            yield mirrored, changed


class NearestLatents:
    """
    Looks for the nearest of training latents that come one after the other. Those of another size are not compared.

    Args:
        space: whose normalised latents are compared.
        mirror: makes the mirrored training latents.
        latents: normalised latents, ``CxHxWxD`` each.
        paths: files that they were read from, which are not compared with themselves; empty texts for samples.
    """

    def __init__(
        self, space: LatentSpace, mirror: MirroredLatents, latents: Sequence[torch.Tensor], paths: Sequence[str]
    ) -> None:
        self.space, self.mirror, self.paths = space, mirror, paths
        self.found: list[Nearest | None] = [None] * len(latents)
        self._places: dict[torch.Size, list[int]] = {}
        for i, latent in enumerate(latents):
            self._places.setdefault(latent.shape, []).append(i)
        self._stacks = {
            shape: torch.stack([latents[i] for i in places]).flatten(1) for shape, places in self._places.items()
        }
        self._squares = {shape: stack.square().mean(1) for shape, stack in self._stacks.items()}

    def add(self, path: str, z: torch.Tensor) -> None:
        """
        Compare with a training latent.

        Args:
            path: of the latent.
            z: as the autoencoder made it, ``CxHxWxD``.
        """
        if z.shape not in self._stacks:
            return
        stack, squares = self._stacks[z.shape], self._squares[z.shape]
        variants = [(mirrored, self.space.normalised(changed[None]).flatten()) for mirrored, changed in self.mirror(z)]
        candidates = torch.stack([candidate for _, candidate in variants])
        products = stack @ candidates.t() / stack.shape[1]
        distances = (squares[:, None] + candidates.square().mean(1) - 2 * products).clamp(min=0).sqrt()
        best, variant = distances.min(1)
        for i, distance, which in zip(self._places[z.shape], best.tolist(), variant.tolist()):
            known = self.found[i]
            if self.paths[i] != path and (known is None or distance < known.distance):
                self.found[i] = Nearest(path, variants[which][0], distance)
