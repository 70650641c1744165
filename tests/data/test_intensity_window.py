"""Which intensities become 0 and 1, and how voxels without a measurement are left out."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms.utils_pytorch_numpy_unification import percentile

from scripts.data.intensity_window import (
    ScaleIntensityWindowd,
    find_missing,
    intensity_window,
    pack_missing,
    put_back_missing,
    unscaled,
)

DEFAULT = [0.0, 99.9]
SHAPE = (48, 56, 40)
NAN, INF = math.nan, math.inf


def volume(values, name: str = "a.nii") -> dict:
    return {"image": MetaTensor(torch.as_tensor(values, dtype=torch.float32), meta={"filename_or_obj": name})}


def scaled(values: np.ndarray, percentiles=DEFAULT, intensity_range=None, name: str = "a.nii") -> MetaTensor:
    return ScaleIntensityWindowd("image", percentiles, intensity_range)(volume(values[None], name))["image"]


def window_of(values: np.ndarray) -> tuple[float, float]:
    window = intensity_window(scaled(values))
    return window["intensity_low"][0], window["intensity_high"][0]


def plain_percentiles(values: np.ndarray) -> tuple[float, float]:
    low, high = percentile(torch.as_tensor(values, dtype=torch.float32), DEFAULT).tolist()
    return low, high


def ct() -> np.ndarray:
    """Noisy air, cut off at -1024 as in a file of 12 bits, around a body with lungs and bone."""
    generator = np.random.default_rng(0)
    x, y, _ = np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE), indexing="ij")
    values = np.full(SHAPE, -1000.0)
    values[x**2 + y**2 < 0.5] = 40
    values[x**2 + y**2 < 0.2] = -850
    values[(x - 0.6) ** 2 + y**2 < 0.01] = 900
    return np.clip(np.rint(values + 15 * generator.standard_normal(SHAPE)), -1024, 3071)


def mr() -> np.ndarray:
    """A head with air of 0."""
    return np.where(ct() > -500, ct() + 1024, 0)


def outside_circle() -> np.ndarray:
    x, y, _ = np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE), indexing="ij")
    return x**2 + y**2 > 1


ORDINARY = {
    "CT": ct,
    "MR": mr,
    "MR with noise in air": lambda: np.hypot(mr(), 20 * np.random.default_rng(1).standard_normal(SHAPE)),
    "PET": lambda: np.maximum(np.random.default_rng(1).standard_normal(SHAPE), 0) ** 6,
    "standardised MR": lambda: (mr() - mr().mean()) / mr().std(),
    "8 bits": lambda: np.rint(mr() / 8),
}


@pytest.mark.parametrize("kind", ORDINARY)
def test_window_of_an_ordinary_volume_is_that_of_its_percentiles_bit_for_bit(kind):
    values = ORDINARY[kind]()
    assert window_of(values) == plain_percentiles(values)
    assert intensity_window(scaled(values))["missing"] == {}


@pytest.mark.parametrize("kind", ORDINARY)
@pytest.mark.parametrize("wild", [-32768, -1e6, -3.4e38, 3.4e38])
def test_a_few_wild_voxels_do_not_decide_the_window(kind, wild):
    values = ORDINARY[kind]()
    low, high = plain_percentiles(values)
    values[3, 4, 5:8] = wild
    found = window_of(values)
    assert found == pytest.approx((low, high), abs=0.03 * (high - low))
    restored = unscaled(scaled(values).as_tensor(), [found[0]], [found[1]])[0]
    kept = (values >= found[0]) & (values <= found[1])
    assert kept.mean() > 0.995
    assert np.allclose(restored[kept], values[kept], atol=1e-5 * (high - low))


@pytest.mark.parametrize("padding", [-1500, -2000, -3024, -32768, -1e6, -3.4e38])
def test_padding_outside_of_the_circle_does_not_count_and_is_restored(padding):
    values = np.where(outside_circle(), np.float32(padding), ct())
    values[24, 28, 20] = -32768  # a wild voxel beside it, which may be below or above the padding
    image = scaled(values)
    low, high = plain_percentiles(ct()[~outside_circle()])
    assert window_of(values) == pytest.approx((low, high), abs=1)
    window = intensity_window(image)
    restored = unscaled(image.as_tensor(), window["intensity_low"], window["intensity_high"]).numpy()
    assert restored[0][outside_circle()] == pytest.approx(low)
    put_back_missing(restored, window["missing"])
    assert (restored[0][outside_circle()] == np.float32(padding)).all() and (restored == np.float32(padding)).mean() < 0.25


def test_a_background_is_no_padding():
    assert find_missing(volume(mr()[None])["image"]) == {}
    assert find_missing(volume((mr() - 4000)[None])["image"]).keys() == {"-4000.0"}  # below any intensity of CT
    assert find_missing(volume(np.where(mr() > 0, ct(), -1024)[None])["image"]) == {}
    phase = np.random.default_rng(0).integers(-4096, 4096, SHAPE)
    assert find_missing(volume(np.where(mr() > 0, phase, -4096)[None])["image"]) == {}


def test_percentiles_of_a_sparse_volume_are_those_of_its_foreground():
    generator = np.random.default_rng(0)
    values = np.zeros(SHAPE)
    values.flat[generator.choice(values.size, 216, replace=False)] = generator.uniform(10, 1000, 216)
    low, high = window_of(values)
    assert low == 0 and (values > high).sum() <= 1
    assert window_of(-values) == (pytest.approx(-high, rel=0.02), 0)
    values[0, 0, 0] = 3.4e38
    assert window_of(values) == (0, pytest.approx(high, rel=0.02))


@pytest.mark.parametrize("values", [(0, 1), (-1, 1), (100, 7)])
@pytest.mark.parametrize("count", [1, 2, 50, 5000])
def test_window_of_a_mask_is_its_two_values(values, count):
    mask = np.full(SHAPE, values[0], np.float32)
    mask.flat[100 : 100 + count] = values[1]
    assert window_of(mask) == (min(values), max(values))


@pytest.mark.parametrize("share", [1e-5, 0.3, 0.98])
def test_voxels_that_are_not_finite_are_left_out_and_restored(share):
    values = ct()
    where = np.random.default_rng(2).random(SHAPE) < share
    where[:3, 0, 0] = True
    values[where] = NAN
    values[0, 0, 0], values[1, 0, 0] = INF, -INF
    image = scaled(values)
    assert torch.isfinite(image).all() and (image[0][torch.as_tensor(where)] == 0).all()
    window = intensity_window(image)
    assert (window["intensity_low"][0], window["intensity_high"][0]) == plain_percentiles(values[~where])
    assert window["clipped_below"] == 0 and window["clipped_above"] <= 0.001
    restored = np.zeros((1, *SHAPE))
    put_back_missing(restored, json.loads(json.dumps(window["missing"])))
    assert np.array_equal(restored[0], np.where(where, values, 0), equal_nan=True)


def test_volume_with_hardly_any_finite_voxel_is_refused():
    values = ct()
    values[1:] = NAN
    values[0, 21:] = NAN
    with pytest.raises(ValueError, match=r"bad.nii is NaN, infinite or padding in 99.2% of its voxels"):
        scaled(values, name="bad.nii")
    with pytest.raises(ValueError, match=r"two.nii \(channel 1\) is NaN, infinite or padding in 100.0% of"):
        ScaleIntensityWindowd("image", DEFAULT)(volume(np.stack([ct(), np.full(SHAPE, NAN)]), "two.nii"))


def test_constant_channel_is_named_with_its_own_value():
    for fixed in (None, [-1000, 1000]):
        with pytest.raises(ValueError, match=r"two.nii \(channel 1\) is constant \(7\)"):
            ScaleIntensityWindowd("image", DEFAULT, fixed)(volume(np.stack([ct(), np.full(SHAPE, 7)]), "two.nii"))
    with pytest.raises(ValueError, match=r"^one.nii is constant \(3\)"):
        scaled(np.full(SHAPE, 3), name="one.nii")


def test_volume_beyond_float32_is_refused():
    with pytest.raises(ValueError, match=r"a.nii has intensities from .*; more than 1e\+38 are not supported"):
        scaled(ct() / 1000 * 3e38)


def test_damaged_mask_of_missing_voxels_is_refused():
    values = ct()[None]
    packed = pack_missing({"nan": torch.as_tensor(values < 0)})
    for text, words in [("?", "is damaged"), (packed["nan"][:-8], "is"), ("AAAA", "is damaged")]:
        with pytest.raises(ValueError, match=f"the mask of missing voxels with the value nan {words}"):
            put_back_missing(values, {"nan": text})
    with pytest.raises(ValueError, match=r"it is not one of \(1, 4, 4, 4\) voxels"):
        put_back_missing(np.zeros((1, 4, 4, 4)), packed)


@pytest.mark.parametrize("values", [np.linspace(0, 1, 64), np.linspace(1001, 5000, 64), np.linspace(-5000, -1000, 64)])
def test_window_that_keeps_nothing_is_warned_of(values, caplog):
    scaled(values.reshape(4, 4, 4), intensity_range=[-1000, 1000], name="w.nii")
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert f"w.nii: its intensities, {values.min():g} to {values.max():g}, take 0." in record.message
    assert "`intensity_range`, -1000 to 1000" in record.message


def test_window_that_a_brain_takes_a_little_of_is_not_warned_of(caplog):
    scaled(np.linspace(0, 80, 64).reshape(4, 4, 4), intensity_range=[-1000, 1000])
    assert not caplog.records


def test_window_is_scaled_clipped_and_undone():
    transform = ScaleIntensityWindowd("image", [0, 100], intensity_range=[-1000, 1000])
    image = transform(volume([[[-2000.0, -1000.0, 0.0, 500.0]]]))["image"]
    assert torch.equal(image.as_tensor(), torch.tensor([[[0.0, 0.0, 0.5, 0.75]]]))
    window = intensity_window(image)
    restored = unscaled(image.as_tensor(), window["intensity_low"], window["intensity_high"])
    assert torch.equal(restored, torch.tensor([[[-1000.0, -1000.0, 0.0, 500.0]]]))


def test_shares_below_and_above_the_window_are_told_apart():
    image = scaled(np.array([[-1024, -1024, 0, 2000, 5]]), intensity_range=[-1000, 1000])
    window = intensity_window(image)
    assert [window[name] for name in ("clipped", "clipped_below", "clipped_above")] == pytest.approx([0.6, 0.4, 0.2])


def test_percentiles_are_taken_per_channel():
    values = torch.stack([torch.linspace(0, 100, 101), torch.linspace(-50, 950, 101)])[:, :, None]
    image = ScaleIntensityWindowd("image", [0, 90])(volume(values))["image"]
    assert torch.allclose(image[:, 90, 0].as_tensor(), torch.ones(2))
    assert torch.allclose(image[:, 45, 0].as_tensor(), torch.full((2,), 0.5))
    assert image.max() == 1


@pytest.mark.parametrize("name, window", [("percentiles", [99, 1]), ("intensity_range", [5, 5]), ("percentiles", [1])])
def test_empty_window_is_refused(name, window):
    with pytest.raises(ValueError, match=name):
        ScaleIntensityWindowd("image", **{"percentiles": [0, 100], name: window})
