"""Muon takes the steps of PyTorch's two optimizers, and resumes to the last bit."""

from __future__ import annotations

import copy
import io

import pytest
import torch

from scripts.training.muon import COEFFICIENTS, ITERATIONS, Muon, orthogonalised


def steps(optimizer, *parameters: torch.Tensor, count: int = 5) -> torch.Tensor:
    """Take steps along the same random gradients; returns the first parameter."""
    generator = torch.Generator().manual_seed(2)
    for _ in range(count):
        for one in parameters:
            one.grad = torch.randn(one.shape, generator=generator)
        optimizer.step()
    return parameters[0].detach()


def parameter(*shape: int) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("shape", [(6, 40), (40, 6), (9, 9)], ids=str)
def test_orthogonalised_matrix_keeps_its_singular_vectors_and_has_values_of_about_one(shape):
    left, values, right = torch.linalg.svd(parameter(*shape).detach(), full_matrices=False)
    values = torch.logspace(0, -1.5, len(values))
    found = left.t() @ orthogonalised(left @ values.diag() @ right) @ right.t()
    assert (found - found.diag().diag()).abs().max() < 1e-3
    assert ((found.diag() - 1).abs() < 0.35).all()


@pytest.mark.parametrize("decades", [0, 4, 8])
def test_orthogonalised_matrix_is_that_of_the_plain_iteration(decades):
    """Singular values far below the others too, with which products of rows lose digits."""
    left, values, right = torch.linalg.svd(parameter(48, 1296).detach(), full_matrices=False)
    matrix = left @ torch.logspace(0, -decades, len(values)).diag() @ right
    expected = matrix.double() / matrix.double().norm()
    linear, cubic, quintic = COEFFICIENTS
    for _ in range(ITERATIONS):
        square = expected @ expected.t()
        expected = linear * expected + (cubic * square + quintic * square @ square) @ expected
    assert (orthogonalised(matrix) - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize("shape", [(8, 24), (24, 8)], ids=str)
def test_steps_of_a_matrix_are_those_of_pytorch(shape):
    """Which orthogonalises in bfloat16."""
    ours, theirs = parameter(*shape), parameter(*shape)
    settings = {"lr": 0.01, "weight_decay": 0.1}
    result = steps(Muon([ours], **settings), ours)
    expected = steps(torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **settings), theirs)
    moved = (expected - parameter(*shape)).norm()
    assert moved > 0.1 and (result - expected).norm() < 0.02 * moved


@pytest.mark.parametrize("shape", [(8,), (8, 1, 2, 2, 2), (1, 8)], ids=str)
def test_steps_of_other_parameters_are_those_of_adamw(shape):
    ours, theirs = parameter(*shape), parameter(*shape)
    settings = {"lr": 0.01, "weight_decay": 0.1, "betas": (0.9, 0.95)}
    assert torch.allclose(
        steps(Muon([ours], **settings), ours), steps(torch.optim.AdamW([theirs], **settings), theirs), atol=1e-6
    )


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d], ids=str)
def test_weights_of_convolutions_are_matrices_of_output_channels(memory_format):
    weight, matrix = parameter(4, 3, 2, 2, 2), parameter(4, 24)
    with torch.no_grad():
        matrix.copy_(weight.flatten(1))
    weight.data = weight.data.to(memory_format=memory_format)
    weight.grad = torch.randn(weight.shape).to(memory_format=memory_format)
    matrix.grad = weight.grad.flatten(1)
    for one in (weight, matrix):
        Muon([one], lr=0.1).step()
    assert torch.equal(weight.flatten(1), matrix)
    assert weight.is_contiguous(memory_format=memory_format)


def test_state_is_loaded_back_to_the_last_bit():
    parameters = [parameter(4, 3, 2, 2, 2), parameter(4)]
    optimizer = Muon(parameters, lr=0.1)
    file = io.BytesIO()
    steps(optimizer, *parameters, count=2)
    torch.save(optimizer.state_dict(), file)
    again = [copy.deepcopy(one) for one in parameters]
    resumed = Muon(again, lr=0.5)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    steps(optimizer, *parameters)
    steps(resumed, *again)
    assert all(torch.equal(one, other) for one, other in zip(parameters, again))
