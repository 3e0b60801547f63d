"""In which type a network computes, by setting and device."""

import pytest
import torch

from pipeline.errors import ConfigError
from pipeline.host import full_precision
from pipeline.precision import choose_dtype, gather_environment
from pipeline.settings import TrainConfig


@pytest.mark.parametrize(
    ("precision", "device", "has_bf16", "expected"),
    [
        ("auto", "cpu", True, torch.float32),
        ("auto", "cuda", True, torch.bfloat16),
        ("auto", "cuda", False, torch.float32),
        ("fp32", "cuda", True, torch.float32),
        ("bf16", "cpu", False, torch.bfloat16),
        ("bf16", "cuda", True, torch.bfloat16),
        ("fp16", "cuda", False, torch.float16),
    ],
)
def test_the_type_is_that_of_the_setting_and_by_itself_the_fastest_safe_one(
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    device: str,
    has_bf16: bool,
    expected: torch.dtype,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: has_bf16)
    config = TrainConfig(precision=precision)  # pyright: ignore[reportArgumentType]
    assert choose_dtype(config, torch.device(device)) == expected


def test_scores_leave_what_is_recorded_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "H200")
    before = gather_environment(torch.device("cuda"), 1, {})
    assert (before["tf32"], before["tf32_products"]) == (True, False)  # torch's default
    with full_precision():
        inside = gather_environment(torch.device("cuda"), 1, {})
    assert (inside["tf32"], inside["tf32_products"]) == (False, False)
    assert gather_environment(torch.device("cuda"), 1, {}) == before


def test_bf16_is_refused_on_a_gpu_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    with pytest.raises(ConfigError, match=r'Tesla T4 has no bf16. Use "fp16" or "auto"'):
        choose_dtype(TrainConfig(precision="bf16"), torch.device("cuda"))
