"""A resumed run keeps the precision of its checkpoint."""

from __future__ import annotations

import pytest

from scripts.bundle.precision import Precision
from scripts.training.checkpoints import find_checkpoints, resumed_precision
from tests.conftest import save_volume
from tests.training.test_checkpoints import run_with_checkpoints
from tests.training.test_training import small_network
from tests.training_run import final_state, log_of, train

pytestmark = pytest.mark.precision
OF_THE_DEVICE = Precision("cpu", False, "bfloat16", "that of the device")


@pytest.fixture(autouse=True)
def device(monkeypatch):
    """A device whose default is float32."""
    monkeypatch.setattr("scripts.training.checkpoints.choose_precision", lambda device: OF_THE_DEVICE)


@pytest.mark.parametrize("amp, amp_dtype", [(True, "bfloat16"), (True, "float16"), (False, "bfloat16")])
def test_precision_of_the_checkpoint_wins_over_that_of_the_device(tmp_path, amp, amp_dtype):
    run_with_checkpoints(tmp_path, small_network(), epochs=1, amp=amp, amp_dtype=amp_dtype)
    found = resumed_precision(str(tmp_path), "cpu")
    assert (found.amp, found.amp_dtype) == (amp, amp_dtype)
    assert "checkpoint_00000003.pt" in found.reason


def test_without_a_checkpoint_it_is_that_of_the_device(tmp_path):
    assert resumed_precision(str(tmp_path / "nowhere"), "cpu") is OF_THE_DEVICE


def test_a_damaged_checkpoint_leaves_it_to_the_one_before(tmp_path):
    run_with_checkpoints(tmp_path, small_network(), epochs=2, amp=True, amp_dtype="float16")
    find_checkpoints(tmp_path)[0].write_bytes(b"cut short")
    assert resumed_precision(str(tmp_path), "cpu").name == "float16"


def test_a_run_keeps_its_precision_to_its_end(tmp_path):
    for i in range(4):
        save_volume(tmp_path / "volumes" / f"sub-{i}.nii.gz", (16, 16, 16), seed=i)
    output_dir = tmp_path / "eval"
    for keys in ({"epochs": 1, "amp": True, "amp_dtype": "float16"}, {"epochs": 2, "resume": True}):
        assert (
            train(tmp_path / "volumes", output_dir, **{"adv_weight": 0.0, "spectral_weight": 0.0, "num_workers": 0, **keys})
            == 0
        )
    assert final_state(output_dir)["precision"] == {"amp": True, "amp_dtype": "float16"}
    started, resumed = (line for line in log_of(output_dir).splitlines() if "INFO scripts.bundle.precision: " in line)
    assert "precision: float16 on cpu, as configured" in started
    assert "precision: float16 on cpu: that of" in resumed and "checkpoint_00000003.pt" in resumed
