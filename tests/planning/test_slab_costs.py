"""The planner's figures for slabs on a GPU follow the run in slabs."""

from __future__ import annotations

import pytest
import torch

from scripts.__main__ import main
from scripts.autoencoderkl import AutoencoderKL
from scripts.planning import inference_costs
from scripts.planning.inference_costs import least_slab_cost, slab_cost
from tests.conftest import ROOT
from tests.test_autoencoderkl import build

SIZE = (48, 40, 40)


@pytest.fixture
def network() -> AutoencoderKL:
    return build(AutoencoderKL, upsample_mode="trilinear")


@pytest.mark.parametrize("operation", ["reconstruct", "decode"])
def test_slabs_that_are_left_out_change_neither_peak_nor_number(network, operation, monkeypatch):
    short = slab_cost(network, SIZE, 1e-3, operation=operation)

    def every(run, start, stop, thickness, units):
        run.slabs += 1
        return stop

    monkeypatch.setattr(inference_costs._FakeRun, "_next_start", every)
    assert slab_cost(network, SIZE, 1e-3, operation=operation) == short


def test_more_memory_makes_fewer_slabs_that_hold_more(network):
    thin, thick = (slab_cost(network, SIZE, memory_gb) for memory_gb in (1e-4, 1))
    assert thin.slabs > thick.slabs
    assert thin.peak < thick.peak


def test_the_smallest_budget_is_kept_and_is_above_what_the_thinnest_slabs_hold(network):
    least = least_slab_cost(network, SIZE)
    assert slab_cost(network, SIZE, 0).peak < least.peak + least.convolution <= least.budget


def test_precision_of_the_process_is_left_as_it_was(network):
    slab_cost(network, SIZE, 1)
    assert not torch.is_autocast_enabled("cuda")


def test_estimate_prints_slabs_of_a_config_that_infers(capsys):
    config = str(ROOT / "configs/inference.json")
    keys = ["--channels", "[4,8,8]", "--latent_channels", "4"]
    main(["estimate", "--config_file", config, "--spatial_size", "64", "--memory_gb", "0.01", *keys])
    printed = capsys.readouterr().out
    assert "in slabs, 64x64x64" in printed and "smallest memory_gb" in printed and "peak with memory_gb 0.01" in printed
