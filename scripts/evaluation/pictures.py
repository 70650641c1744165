"""Pictures of volumes side by side in three planes: as one figure, or as single panels."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from ignite.engine import Events
from matplotlib.figure import Figure
from monai.engines import Evaluator
from monai.utils.enums import CommonKeys as Keys
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

Panels = dict[str, dict[str, str]]  # PNG files, as addresses with data, by title and by plane
PLANES = ("sagittal", "coronal", "axial")
POSITION = 0.45  # of each plane along its axis: in the middle of a head there is the gap between its halves
ERROR_GAIN = 5  # the error is shown this many times larger
OPACITY = 0.4  # of label maps
MAX_PIXELS = 320  # along an edge of a panel, of which three in a row must fit on a screen


def draw_reconstruction(image: torch.Tensor, reconstruction: torch.Tensor, spacing: Sequence[float]) -> Figure:
    """
    Draw image, reconstruction and the error times 5 of one channel.

    Args:
        image: ``HxWxD`` in RAS orientation, values in [0, 1].
        reconstruction: the same shape.
        spacing: voxel size in mm.
    """
    error = (reconstruction - image).abs() * ERROR_GAIN
    return draw_columns({"image": image, "reconstruction": reconstruction, f"error x {ERROR_GAIN}": error}, spacing)


def draw_columns(columns: Mapping[str, torch.Tensor], spacing: Sequence[float]) -> Figure:
    """
    Draw volumes side by side near their middle, at the window [0, 1]: a row for each plane, a column for each volume.

    Args:
        columns: ``HxWxD``, or ``HxWxDx3`` in colours, in RAS orientation by title.
        spacing: voxel size in mm, of all of them.
    """
    figure = Figure(figsize=(3 * len(columns), 9), layout="constrained")
    axes = figure.subplots(len(PLANES), len(columns), squeeze=False)
    for row, plane in enumerate(PLANES):
        right, up = (axis for axis in range(3) if axis != row)
        axes[row, 0].set_ylabel(plane)
        for panel, (title, volume) in zip(axes[row], columns.items()):
            aspect = spacing[up] / spacing[right]
            panel.imshow(_slice(volume, row), origin="lower", cmap="gray", vmin=0, vmax=1, aspect=aspect)
            panel.set(xticks=[], yticks=[], title=title if row == 0 else "")
    return figure


def panels_of(columns: Mapping[str, torch.Tensor]) -> Panels:
    """
    The slices of :py:func:`draw_columns` as single pictures without text. A pixel is a voxel, unless there are more than 320
    along an edge; pictures of voxels that are not cubes must be stretched when they are shown.
    """
    return {
        title: {plane: _png(_slice(volume, axis)) for axis, plane in enumerate(PLANES)} for title, volume in columns.items()
    }


def overlaid(volume: torch.Tensor, labels: torch.Tensor, classes: Sequence[int]) -> torch.Tensor:
    """
    A label map over a volume, in a colour for each class.

    Args:
        volume: ``HxWxD``, values in [0, 1].
        labels: ``HxWxD``; 0 and labels that are not among the classes have no colour.
        classes: labels with a colour.

    Returns:
        ``HxWxDx3``, on the CPU.
    """
    found = volume.cpu()[..., None].repeat(1, 1, 1, 3)
    for number, label in enumerate(classes, start=1):
        colour = torch.tensor(matplotlib.colormaps["turbo"](number / len(classes))[:3], dtype=found.dtype)
        found[labels == label] = found[labels == label].lerp(colour, OPACITY)
    return found


def _slice(volume: torch.Tensor, axis: int) -> np.ndarray:
    """A slice across ``axis``. Its rows run along the later one of the two other axes, upwards."""
    return np.asarray(volume.select(axis, int(volume.shape[axis] * POSITION)).cpu(), dtype=np.float32).swapaxes(0, 1)


def _png(values: np.ndarray) -> str:
    picture = Image.fromarray((255 * values[::-1].clip(0, 1)).round().astype(np.uint8))
    picture.thumbnail((MAX_PIXELS, MAX_PIXELS))
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


class ReconstructionPicture:
    """
    Evaluator handler that draws the first volume of each run, to a PNG file and to TensorBoard.

    Args:
        path: path of the PNG file.
        summary_writer: where to add the picture as well, at the epoch as step.
    """

    def __init__(self, path: str, summary_writer: SummaryWriter | None = None) -> None:
        self.path, self.summary_writer = Path(path), summary_writer

    def attach(self, engine: Evaluator) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=1), self)

    def __call__(self, engine: Evaluator) -> None:
        output = engine.state.output[0]
        image = output[Keys.IMAGE]
        figure = draw_reconstruction(image[0], output[Keys.PRED][0], image.pixdim.tolist())
        self.path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(self.path, dpi=100)
        if self.summary_writer is not None:
            self.summary_writer.add_figure("reconstruction", figure, engine.state.epoch)
