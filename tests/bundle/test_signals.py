"""Ctrl-C in a run over volumes: words, an exit code, and no half a file."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

from monai.bundle import ConfigWorkflow

from tests.conftest import ROOT
from tests.processes import SERVER


def _reconstruct(volumes: Path, output_dir: Path):
    """Reconstruct with the shipped weights, and get a Ctrl-C in the second volume, as the loader's worker does."""
    multiprocessing.set_start_method("fork", force=True)  # for loader workers, as in a run from the command line
    sys.stdout = sys.stderr = output_dir.with_suffix(".log").open("a", buffering=1)
    os.setpgid(0, 0)
    flow = ConfigWorkflow(
        config_file=str(ROOT / "configs/inference.json"),
        meta_file=str(ROOT / "configs/metadata.json"),
        logging_file=str(ROOT / "configs/logging.conf"),
        workflow_type="infer",
        bundle_root=str(ROOT),
        dataset_dir=str(volumes),
        output_dir=str(output_dir),
        run_id="evaluating",
        device="cpu",
        num_workers=1,
        amp=False,
    )
    flow.initialize()

    def written() -> bool:
        return any(path.is_file() for path in output_dir.rglob("*"))

    def interrupt(*_):
        if written():
            group = f"-{os.getpgid(0)}"
            subprocess.run(["kill", f"-{signal.SIGINT}", "--", group], start_new_session=True, check=True)

    network = flow.parser.get_parsed_content("network")
    network.encoder.register_forward_hook(interrupt)
    network.decoder.register_forward_hook(lambda *_: os._exit(77) if written() else None)
    flow.run()


def test_ctrl_c_in_a_run_over_volumes_ends_with_words_and_no_half_a_file(volumes, tmp_path):
    output_dir = tmp_path / "reconstructions"
    process = SERVER.Process(target=_reconstruct, args=(volumes, output_dir))
    process.start()
    process.join(240)
    log = output_dir.with_suffix(".log").read_text()
    if process.exitcode is None:
        process.kill()
    assert process.exitcode == 128 + signal.SIGINT, log
    assert "SIGINT: the run ends here; each file that it has written is whole" in log
    assert "Traceback" not in log and "ERROR" not in log
    assert len([path for path in output_dir.rglob("*") if path.is_file()]) == 1
