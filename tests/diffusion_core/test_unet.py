import pytest
import torch

from diffusion_core import UNet, UNetConfig

SMALL = UNetConfig(
    channels=3, dim=8, dim_mults=(1, 2, 2), attention=("none", "full", "none"), heads=2,
    head_dim=4, norm_groups=4,
)  # fmt: skip


def test_keeps_the_shape_and_depends_on_the_timestep() -> None:
    torch.manual_seed(0)
    model = UNet(SMALL).eval()
    torch.nn.init.normal_(model.final_conv.weight)
    x, t = torch.randn(2, 3, 8, 12), torch.tensor([0, 999])
    early, late = model(x, t[:1].expand(2)), model(x, t[1:].expand(2))
    assert early.shape == x.shape
    assert not torch.allclose(early, late)


def test_starts_from_zero() -> None:
    output = UNet(SMALL)(torch.randn(1, 3, 8, 8), torch.tensor([5]))
    assert float(output.detach().abs().max()) == 0


def test_channels_last_gives_the_same() -> None:
    torch.manual_seed(0)
    model = UNet(SMALL).eval()
    torch.nn.init.normal_(model.final_conv.weight)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 4])
    plain = model(x, t)
    other = model.to(memory_format=torch.channels_last)(  # pyright: ignore[reportCallIssue]
        x.contiguous(memory_format=torch.channels_last), t
    )
    assert torch.allclose(plain, other, atol=1e-5)


def test_refuses_sides_it_cannot_halve_and_names_the_divisor() -> None:
    with pytest.raises(ValueError, match="divisible by 4 for 3 levels, got"):
        UNet(SMALL)(torch.zeros(1, 3, 8, 10), torch.tensor([0]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": ("none",)}, "one kind for each of the 3 levels"),
        ({"attention": ("none", "ful", "none")}, "must hold none or full"),
        ({"dim": 10}, "divisible by model.norm_groups"),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_refuses_an_incoherent_config(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UNetConfig(**{"dim_mults": (1, 2, 2), "attention": ("none",) * 3, **changes})
