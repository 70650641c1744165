"""What training and sampling a generator needs on a GPU, by the planner's rules, beside the U-Net of NV-Generate.

    python -m benchmarks.generator_memory

NV-Generate's is ``diffusion_unet_def`` of its ``config_network_rflow.json``: MONAI's ``DiffusionModelUNetMaisi`` with
channels 64, 128, 256, 512, attention in the last two levels, two residual blocks in each level, residual blocks that
resample, flash attention, and spacing and modality as input, on latents of 4 channels and a quarter of the volume's size.
All are in bfloat16 with batch 1, AdamW and an average of the weights. No GPU is needed.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from monai.apps.generation.maisi.networks.diffusion_model_unet_maisi import DiffusionModelUNetMaisi
from monai.inferers import SimpleInferer
from monai.networks.blocks.selfattention import SABlock

from scripts.bundle.config import ROOT
from scripts.bundle.machine import GIB
from scripts.bundle.text_table import table
from scripts.planning.estimates import with_margin
from scripts.planning.fake_tensors import fake_copy, fake_tensors
from scripts.planning.generator_estimates import GeneratorEstimate, estimate_generator, plan_generator
from scripts.planning.training_costs import FakeStep, TrainingCost, step_cost

PRESETS = ("8x", "16x", "32x")
CHANNELS = [192, 384, 544]
SIZES = (256, 512)
CARD = 24  # GiB


def main() -> None:
    """Print the tables."""
    header = [
        "volume",
        "autoencoder",
        "latent",
        "parameters",
        "training, peak",
        "with margin",
        "sampling",
        "decoding in one pass",
    ]
    rows = []
    for size in SIZES:
        for preset in PRESETS:
            found = estimate(size, preset)
            latent = f"{found.latent_shape[0]} x {found.latent_shape[1]}^3"
            costs = (found.training.peak, found.training_bytes, found.sampling_bytes, found.decoding_bytes)
            rows.append([f"{size}^3", preset, latent, millions(found.parameters), *map(gib, costs)])
        parameters, cost = nv_generate(size)
        row = [f"{size}^3", "MAISI's", f"4 x {size // 4}^3", millions(parameters)]
        rows.append([*row, gib(cost.peak), gib(with_margin(cost, "cuda")), "", ""])
    print(table(header, rows))
    print()
    print(table(["512^3 at 16x, the largest that trains within 24 GiB", "", "with margin"], largest()))


def estimate(size: int, preset: str, **keys: Any) -> GeneratorEstimate:
    """Of the generator on the latents of a preset."""
    config, overlay = (str(ROOT / "configs" / name) for name in ("train_diffusion.json", f"presets/{preset}.json"))
    return estimate_generator(plan_generator(config, size, overlay, **{"channels": CHANNELS, **keys}))


def largest() -> list[list[str]]:
    """The largest batch and the largest width, by doubling and by steps of 64."""
    rows = []
    batch, found = 1, estimate(512, "16x")
    while (wider := estimate(512, "16x", batch_size=2 * batch)).training_bytes <= CARD * GIB:
        batch, found = 2 * batch, wider
    rows.append([f"batch, at channels {CHANNELS}", str(batch), gib(found.training_bytes)])
    channels, best = CHANNELS, estimate(512, "16x")
    while True:
        more = [channels[0] + 64, 2 * channels[0] + 128, 2 * channels[0] + 256]
        if (next_one := estimate(512, "16x", channels=more)).training_bytes > CARD * GIB:
            break
        channels, best = more, next_one
    rows.append(["channels, at batch 1", f"{channels}, {millions(best.parameters)}", gib(best.training_bytes)])
    return rows


def nv_generate(size: int) -> tuple[int, TrainingCost]:
    """Number of parameters, and cost of a step with batch 1."""
    with torch.device("meta"):
        network = DiffusionModelUNetMaisi(
            spatial_dims=3,
            in_channels=4,
            out_channels=4,
            num_res_blocks=2,
            num_channels=(64, 128, 256, 512),
            attention_levels=(False, False, True, True),
            num_head_channels=(0, 0, 32, 32),
            include_spacing_input=True,
            num_class_embeds=128,
            resblock_updown=True,
            include_fc=True,
        )
    for module in network.modules():
        if isinstance(module, SABlock):
            module.use_flash_attention = True  # its constructor refuses that without a GPU
    parameters = sum(math.prod(parameter.shape) for parameter in network.parameters())
    with fake_tensors():
        network = fake_copy(network)
        latent = torch.empty(1, 4, *[size // 4] * 3)
        told = {
            "timesteps": torch.empty(1),
            "class_labels": torch.empty(1, dtype=torch.long),
            "spacing_tensor": torch.empty(1, 3),
        }
        batch = {"image": latent}
        trainer = FakeStep(
            max_epochs=1,
            device=torch.device("cpu"),
            train_data_loader=[batch],
            network=network,
            optimizer=torch.optim.AdamW(network.parameters()),
            loss_function=torch.nn.functional.mse_loss,
            prepare_batch=lambda data, *_, **__: (data["image"], torch.empty_like(data["image"]), (), told),
            inferer=SimpleInferer(),
            amp=True,
            amp_dtype="bfloat16",
        )
        return parameters, step_cost(trainer, batch, "cuda", averaged=True)


def gib(nbytes: int) -> str:
    """In words."""
    return f"{nbytes / GIB:.1f} GiB"


def millions(number: int) -> str:
    """In words."""
    return f"{number / 1e6:.0f} M"


if __name__ == "__main__":
    main()
