"""The network: MONAI's by default; then its factors and modes."""

from __future__ import annotations

import pytest
import torch
from monai.networks.nets import AutoencoderKL as MonaiAutoencoderKL
from monai.networks.nets.autoencoderkl import Decoder as MonaiDecoder
from monai.networks.nets.autoencoderkl import Encoder as MonaiEncoder

from scripts.autoencoderkl import AutoencoderKL, Decoder, Downsample, Encoder, Reconstructor, Upsample
from scripts.layers.lean_blocks import ResidualBlock

PLAIN = {
    "spatial_dims": 3,
    "channels": (4, 8, 8),
    "num_res_blocks": 1,
    "attention_levels": (False, False, False),
    "latent_channels": 3,
    "norm_num_groups": 1,
    "with_encoder_nonlocal_attn": False,
    "with_decoder_nonlocal_attn": False,
}

MONAI_CASES = [
    {},
    {"num_res_blocks": 1},
    {"num_res_blocks": [1, 2, 1]},
    {"attention_levels": (False, False, True)},
    {"with_encoder_nonlocal_attn": True, "with_decoder_nonlocal_attn": True},
    {"with_encoder_nonlocal_attn": True, "use_flash_attention": True},
    {"attention_levels": (False, True, True), "use_combined_linear": True, "include_fc": False},
    {"use_convtranspose": True},
    {"use_checkpoint": True},
    {"use_convtranspose": True, "use_checkpoint": True},
    {"in_channels": 2, "out_channels": 3},
]


def build(cls: type = AutoencoderKL, **arguments):
    torch.manual_seed(0)
    return cls(**{**PLAIN, **arguments}).eval()


def image_for(network: AutoencoderKL, latents_per_axis: int = 2, batch: int = 1) -> torch.Tensor:
    torch.manual_seed(1)
    shape = [latents_per_axis * f for f in network.total_downsample_factor]
    return torch.rand(batch, network.arguments["in_channels"], *shape)


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("case", MONAI_CASES, ids=str)
def test_default_factors_match_monai_bit_for_bit(case: dict, spatial_dims: int):
    arguments = {**PLAIN, "norm_num_groups": 4, **case, "spatial_dims": spatial_dims}
    torch.manual_seed(0)
    theirs = MonaiAutoencoderKL(**arguments).eval()
    torch.manual_seed(0)
    ours = AutoencoderKL(**arguments).eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values()))

    theirs.apply(lambda m: m.reset_parameters() if hasattr(m, "reset_parameters") else None)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    image = torch.rand(2, arguments.get("in_channels", 1), *[16] * spatial_dims)
    for a, b in zip(ours.encode(image), theirs.encode(image)):
        assert torch.equal(a, b)
    assert torch.equal(ours.reconstruct(image), theirs.reconstruct(image))
    torch.manual_seed(2)
    sampled = ours(image)
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(sampled, theirs(image)))


def test_arguments_come_in_the_order_of_monai():
    import inspect

    theirs = list(inspect.signature(MonaiAutoencoderKL).parameters.items())
    ours = list(inspect.signature(AutoencoderKL).parameters.items())
    assert [(n, p.default) for n, p in ours[: len(theirs)]] == [(n, p.default) for n, p in theirs]


def test_encoder_and_decoder_alone_match_monai():
    shared = {"norm_num_groups": 4, "norm_eps": 1e-6, "attention_levels": (False, True), "num_res_blocks": (1, 1)}
    pairs = [
        (Encoder(2, 1, (4, 8), 3, **shared), MonaiEncoder(2, 1, (4, 8), 3, **shared), (1, 1, 16, 16)),
        (Decoder(2, (4, 8), 3, 1, **shared), MonaiDecoder(2, (4, 8), 3, 1, **shared), (1, 3, 8, 8)),
    ]
    for ours, theirs, shape in pairs:
        ours.load_state_dict(theirs.state_dict(), strict=True)
        x = torch.rand(shape)
        assert torch.equal(ours(x), theirs(x))


# --- the equivalents of MONAI's own cases ---------------------------------------------------------------------------


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("num_res_blocks", [1, (1, 1, 2)])
@pytest.mark.parametrize("attention", [(False, False, False), (False, False, True)])
def test_shapes_of_forward(spatial_dims: int, num_res_blocks, attention):
    network = build(
        spatial_dims=spatial_dims,
        channels=(4, 4, 4),
        latent_channels=4,
        norm_num_groups=4,
        num_res_blocks=num_res_blocks,
        attention_levels=attention,
    )
    reconstruction, z_mu, z_sigma = network(torch.rand(1, 1, *[16] * spatial_dims))
    assert reconstruction.shape == (1, 1, *[16] * spatial_dims)
    assert z_mu.shape == z_sigma.shape == (1, 4, *[4] * spatial_dims)
    assert (z_sigma > 0).all()


def test_checkpointing_with_convtranspose_gives_the_same_gradients():
    gradients = []
    for use_checkpoint in (False, True):
        network = build(use_convtranspose=True, use_checkpoint=use_checkpoint).train()
        torch.manual_seed(3)
        network(image_for(network, 4))[0].square().mean().backward()
        gradients.append([p.grad for p in network.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1])
    assert all(torch.allclose(a, b) for a, b in zip(*gradients))


def test_sampling_and_stage_2_helpers():
    network = build(spatial_dims=2)
    mean, deviation = torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 4)
    torch.manual_seed(0)
    sample = network.sampling(mean, deviation)
    torch.manual_seed(0)
    assert torch.equal(sample, torch.randn(1, 3, 4, 4))
    assert torch.equal(network.sampling(mean + 2, deviation * 0), mean + 2)
    assert network.encode_stage_2_inputs(torch.rand(1, 1, 16, 16)).shape == (1, 3, 4, 4)
    assert network.decode_stage_2_outputs(mean).shape == (1, 1, 16, 16)


def test_monai_errors_are_kept():
    with pytest.raises(ValueError, match="norm_num_groups"):
        build(channels=(6, 8, 8), norm_num_groups=4)
    with pytest.raises(ValueError, match="attention_levels"):
        build(attention_levels=(False, False))
    with pytest.raises(ValueError, match="num_res_blocks"):
        build(num_res_blocks=(1, 1))


def as_generative_models(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename as GenerativeModels named its weights: attention without `attn.`, its projection, the upsampling conv."""
    renames = ((".attn.to_", ".to_"), (".attn.out_proj.", ".proj_attn."), (".postconv.", ".conv."))
    renamed = {}
    for key, value in state.items():
        for new, old in renames:
            key = key.replace(new, old)
        renamed[key] = value
    return renamed


def test_weights_of_generative_models_load():
    arguments = {"attention_levels": (False, False, True), "with_encoder_nonlocal_attn": True}
    source = build(**arguments)
    target = build(**arguments)
    target.apply(lambda m: m.reset_parameters() if hasattr(m, "reset_parameters") else None)
    old = as_generative_models(source.state_dict())
    assert set(old) != set(source.state_dict())
    target.load_old_state_dict(old)
    image = image_for(source, 4)
    assert torch.equal(target.reconstruct(image), source.reconstruct(image))


# --- factors ---------------------------------------------------------------------------------------------------------

FACTOR_CASES = [
    # channels, downsample_factors, initial, total
    ((4, 8, 8), [2, 2], 1, (4, 4, 4)),
    ((4, 8, 8), [2, 2], 2, (8, 8, 8)),
    ((4, 8, 8), [4, 2], 1, (8, 8, 8)),
    ((4, 8, 8), [8, 2], 1, (16, 16, 16)),
    ((4, 8, 8), [4, 2], 2, (16, 16, 16)),
    ((4, 8, 8), [2, 2], 4, (16, 16, 16)),
    ((4, 8, 8), [4, 2], 4, (32, 32, 32)),
    ((4, 8, 8), [4, 2], 8, (64, 64, 64)),
    ((4, 8), [16], 1, (16, 16, 16)),
    ((4, 8, 8), [[2, 2, 1], [2, 2, 2]], [2, 2, 1], (8, 8, 2)),
    ((4, 8, 8), [1, 3], [1, 2, 1], (3, 6, 3)),
    ((4,), [], 4, (4, 4, 4)),
    ((4,), [], 1, (1, 1, 1)),
]


@pytest.mark.parametrize("initial_mode, use_convtranspose", [("conv", False), ("conv", True), ("pixelshuffle", False)])
@pytest.mark.parametrize("channels, factors, initial, total", FACTOR_CASES)
def test_factors_shape_the_latent_and_are_undone(channels, factors, initial, total, initial_mode, use_convtranspose):
    network = build(
        channels=channels,
        attention_levels=[False] * len(channels),
        downsample_factors=factors,
        initial_downsample_factor=initial,
        initial_mode=initial_mode,
        use_convtranspose=use_convtranspose,
    )
    assert network.total_downsample_factor == total
    image = torch.rand(1, 1, *total)
    with torch.no_grad():
        reconstruction, z_mu, _ = network(image)
    assert reconstruction.shape == image.shape
    assert z_mu.shape[1:] == network.latent_shape(image.shape[2:])
    assert network.latent_shape([2 * t for t in total]) == (3, 2, 2, 2)


@pytest.mark.parametrize("use_convtranspose", [False, True])
def test_factors_work_in_two_dimensions(use_convtranspose: bool):
    network = build(
        spatial_dims=2,
        downsample_factors=[[4, 1], 2],
        initial_downsample_factor=[1, 2],
        initial_mode="pixelshuffle",
        linear_shortcut=True,
        use_convtranspose=use_convtranspose,
    )
    assert network.total_downsample_factor == (8, 4)
    assert network.reconstruct(torch.rand(2, 1, 19, 30)).shape == (2, 1, 19, 30)


@pytest.mark.parametrize(
    "factors, initial, mode", [([8], 1, "conv"), ([16], 1, "conv"), ([2], 8, "conv"), ([2], 8, "pixelshuffle")]
)
def test_every_voxel_reaches_the_latent(factors, initial, mode):
    network = build(
        channels=(4, 4),
        attention_levels=[False, False],
        downsample_factors=factors,
        initial_downsample_factor=initial,
        initial_mode=mode,
    )
    # norms couple all voxels, which would hide a stride that skips some: leave the convolutions that change the resolution
    mixing = (ResidualBlock, torch.nn.GroupNorm)
    shrinking = torch.nn.Sequential(*[block for block in network.encoder.blocks if not isinstance(block, mixing)])
    image = image_for(network).requires_grad_()
    latent = shrinking(image)
    assert latent.shape[2:] == (2, 2, 2)
    latent.square().sum().backward()
    assert (image.grad != 0).all()


def test_downsample_of_factor_2_is_the_layer_of_monai():
    from monai.networks.nets.autoencoderkl import AEKLDownsample

    theirs, ours = AEKLDownsample(3, 4), Downsample(3, 4, stride=2)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.rand(1, 4, 8, 8, 8)
    assert torch.equal(ours(x), theirs(x))


def test_kernels_follow_the_factors():
    conv = Downsample(3, 4, stride=[4, 1, 8]).conv.conv
    assert conv.kernel_size == (5, 3, 9) and conv.stride == (4, 1, 8) and conv.padding == (0, 1, 0)
    deconv = Upsample(3, 4, scale_factor=[4, 1, 2], use_convtranspose=True).deconv
    assert deconv.kernel_size == deconv.stride == (4, 1, 2)


def test_decoder_uses_the_factors_in_reverse():
    decoder = Decoder(2, (4, 8, 8), 3, 1, (1, 1, 1), 1, 1e-6, [False] * 3, with_nonlocal_attn=False, upsample_factors=[4, 2])
    assert [block.factors for block in decoder.blocks if isinstance(block, Upsample)] == [[2, 2], [4, 4]]


def test_no_feature_map_at_full_resolution_with_pixelshuffle():
    network = build(initial_downsample_factor=2, initial_mode="pixelshuffle", linear_shortcut=True)
    image = image_for(network, 4)
    sizes: list[tuple[int, int]] = []
    for module in network.modules():
        if isinstance(module, (torch.nn.Conv3d, torch.nn.GroupNorm)):
            module.register_forward_hook(lambda m, i, o: sizes.append((o.shape[1], o[0, 0].numel())))
    network.reconstruct(image)
    assert max(voxels for channels, voxels in sizes if channels > 1) == image.numel() // 8


def test_subpixel_output_starts_without_a_checkerboard():
    network = build(initial_downsample_factor=[4, 2, 1], initial_mode="pixelshuffle", downsample_factors=[2, 2])
    image = network.decode(torch.rand(1, 3, 2, 2, 2))
    blocks = image.reshape(8, 4, 8, 2, 8)  # each voxel of the small grid, 4 x 2 x 1 times
    assert torch.allclose(blocks, blocks[:, :1, :, :1].expand_as(blocks))
    assert image.std() > 0


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"downsample_factors": [2]}, ["downsample_factors", "[2]", "2, one between two levels"]),
        ({"downsample_factors": [2, 2, 2]}, ["downsample_factors", "[2, 2, 2]"]),
        ({"downsample_factors": 2}, ["downsample_factors", "sequence"]),
        ({"downsample_factors": [0, 2]}, ["downsample_factors[0]", "0", "at least 1"]),
        ({"downsample_factors": [2, -4]}, ["downsample_factors[1]", "-4"]),
        ({"downsample_factors": [2, 1.5]}, ["downsample_factors[1]", "1.5"]),
        ({"downsample_factors": [True, 2]}, ["downsample_factors[0]", "True"]),
        ({"downsample_factors": [[2, 2], 2]}, ["downsample_factors[0]", "(2, 2)|[2, 2]", "3"]),
        ({"initial_downsample_factor": 0}, ["initial_downsample_factor", "0"]),
        ({"initial_downsample_factor": "2"}, ["initial_downsample_factor", "'2'"]),
        ({"initial_downsample_factor": [2, 2]}, ["initial_downsample_factor", "[2, 2]"]),
        ({"initial_mode": "nearest"}, ["initial_mode", "nearest", "pixelshuffle"]),
        ({"channels": (4, 6, 8), "norm_num_groups": 4}, ["channels", "6", "norm_num_groups", "4"]),
        ({"channels": (), "attention_levels": (), "num_res_blocks": ()}, ["channels"]),
        ({"spatial_dims": 4}, ["spatial_dims", "4"]),
    ],
    ids=str,
)
def test_bad_arguments_are_named(arguments: dict, words: list[str]):
    with pytest.raises(ValueError) as error:
        build(**arguments)
    for word in words:
        assert any(alternative in str(error.value) for alternative in word.split("|")), str(error.value)


@pytest.mark.parametrize("call", ["forward", "encode", "latent_shape"])
def test_size_that_the_factor_does_not_divide_is_named(call: str):
    network = build(downsample_factors=[4, 2], initial_downsample_factor=2)
    argument = (32, 40, 32) if call == "latent_shape" else torch.rand(1, 1, 32, 40, 32)
    with pytest.raises(ValueError, match=r"axis 1 is 40.* 16 .*32 and 48 work\. Whole volumes of any size"):
        getattr(network, call)(argument)


# --- the reconstructor and its exports -------------------------------------------------------------------------------

EXPORT_CASES = [
    {"downsample_factors": [4, 2], "initial_downsample_factor": 2},
    {
        "downsample_factors": [[2, 2, 1], 2],
        "initial_downsample_factor": [2, 2, 1],
        "initial_mode": "pixelshuffle",
        "linear_shortcut": True,
    },
    {"use_convtranspose": True, "use_checkpoint": True},
    {"attention_levels": (False, False, True), "with_encoder_nonlocal_attn": True},
    {"with_decoder_nonlocal_attn": True, "use_flash_attention": True},
]


@pytest.mark.parametrize("shape", [(16, 16, 16), (19, 33, 8), (1, 1, 1)])
def test_reconstructor_takes_any_size(shape):
    network = build(Reconstructor, initial_downsample_factor=2, initial_mode="pixelshuffle", linear_shortcut=True)
    assert network(torch.rand(1, 1, *shape)).shape == (1, 1, *shape)


def test_reconstructor_has_the_weights_and_the_result_of_the_autoencoder():
    network = build(downsample_factors=[4, 2], linear_shortcut=True)
    reconstructor = build(Reconstructor, downsample_factors=[4, 2], linear_shortcut=True)
    reconstructor.load_state_dict(network.state_dict(), strict=True)
    image = image_for(network)
    assert torch.equal(reconstructor(image), network.decode(network.encode(image)[0]))


@pytest.mark.parametrize("case", EXPORT_CASES, ids=str)
def test_reconstructor_can_be_scripted_traced_and_exported(case: dict):
    network = build(Reconstructor, **case)
    example = image_for(network, 3)
    others = [torch.rand(1, 1, 2 * 16 + 5, 35, 41), image_for(network, 4)]
    auto = torch.export.Dim.AUTO
    with torch.no_grad():
        exports = {
            "script": torch.jit.script(network),
            "trace": torch.jit.trace(network, example),
            "export": torch.export.export(network, (example,), dynamic_shapes=({2: auto, 3: auto, 4: auto},)).module(),
        }
        for image in [example, *others]:
            expected = network(image)
            for name, exported in exports.items():
                assert torch.allclose(exported(image), expected, atol=1e-5), name
