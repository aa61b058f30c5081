from collections.abc import Callable

import pytest
import torch
from torch import nn

from samlite.models import count_in_short, mlp, parameter_count, resnet18, resnet50, tapered_mlp, vit
from samlite.models.resnet import Normalize, basic
from samlite.models.vit import HEADS, Attention


def test_an_mlp_alternates_linear_layers_and_relus_and_ends_linear() -> None:
    model = mlp(4, 3, 2)
    assert [type(layer) for layer in model] == [nn.Linear, nn.ReLU, nn.Linear]
    inputs = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    first, last = model[0], model[2]
    hidden = (inputs @ first.weight.T + first.bias).clamp(min=0)
    torch.testing.assert_close(model(inputs), hidden @ last.weight.T + last.bias)


@pytest.mark.parametrize(("width", "second"), [(1, 1), (8, 3), (150, 50), (300, 100)])
def test_the_tapered_mlp_narrows_to_a_third_but_never_to_nothing(width: int, second: int) -> None:
    assert [layer.out_features for layer in tapered_mlp(64, width, 10)[::2]] == [width, second, 10]


def test_a_tied_parameter_counts_once_and_a_frozen_one_not_at_all() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    model[2].requires_grad_(False)
    assert parameter_count(model) == 9 + 3 + 3


CHANNELS = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.1)}
SIZED = {"size": 32, **CHANNELS, "outputs": 10}


def photographs(n: int, size: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (n, 3, size, size), dtype=torch.uint8, generator=generator)


def test_images_are_normalised_a_channel_in_the_type_of_the_weights() -> None:
    images = photographs(50)
    for dtype in (torch.float32, torch.float64):
        result = Normalize((0.5, 0.4, 0.3), (0.2, 0.2, 0.1)).to(dtype)(images)
        expected = (images.permute(0, 2, 3, 1).to(dtype) / 255 - torch.tensor((0.5, 0.4, 0.3))) / torch.tensor(
            (0.2, 0.2, 0.1)
        )
        torch.testing.assert_close(result.permute(0, 2, 3, 1), expected.to(dtype), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("filters", "millions"), [(4, 0.0446), (16, 0.70), (64, 11.17), (256, 178.6)])
def test_a_resnet18_has_the_parameters_of_the_paper(filters: int, millions: float) -> None:
    with torch.device("meta"):
        count = parameter_count(resnet18(filters, outputs=10, **CHANNELS))
    assert count == pytest.approx(millions * 1e6, rel=0.02)


@pytest.mark.parametrize(("filters", "millions"), [(16, 2.0), (32, 6.9), (48, 14.8), (64, 25.6)])
def test_a_resnet50_has_the_parameters_of_the_paper(filters: int, millions: float) -> None:
    with torch.device("meta"):
        count = parameter_count(resnet50(filters, outputs=1000, **CHANNELS))
    assert count == pytest.approx(millions * 1e6, rel=0.02)


def test_a_resnet50_with_64_filters_is_the_published_network() -> None:
    with torch.device("meta"):
        model = resnet50(64, outputs=1000, **CHANNELS)
        assert parameter_count(model) == 25_557_032
        shapes: list[tuple[int, ...]] = []
        hooks = [each.register_forward_hook(lambda *args: shapes.append(tuple(args[2].shape))) for each in model]
        model.eval()(torch.zeros(2, 3, 224, 224, dtype=torch.uint8))
    assert len(hooks) == len(shapes)
    stages = list(dict.fromkeys(shape for shape in shapes if len(shape) == 4))
    assert stages[1:] == [  # behind the images
        (2, 64, 112, 112),
        (2, 64, 56, 56),
        (2, 256, 56, 56),
        (2, 512, 28, 28),
        (2, 1024, 14, 14),
        (2, 2048, 7, 7),
        (2, 2048, 1, 1),
    ]


def test_a_residual_block_adds_its_shortcut_and_projects_it_where_shapes_differ() -> None:
    same, wider = basic(4, 4, 1).eval(), basic(4, 8, 2).eval()
    inputs = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert isinstance(same.shortcut, nn.Identity)
    torch.testing.assert_close(same(inputs), (same.branch(inputs) + inputs).clamp(min=0))
    assert wider(inputs).shape == (2, 8, 4, 4)
    convolution, normalization = wider.shortcut
    strided = normalization(nn.functional.conv2d(inputs, convolution.weight, stride=2))
    torch.testing.assert_close(wider(inputs), (wider.branch(inputs) + strided).clamp(min=0))


@pytest.mark.parametrize("build", [resnet18, resnet50, vit])
def test_a_network_in_evaluation_mode_treats_every_image_alone(build: Callable[..., nn.Module]) -> None:
    model = build(4, **(SIZED if build is vit else {**CHANNELS, "outputs": 10})).eval()
    images = photographs(3)
    assert model(images).shape == (3, 10)
    torch.testing.assert_close(model(images)[1:2], model(images[1:2]), rtol=1e-4, atol=1e-4)


def test_attention_mixes_the_tokens_of_an_image_as_torch_does() -> None:
    attention = Attention(8, 0.0)
    torchs = nn.MultiheadAttention(8, HEADS, batch_first=True)
    torchs.load_state_dict(
        {
            "in_proj_weight": attention.inner.weight,
            "in_proj_bias": attention.inner.bias,
            "out_proj.weight": attention.outer.weight,
            "out_proj.bias": attention.outer.bias,
        }
    )
    tokens = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(attention(tokens), torchs(tokens, tokens, tokens)[0])


def test_a_vit_knows_where_its_patches_are() -> None:
    model = vit(8, **SIZED).eval()
    images = photographs(1)
    turned = images.flip(-1).unflatten(-1, (8, 4)).flip(-1).flatten(-2)  # whole patches change places
    assert not torch.allclose(model(images), model(turned))
    model[1].positions.data.zero_()
    torch.testing.assert_close(model(images), model(turned))


def test_a_vit_of_a_width_that_its_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="width must be a multiple of 4, the number of heads, got 30"):
        vit(30, **SIZED)


@pytest.mark.parametrize(
    ("count", "text"), [(587, "587"), (2563, "2.6k"), (14307, "14k"), (99841, "100k"), (5366010, "5.4M"), (3e9, "3.0B")]
)
def test_numbers_of_parameters_are_shortened(count: float, text: str) -> None:
    assert count_in_short(count) == text
