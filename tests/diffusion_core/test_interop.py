"""Checkpoints that denoising-diffusion-pytorch has written, against what it computed from them.

`fixtures/make_checkpoints.py` made the files. Outputs are of order 1.
"""

import lzma
import os
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from diffusion_core import Diffusion, UNet, UNetConfig, make_schedule
from diffusion_core.interop import ImportedModel, convert_unet, read_checkpoint
from diffusion_core.objectives import Objective, loss_weights

FIXTURES = Path(__file__).parent / "fixtures"
OUTPUT_TOLERANCE = 1e-5
LOSS_TOLERANCE = 1e-5

# case -> what has to be given, and what is to be found
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "2.3.4-images": ({}, {"schedule": "sigmoid", "objective": "pred_v", "weighting": "snr"}),
    "2.3.4-images-self-condition": (
        {},
        {"schedule": "trained_betas", "objective": "pred_x0", "weighting": "min_snr", "gamma": 4.0},
    ),
    "2.3.4-sequences": (
        {"heads": 2, "head_dim": 8},
        {"schedule": "cosine", "objective": "pred_noise", "weighting": "snr"},
    ),
    "1.11.1-images": (
        {"norm_groups": 4, "heads": 2},
        {"schedule": "linear", "objective": "pred_noise", "weighting": "min_snr", "gamma": 5.0},
    ),
    "1.11.1-sequences": (
        {"norm_groups": 2},
        {"schedule": "linear", "objective": "pred_v", "weighting": "snr"},
    ),
    "1.0.0-images": (
        {"norm_groups": 4, "objective": "pred_noise"},
        {"schedule": "cosine", "objective": "pred_noise", "weighting": "uniform"},
    ),
}


@pytest.fixture
def unpack(tmp_path: Path) -> Callable[[str], Path]:
    """Writes a case's checkpoint as the library saved it, changed where asked to."""

    def write(case: str, change: Callable[[dict], Any] | None = None) -> Path:
        path = tmp_path / "model-1.pt"
        path.write_bytes(lzma.decompress((FIXTURES / f"{case}.pt.xz").read_bytes()))
        if change is not None:
            content = torch.load(path, weights_only=True)
            changed = change(content)
            torch.save(content if changed is None else changed, path)
        return path

    return write


@pytest.fixture
def read(unpack: Callable[..., Path]) -> Callable[..., ImportedModel]:
    """Reads a case, changed where asked to, with what that case needs."""

    def read(case: str, change: Callable[[dict], Any] | None = None, **more: Any) -> ImportedModel:
        return read_checkpoint(unpack(case, change), **{**CASES[case][0], **more})

    return read


def load(config: UNetConfig, weights: dict[str, Tensor]) -> UNet:
    model = UNet(config).eval()
    model.load_state_dict(weights, strict=True)
    return model


@pytest.mark.parametrize("case", CASES)
def test_computes_what_the_library_computed(read: Callable[..., ImportedModel], case: str) -> None:
    imported, record = read(case), load_file(FIXTURES / f"{case}.safetensors")
    assert imported.ema_weights is not None
    raw, average = (
        load(imported.config, weights) for weights in (imported.weights, imported.ema_weights)
    )
    inputs = [record["x_t"], record["t"]]
    if imported.config.self_condition:
        inputs.append(record["x_self_cond"])
    with torch.no_grad():
        assert (raw(*inputs) - record["raw"]).abs().max() < OUTPUT_TOLERANCE
        assert (average(*inputs) - record["ema"]).abs().max() < OUTPUT_TOLERANCE
        diffusion = Diffusion(
            imported.schedule, imported.objective, imported.weighting, imported.gamma
        )
        loss = diffusion.loss(raw, record["x_start"], t=record["t"], noise=record["noise"])
    assert torch.allclose(loss, record["loss"], rtol=LOSS_TOLERANCE, atol=0)
    assert (record["raw"] - record["ema"]).abs().max() > 0.01  # the two are told apart


@pytest.mark.parametrize("case", CASES)
def test_reads_the_settings(read: Callable[..., ImportedModel], case: str) -> None:
    imported = read(case)
    found = {
        "schedule": imported.schedule.name,
        "objective": imported.objective,
        "weighting": imported.weighting,
        "gamma": imported.gamma,
    }
    assert found == {"gamma": 5.0, **CASES[case][1]}
    assert imported.library_version == case.split("-")[0]
    assert imported.global_step == 3
    assert imported.config.is_sequence == ("sequences" in case)


def test_reads_the_network(read: Callable[..., ImportedModel]) -> None:
    assert read("2.3.4-images-self-condition").config == UNetConfig(
        channels=1, dim=4, dim_mults=(1, 2), attention=("full", "linear"), heads=2, head_dim=4,
        norm="rms", memory_kv=4, self_condition=True, init_dim=6,
    )  # fmt: skip
    assert read("2.3.4-sequences").config == UNetConfig(
        dim=4, dim_mults=(1, 2), attention=("linear", "linear"), heads=(4, 4, 2),
        head_dim=(32, 32, 8), norm="rms", is_sequence=True, downsample="strided",
    )  # fmt: skip
    assert read("2.3.4-images").config.heads == (2, 4)
    assert read("1.0.0-images", dropout=0.2).config == UNetConfig(
        dim=4, dim_mults=(1, 2), attention=("linear", "linear"), norm_groups=4, dropout=0.2,
        has_old_layout=True,
    )  # fmt: skip


def test_a_schedule_of_ours_is_exact(read: Callable[..., ImportedModel]) -> None:
    schedule = read("2.3.4-images").schedule
    assert torch.equal(schedule.signal_scale, make_schedule("sigmoid", 1000).signal_scale)


def test_without_a_moving_average(read: Callable[..., ImportedModel]) -> None:
    assert read("2.3.4-images", lambda content: content.pop("ema") and None).ema_weights is None


def test_the_layout_goes_by_the_version(read: Callable[..., ImportedModel]) -> None:
    def forget(content: dict) -> None:
        del content["version"]

    with pytest.raises(
        ValueError, match=r"differently before 1.7 and after\. Give library_version"
    ):
        read("1.0.0-images", forget)
    assert read("1.0.0-images", forget, library_version="1.6.4").config.has_old_layout
    assert not read("1.0.0-images", forget, library_version="1.7.4").config.has_old_layout
    assert read("1.0.0-images", forget, has_old_layout=True).library_version is None
    assert not read("1.11.1-sequences", library_version="1.7.3").config.has_old_layout
    for version, message in (
        ("1.7.0", "1.7.0 had formulas that no other version has"),
        ("1.7.3", "1.7.3 had formulas"),
        ("0.30.0", "from 0.31.0 on, got 0.30.0"),
        ("old", "must be three numbers, got 'old'"),
    ):
        with pytest.raises(ValueError, match=message):
            read("1.0.0-images", library_version=version)


@pytest.mark.parametrize(
    ("name", "objective", "gamma"),
    list(
        product(("sigmoid", "trained_betas"), ("pred_noise", "pred_x0", "pred_v"), (None, 1.0, 5.0))
    ),
)
def test_tells_objectives_by_the_weights_of_the_loss(
    read: Callable[..., ImportedModel], name: str, objective: Objective, gamma: float | None
) -> None:
    exact = make_schedule("cosine", 60, s=0.02) if name == "trained_betas" else (
        make_schedule(name, 60)
    )  # fmt: skip

    def change(content: dict) -> None:
        weights = loss_weights(exact, objective, "min_snr" if gamma else "snr", gamma or 5.0)
        content["model"].update(betas=exact.betas.float(), loss_weight=weights.float())

    imported = read("2.3.4-images", change)
    assert imported.schedule.name == name
    assert (imported.objective, imported.gamma) == (objective, gamma or 5.0)
    assert imported.weighting == ("min_snr" if gamma else "snr")
    assert torch.allclose(imported.schedule.signal_scale, exact.signal_scale, rtol=1e-4)


def test_few_steps_keep_their_betas(read: Callable[..., ImportedModel]) -> None:
    def change(content: dict) -> None:
        content["model"].update(betas=torch.tensor([0.3, 0.6, 0.99]), loss_weight=torch.ones(3))

    assert read("2.3.4-images", change).schedule.name == "trained_betas"


@pytest.mark.parametrize(
    ("case", "given", "message"),
    [
        ("1.0.0-images", {"objective": None}, "Give objective; pred_noise was the default"),
        ("2.3.4-images", {"objective": "pred_x0"}, "belong to none of pred_x0"),
        ("2.3.4-images", {"objective": "pred_nois"}, "must be one of pred_noise"),
        ("2.3.4-sequences", {"heads": None, "head_dim": None}, "16 channels in all.*Give heads"),
        ("2.3.4-sequences", {"heads": 3}, "not 3 heads of 8"),
        ("2.3.4-images", {"heads": 4, "head_dim": 4}, "32 channels in all, .* not 4 heads of 4"),
        (
            "2.3.4-images-self-condition",
            {"heads": 4, "head_dim": 2},
            r"attention.memory \(2, 2, 4, 4\), which is to be \(2, 4, 4, 2\)",
        ),
        ("2.3.4-images", {"channels": 1}, "takes 3 and gives 3 channels"),
        ("2.3.4-images", {"dim_mults": (1, 3)}, "settings: downs.1"),
        ("2.3.4-images", {"depth": 3}, "UNetConfig has no depth. Give some of attention"),
        ("1.11.1-images", {"norm_groups": 8}, "divisible by model.norm_groups"),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_refuses_what_does_not_fit(
    read: Callable[..., ImportedModel], case: str, given: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read(case, **given)


def drop(name: str) -> Callable[[dict], None]:
    def change(content: dict) -> None:
        del content["model"][name]

    return change


def rename_ema(content: dict) -> None:
    content["ema"] = {f"shadow.{name}": value for name, value in content["ema"].items()}


def double_p2(content: dict) -> None:
    content["model"]["p2_loss_weight"] *= 2


def replace_loss_weight(content: dict) -> None:
    content["model"]["loss_weight"] = torch.linspace(1, 2, 1000)


def widen_output(content: dict) -> None:
    model = content["model"]
    model["model.final_conv.weight"] = torch.zeros(5, 4, 1, 1)


def add_classes(content: dict) -> None:
    content["model"]["model.classes_mlp.0.weight"] = torch.zeros(1)


def add_fourier_features(content: dict) -> None:
    content["model"]["model.time_mlp.0.weights"] = torch.zeros(8)


class Code:
    """Unpickling it would run code."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("reached",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: torch.zeros(3), "no checkpoint of .*got Tensor. Give a model-"),
        (lambda content: {"state": 1}, r"which has 'step' and 'model': got \['state'\]"),
        (lambda content: {"step": 1, "model": Code()}, "no checkpoint that can be read safely"),
        (lambda content: {**content, "model": {}}, "holds no GaussianDiffusion"),
        (drop("model.init_conv.weight"), "'init_conv"),
        (drop("model.init_conv.bias"), "init_conv.bias"),
        (drop("loss_weight"), "has no 'loss_weight'"),
        (replace_loss_weight, "weights of the loss belong to none of pred_noise, pred_x0, pred_v"),
        (rename_ema, "moving average in a form of its own"),
        (lambda content: {**content, "ema": torch.zeros(1)}, "moving average in a form of its own"),
        (widen_output, "takes 3 and gives 5 channels"),
        (add_classes, "classes_mlp"),
        (add_fourier_features, "Give time_features='learned' or 'random'"),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_refuses_what_is_no_checkpoint(
    read: Callable[..., ImportedModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        read("2.3.4-images", change)
    assert not (tmp_path / "reached").exists()


def test_refuses_p2_weights(read: Callable[..., ImportedModel]) -> None:
    with pytest.raises(ValueError, match="P2 weights, which are not built"):
        read("1.0.0-images", double_p2)


@pytest.mark.parametrize("kept", [0, 100, 50_000])
def test_refuses_a_truncated_file(unpack: Callable[..., Path], kept: int) -> None:
    path = unpack("2.3.4-images")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model-1.pt' is no checkpoint that can be read safely"):
        read_checkpoint(path)
    with pytest.raises(FileNotFoundError):
        read_checkpoint(path.with_name("absent.pt"))


@pytest.mark.usefixtures("unchecked_types")
def test_refuses_a_state_dict_of_something_else() -> None:
    with pytest.raises(ValueError, match="A state dict holds tensors alone"):
        convert_unet({"step": 1})  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"no U-Net of .*no weight 'init_conv.weight'"):
        convert_unet(torch.nn.Linear(2, 2).state_dict())
