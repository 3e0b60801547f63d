"""A user's own extractor: kept with its weights, and told what is wrong with it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.errors import ConfigError, EvaluationError
from pipeline.extractors import extract, load_extractor
from pipeline.extractors.own import make_own
from pipeline.storage import LocalStorage

Write = Callable[[str], str]
Keep = Callable[[dict[str, Any]], dict[str, Any]]
IMAGE, SEQUENCE = (1, 8, 8), (2, 5)
LINEAR = """
class Flat(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.dropout, self.linear = nn.Dropout(), nn.Linear(size, 3)

    def forward(self, x):
        return self.linear(self.dropout(x.float().flatten(1)))

def make():
    return Flat(64)

def make_for_sequences():
    return Flat(10)
"""


@pytest.mark.parametrize(("factory", "shape"), [("make", IMAGE), ("make_for_sequences", SEQUENCE)])
def test_what_it_draws_at_first_is_what_it_has_ever_after(
    write_module: Write, keep_extractor: Keep, tmp_path: Path, factory: str, shape: tuple[int, ...]
) -> None:
    name = f"{write_module(LINEAR)}:{factory}"
    facts = make_own(name, shape, None, None, seed=5)
    assert facts["num_features"] == 3
    assert facts["num_classes"] is None
    assert not facts["classifies"]
    assert facts == make_own(name, shape, 3, None, seed=5)
    assert facts["weights"] != make_own(name, shape, None, None, seed=6)["weights"]
    extractor = load_extractor(LocalStorage(str(tmp_path)), keep_extractor(facts))
    rng = np.random.default_rng(0)
    items = rng.integers(0, 256, (300, *shape)).astype(np.uint8 if len(shape) == 3 else np.float32)
    found = extract(extractor, items)
    assert (found.shape, found.dtype) == ((300, 3), np.float32)
    assert np.array_equal(found, extract(extractor, items))  # without dropout
    state = extractor.network.state_dict()
    flat = items.reshape(300, -1).astype(np.float32)
    expected = flat @ state["linear.weight"].numpy().T + state["linear.bias"].numpy()
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-3)


def test_other_code_than_that_of_the_features_is_refused(
    write_module: Write, keep_extractor: Keep, tmp_path: Path
) -> None:
    name = f"{write_module(LINEAR)}:make"
    manifest = keep_extractor(make_own(name, IMAGE, None, None, seed=0))
    write_module(LINEAR.replace("return self.linear", "return 2 * self.linear"))
    with pytest.raises(EvaluationError, match="its file has changed, or differs between nodes"):
        load_extractor(LocalStorage(str(tmp_path)), manifest)


def test_weights_from_a_file_take_the_place_of_those_drawn(
    write_module: Write, tmp_path: Path
) -> None:
    name = f"{write_module(LINEAR)}:make"
    state = {"linear.weight": torch.ones(3, 64), "linear.bias": torch.zeros(3)}
    torch.save(state, tmp_path / "w.pth")
    content = (tmp_path / "w.pth").read_bytes()
    found = [make_own(name, IMAGE, None, content, seed)["weights"] for seed in (0, 1)]
    assert found[0] == found[1]
    torch.save({"linear.weight": torch.ones(3, 64)}, tmp_path / "w.pth")
    with pytest.raises(EvaluationError, match=r"do not fit the extractor .*linear\.bias"):
        make_own(name, IMAGE, None, (tmp_path / "w.pth").read_bytes(), seed=0)
    for damaged in (b"", b"no weights", 8 * b"\0" + b"{", content[: len(content) // 2]):
        with pytest.raises(EvaluationError, match=r"features\.weights cannot be read as weights"):
            make_own(name, IMAGE, None, damaged, seed=0)


def test_a_file_of_weights_runs_no_code(write_module: Write, tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> Any:
            return Path(tmp_path / "harm").touch, ()

    torch.save({"linear.weight": Harmful()}, tmp_path / "w.pth")
    with pytest.raises(EvaluationError, match="cannot be read as weights"):
        make_own(
            f"{write_module(LINEAR)}:make", IMAGE, None, (tmp_path / "w.pth").read_bytes(), seed=0
        )
    assert not (tmp_path / "harm").exists()


def test_shared_weights_and_none_at_all_are_kept(
    write_module: Write, keep_extractor: Keep, tmp_path: Path
) -> None:
    tied = """
def make():
    first, second = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
    second.weight = first.weight
    return nn.Sequential(Floats(), first, second)

class Floats(nn.Module):
    def forward(self, x):
        return x.float().flatten(1)

def make_bare():
    return Floats()
"""
    name = write_module(tied)
    facts = make_own(f"{name}:make", IMAGE, None, None, seed=0)
    extractor = load_extractor(LocalStorage(str(tmp_path)), keep_extractor(facts))
    items = np.ones((2, *IMAGE), np.uint8)
    weight = next(iter(extractor.network.state_dict().values())).numpy()
    assert extract(extractor, items)[0] == pytest.approx(weight @ weight.sum(1), rel=1e-3, abs=1e-4)
    assert make_own(f"{name}:make_bare", IMAGE, None, None, seed=0)["num_features"] == 64


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def make():\n    raise OSError('no disk')\n", "cannot be made: OSError: no disk"),
        ("def other():\n    pass\n", "cannot be made: AttributeError"),
        ("raise ValueError('at import')\n", "cannot be made: ValueError: at import"),
        ("def make():\n    return 3\n", "is a int. Have make"),
        ("def make():\n    return nn.Linear(5, 3)\n", "fails on torch.uint8 .2, 1, 8, 8.: "),
        ("def make():\n    return nn.Flatten(0)\n", r"returns \(128,\) for 2 items"),
        ("def make():\n    return nn.Identity()\n", r"returns \(2, 1, 8, 8\) for 2 items"),
        (
            "def make():\n    net = nn.Flatten()\n    net.num_features = 5\n    return net\n",
            r"returns \(2, 64\) for 2 items, and its num_features is 5",
        ),
    ],
)
def test_what_is_wrong_with_it_is_said(write_module: Write, body: str, message: str) -> None:
    name = f"{write_module(body)}:make"
    with pytest.raises(EvaluationError, match=f"The extractor {name} {message}"):
        make_own(name, IMAGE, None, None, seed=0)


def test_another_width_than_that_of_the_config_is_refused(write_module: Write) -> None:
    with pytest.raises(EvaluationError, match=r"returns 3 features, and features\.width is 4"):
        make_own(f"{write_module(LINEAR)}:make", IMAGE, 4, None, seed=0)


def test_a_state_that_is_no_tensor_is_refused(write_module: Write) -> None:
    body = """
class Odd(nn.Flatten):
    def get_extra_state(self):
        return {"a": 1}

def make():
    return Odd()
"""
    with pytest.raises(EvaluationError, match="_extra_state in its state_dict, which is no tensor"):
        make_own(f"{write_module(body)}:make", IMAGE, None, None, seed=0)


def test_code_that_is_gone_is_a_fault_of_the_config(
    write_module: Write, keep_extractor: Keep, tmp_path: Path
) -> None:
    name = write_module(LINEAR)
    manifest = keep_extractor(make_own(f"{name}:make", IMAGE, None, None, seed=0))
    (tmp_path / "code" / f"{name}.py").unlink()
    with pytest.raises(ConfigError, match=f"needs a module {name}, and there is none"):
        load_extractor(LocalStorage(str(tmp_path)), manifest)
