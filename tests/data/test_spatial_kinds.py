"""What label maps are encoded as, and which voxels are labels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from scripts.data.spatial_kinds import SpatialKind, labels_in

LABELS = torch.tensor([0, 3, 7, 3, -2, 0]).reshape(1, 1, 1, 2, 3)


def test_label_map_has_a_plane_for_each_class():
    kind = SpatialKind((-2, 3, 7))
    planes = torch.cat(list(kind.planes(LABELS, "x")))
    assert planes.dtype == torch.float32 and kind.num_planes == 3
    assert kind.summary() == "a label map of 3 classes (-2, 3, 7) in 3 planes"
    assert planes.flatten(1).tolist() == [[0, 0, 0, 0, 1, 0], [0, 1, 0, 1, 0, 0], [0, 0, 1, 0, 0, 0]]


@pytest.mark.parametrize("count, planes", [(16, 16), (17, 5), (31, 5), (32, 6), (132, 8)])
def test_many_classes_share_planes_by_the_bits_of_their_numbers(count, planes):
    kind = SpatialKind(tuple(10 * n for n in range(1, count + 1)))
    assert kind.num_planes == planes
    labels = torch.tensor((0, *kind.classes), dtype=torch.int32).reshape(1, 1, 1, 1, -1)
    found = torch.cat(list(kind.planes(labels, "x"))).reshape(planes, -1)
    assert len({tuple(column) for column in found.T.tolist()}) == count + 1
    assert not found[:, 0].any()
    if planes < count:
        assert ((found.T.long() << torch.arange(planes)).sum(1) == torch.arange(count + 1)).all()


def test_bits_count_classes_in_order_with_labels_below_0():
    kind = SpatialKind((*range(-5, 0), *range(1, 15)))
    labels = torch.tensor([0, -5, 14]).reshape(1, 1, 1, 1, -1)
    found = torch.stack(list(kind.planes(labels, "x"))).reshape(kind.num_planes, -1).T.long()
    assert (found << torch.arange(kind.num_planes)).sum(1).tolist() == [0, 1, 19]


def test_image_is_its_only_plane():
    image = torch.rand(1, 2, 3, 4, 5)
    (plane,) = SpatialKind().planes(image, "x")
    assert torch.equal(plane, image) and SpatialKind().num_planes == 1


def test_label_that_is_no_class_is_refused_by_name():
    with pytest.raises(ValueError, match="mask.nii has labels that are not among the classes: -2, 7; known are 0, 3"):
        list(SpatialKind((3,)).planes(LABELS, "mask.nii"))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.float32, np.float64])
def test_labels_are_integers_of_any_type(dtype):
    values = np.zeros((3, 4, 5), dtype)
    values[1], values[2, 1] = 4, 100
    assert labels_in(values) == [0, 4, 100]


@pytest.mark.parametrize("strange", [0.5, np.nan, np.inf, 1e30, 2.0**31])
def test_voxels_that_are_no_labels_are_refused(strange):
    values = np.zeros((3, 4, 5))
    values[1, 2, 3] = strange
    with pytest.raises(ValueError, match="is no label map: it has voxels of .*, and labels are integers"):
        labels_in(values)


def test_image_of_integers_is_no_label_map():
    with pytest.raises(ValueError, match="more than 1024 different values"):
        labels_in(np.arange(2000).reshape(2, 10, 100))
