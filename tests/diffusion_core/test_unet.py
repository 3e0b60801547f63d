"""The U-Net as a whole: shapes, conditions, layouts, refusals. Parts have tests of their own."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from diffusion_core import UNet, UNetConfig
from diffusion_core.unet import BlockNorm, TimeEmbedding

SMALL = UNetConfig(
    channels=3, dim=8, dim_mults=(1, 2, 2), attention=("none", "linear", "full"), heads=2,
    head_dim=4, norm_groups=4,
)  # fmt: skip
SEQUENCE = replace(SMALL, is_sequence=True, downsample="strided", norm="rms")


def make(config: UNetConfig) -> UNet:
    """A network whose output is not 0, as it is at the start."""
    torch.manual_seed(0)
    model = UNet(config).eval()
    torch.nn.init.normal_(model.final_conv.weight)
    return model


def draw(config: UNetConfig, batch: int = 2) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    sides = (16,) if config.is_sequence else (8, 12)
    return torch.randn(batch, config.channels, *sides), torch.arange(batch) * 7 + 3


CONFIGS = {
    "small": SMALL,
    "sequence": SEQUENCE,
    "sequence of unshuffled pairs": replace(SEQUENCE, downsample="unshuffle"),
    "rms with memory": replace(SMALL, norm="rms", memory_kv=4),
    "strided": replace(SMALL, downsample="strided"),
    "learned features": replace(SMALL, time_features="learned"),
    "random features": replace(SMALL, time_features="random", time_features_dim=6),
    "of its own at each level": replace(
        SMALL, heads=(1, 2, 3, 4), head_dim=(8, 4, 2, 6), init_dim=12
    ),
    "old layout": replace(SMALL, has_old_layout=True),
    "conditions": replace(SMALL, self_condition=True, num_classes=5),
    "learned variance": replace(SMALL, learned_variance=True),
    "one level": replace(SMALL, dim_mults=(1,), attention=("full",)),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_keeps_the_shape_and_learns_in_every_part(name: str) -> None:
    config = CONFIGS[name]
    model = make(config)
    x, t = draw(config)
    output = model(x, t)
    channels = config.channels * (2 if config.learned_variance else 1)
    assert output.shape == (2, channels, *x.shape[2:])
    (output * torch.randn_like(output)).sum().backward()
    idle = [
        parameter_name
        for parameter_name, p in model.named_parameters()
        if p.grad is None or not bool(p.grad.any())
    ]
    assert idle == []


@pytest.mark.parametrize("name", CONFIGS)
def test_each_sample_is_on_its_own_and_inference_is_the_same(name: str) -> None:
    config = CONFIGS[name]
    model = make(config)
    x, t = draw(config, batch=3)
    together = model(x, t)
    with torch.inference_mode():
        assert torch.allclose(model(x, t), together, atol=1e-5)
        assert torch.allclose(model(x[1:2], t[1:2]), together[1:2], atol=1e-5)


def test_depends_on_the_timestep_and_embeds_an_expanded_one_once() -> None:
    model = make(SMALL)
    x, _ = draw(SMALL)
    early, late = (model(x, torch.full((2,), t)) for t in (0, 999))
    assert not torch.allclose(early, late)
    seen = []
    model.time_embedding.register_forward_hook(lambda *_: seen.append(_[2].shape[0]))
    assert torch.allclose(model(x, torch.tensor([999]).expand(2)), late, atol=1e-5)
    assert seen == [1]


def test_conditions_are_heard() -> None:
    model = make(CONFIGS["conditions"])
    x, t = draw(SMALL)
    plain = model(x, t)
    assert torch.equal(model(x, t, torch.zeros_like(x)), plain)
    assert torch.equal(model(x, t, class_labels=torch.full_like(t, 5)), plain)  # the null label
    assert not torch.allclose(model(x, t, torch.ones_like(x)), plain)
    labels = torch.tensor([1, 5])
    labelled = model(x, t, class_labels=labels)
    assert not torch.allclose(labelled[0], plain[0])
    assert torch.allclose(labelled[1], plain[1], atol=1e-5)
    assert torch.allclose(
        model(x, torch.tensor([3]).expand(2), class_labels=labels),
        model(x, torch.tensor([3, 3]), class_labels=labels),
        atol=1e-5,
    )


def test_starts_from_zero() -> None:
    output = UNet(SMALL)(torch.randn(1, 3, 8, 8), torch.tensor([5]))
    assert float(output.detach().abs().max()) == 0


def test_dropout_acts_in_training_only() -> None:
    model = make(replace(SMALL, dropout=0.5))
    x, t = draw(SMALL)
    assert torch.equal(model(x, t), model(x, t))
    model.train()
    assert not torch.allclose(model(x, t), model(x, t))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided", "expanded"])
def test_the_layout_of_the_input_does_not_matter(layout: str) -> None:
    model = make(SMALL)
    x, t = draw(SMALL)
    plain = model(x, t)
    other = {
        "contiguous": x.contiguous(),
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "strided": x.repeat_interleave(2, dim=3)[..., ::2],
        "expanded": x[:1].expand(2, -1, -1, -1),
    }[layout]
    got = model(other, t)
    assert torch.allclose(got[0], plain[0], atol=1e-5)


def test_weights_survive_a_copy_and_a_round_trip_through_plain_layout() -> None:
    model = make(SMALL)
    x, t = draw(SMALL)
    plain = model(x, t)
    assert torch.equal(copy.deepcopy(model)(x, t), plain)
    fresh = UNet(SMALL).eval()
    fresh.load_state_dict({k: v.contiguous() for k, v in model.state_dict().items()})
    assert torch.equal(fresh(x, t), plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_runs_in_other_precisions(dtype: torch.dtype) -> None:
    model = make(SMALL)
    x, t = draw(SMALL)
    plain = model(x, t)
    got = model.to(dtype)(x.to(dtype), t)
    assert got.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float64 else 0.05 * float(plain.detach().abs().max())
    assert float((got.double() - plain.double()).detach().abs().max()) < tolerance


@pytest.mark.parametrize("norm", ["group", "rms"])
def test_trains_under_autocast(norm: BlockNorm) -> None:
    model = make(replace(SMALL, norm=norm, memory_kv=2))
    x, t = draw(SMALL)
    gradients, outputs = [], []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = model(x, t)
        output.float().square().mean().backward()
        outputs.append(output.detach().float())
        gradients.append(
            torch.cat([p.grad.flatten() for p in model.parameters()])  # pyright: ignore
        )
    assert gradients[1].dtype == torch.float32
    for ours, exact in ((outputs[1], outputs[0]), (gradients[1], gradients[0])):
        assert float((ours - exact).norm()) < 0.05 * float(exact.norm())


def test_refuses_sides_it_cannot_halve_and_names_the_divisor() -> None:
    with pytest.raises(ValueError, match=r"divisible by 4 for 3 levels, got \(8, 10\)"):
        UNet(SMALL)(torch.zeros(1, 3, 8, 10), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"divisible by 4 for 3 levels, got \(15,\)"):
        UNet(SEQUENCE)(torch.zeros(1, 3, 15), torch.tensor([0]))


def test_refuses_what_it_was_not_made_for() -> None:
    t = torch.tensor([0])
    with pytest.raises(ValueError, match=r"takes \[batch, 3, length\], got \[1, 3, 8, 8\]"):
        UNet(SEQUENCE)(torch.zeros(1, 3, 8, 8), t)
    with pytest.raises(ValueError, match=r"takes \[batch, 3, height, width\], got \[1, 1, 8, 8\]"):
        UNet(SMALL)(torch.zeros(1, 1, 8, 8), t)
    with pytest.raises(ValueError, match="takes no guess of the clean data"):
        UNet(SMALL)(torch.zeros(1, 3, 8, 8), t, torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"was given labels\. Set UNetConfig\.num_classes"):
        UNet(SMALL)(torch.zeros(1, 3, 8, 8), t, class_labels=t)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": ("none",)}, "attention must name one for each of the 3 levels"),
        ({"heads": (1, 2)}, "heads must name one for each of the 3 levels"),
        ({"attention": ("none", "ful", "none")}, "must be of none, linear, full, got ful, none"),
        ({"norm": "batch"}, "must be of group, rms, got batch"),
        ({"dim": 10}, "divisible by model.norm_groups"),
        ({"init_dim": 12}, "UNetConfig.init_dim must be divisible by norm_groups"),
        ({"heads": 0}, "must be 1 or more"),
        ({"dim_mults": (), "attention": ()}, "must be 1 or more"),
        ({"time_features_dim": 3}, "UNetConfig.time_features_dim must be even"),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_refuses_an_incoherent_config(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UNetConfig(**{"dim_mults": (1, 2, 2), "attention": ("none",) * 3, **changes})


def test_the_longest_wave_of_the_timestep_is_as_long_as_asked_for() -> None:
    embedding = TimeEmbedding(UNetConfig(dim=8, time_theta=50.0))
    as_they_are = nn.Linear(8, 8, bias=False)
    nn.init.eye_(as_they_are.weight)
    embedding.mlp = nn.Sequential(as_they_are)
    found = embedding(torch.tensor([7, 40]), None)
    for t, row in zip((7, 40), found.tolist(), strict=True):
        assert (row[0], row[3]) == pytest.approx((math.sin(t), math.sin(t / 50)), abs=1e-5)
        assert (row[4], row[7]) == pytest.approx((math.cos(t), math.cos(t / 50)), abs=1e-5)
