"""Models made elsewhere: copied by content, refused where they do not suit the data set."""

import contextlib
import json
import lzma
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import driver
from pipeline.config import load_config
from pipeline.driver import make_plan, run_config
from pipeline.errors import DataError, TrainingError
from pipeline.exchange import import_checkpoint, load_model_folder
from pipeline.garbage import collect_garbage
from pipeline.settings import Config
from pipeline.steps import make_steps
from pipeline.storage import LocalStorage
from pipeline.subject_kinds import GivenImages, GivenModel
from pipeline.subjects import Source, import_model, load_network, sampling_of
from pipeline.workflow import StepContext, plan

FIXTURES = Path(__file__).resolve().parent.parent / "diffusion_core" / "fixtures"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A real one of denoising-diffusion-pytorch, of RGB images."""
    path = tmp_path / "model-1.pt"
    path.write_bytes(lzma.decompress((FIXTURES / "2.3.4-images.pt.xz").read_bytes()))
    return path


def config_of(tiny_config: Path, *settings: str) -> Config:
    return load_config(tiny_config, ["evaluate.num_steps=4", *settings])


def test_a_checkpoint_is_found_again_by_its_content(
    checkpoint: Path, tiny_config: Path, tmp_path: Path
) -> None:
    storage, config = LocalStorage(str(tmp_path / "root")), config_of(tiny_config, "data.mode=RGB")
    found = import_model(checkpoint, config, storage)
    assert import_model(checkpoint, config, storage) == found
    network = load_network(storage, config, Source("model", key=found.key))
    import_checkpoint(checkpoint, tmp_path / "folder")
    model, diffusion = load_model_folder(tmp_path / "folder")
    assert import_model(tmp_path / "folder", config, storage) == found
    for name, weight in model.state_dict().items():
        assert torch.equal(network.model.state_dict()[name], weight), name
    assert torch.equal(network.diffusion.schedule.snr, diffusion.schedule.snr)
    assert (network.diffusion.objective, network.counts) == (diffusion.objective, None)


def test_it_is_evaluated_without_training_and_under_a_key_of_its_own(
    checkpoint: Path, tiny_config: Path, tmp_path: Path
) -> None:
    config = config_of(tiny_config, "data.mode=RGB", f"storage.root={tmp_path / 'root'}")
    plans = [
        make_plan(config, ["evaluate"], subject=subject).steps
        for subject in (None, GivenModel("a"), GivenModel("b"))
    ]
    names = [[p.step.name for p in steps] for steps in plans]
    assert names[1] == names[2] == ["preprocess", "features", "reference", "evaluate"]
    assert "train" in names[0]
    assert len({steps[-1].key for steps in plans}) == 3


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ([], "it makes images of 3 channels, and the data set has images of 1 channel"),
        (
            [
                "data.mode=RGB",
                "data.resolution=7",
                "model.dim_mults=[1]",
                'model.attention=["none"]',
            ],
            "its network needs sizes divisible by 2, and the data set has (3, 7, 7)",
        ),
        (
            ["data.mode=RGB", "diffusion.num_train_timesteps=2000", "evaluate.num_steps=1500"],
            "fewer than evaluate.num_steps = 1500",
        ),
    ],
)
def test_one_that_does_not_suit_the_data_set_is_refused(
    checkpoint: Path, tiny_config: Path, tmp_path: Path, settings: list[str], fault: str
) -> None:
    config, storage = config_of(tiny_config, *settings), LocalStorage(str(tmp_path / "root"))
    with pytest.raises(DataError) as caught:
        import_model(checkpoint, config, storage)
    assert str(caught.value).startswith("model-1.pt cannot be evaluated with this config: ")
    assert fault in str(caught.value)
    assert storage.list("models-elsewhere") == []


def test_a_folder_without_a_model_is_refused(tiny_config: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty is no model folder") as caught:
        import_model(tmp_path / "empty", config_of(tiny_config), LocalStorage(str(tmp_path / "r")))
    remedy = "`export` has written, or another library's checkpoint (.pt)."
    assert str(caught.value).endswith(remedy)  # a config or a name is not taken


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 cut short"])
def test_a_damaged_checkpoint_is_refused(tiny_config: Path, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"model\.pt"):
        import_model(path, config_of(tiny_config), LocalStorage(str(tmp_path / "root")))


def test_one_that_takes_options_to_read_is_to_be_imported_first(
    checkpoint: Path, tiny_config: Path, tmp_path: Path
) -> None:
    content = torch.load(checkpoint, weights_only=True)
    for weights in (content["model"], content["ema"]):  # as before 1.5: the objective is nowhere
        for name in [name for name in weights if name.endswith("loss_weight")]:
            old = name.replace("loss_weight", "p2_loss_weight")
            weights[old] = torch.ones_like(weights.pop(name))
    torch.save(content, checkpoint)
    fault = r"Give objective; .* `raydiffusion import .*model-1\.pt --output FOLDER` reads"
    storage, config = LocalStorage(str(tmp_path / "root")), config_of(tiny_config, "data.mode=RGB")
    with pytest.raises(DataError, match=fault):
        import_model(checkpoint, config, storage)


def test_a_copy_that_is_damaged_is_said(
    checkpoint: Path, tiny_config: Path, tmp_path: Path
) -> None:
    storage, config = LocalStorage(str(tmp_path / "root")), config_of(tiny_config, "data.mode=RGB")
    key = import_model(checkpoint, config, storage).key
    path = tmp_path / "root" / "models-elsewhere" / key / "model.json"
    document = json.loads(path.read_text())
    document["unet"]["dim"] *= 2
    path.write_text(json.dumps(document))
    with pytest.raises(DataError, match="is damaged: its weights are not of the network"):
        load_network(storage, config, Source("model", key=key))


@pytest.mark.parametrize("converts", [False, True])
def test_images_that_were_converted_are_scored_by_a_protocol_of_their_own(
    tiny_config: Path, tmp_path: Path, converts: bool
) -> None:
    config = config_of(tiny_config)
    steps = make_steps(config, [], subject=GivenImages(("x",), (), converts))
    planned = {p.step.name: p for p in plan(steps, LocalStorage(str(tmp_path)))}
    context = StepContext(
        config, LocalStorage(str(tmp_path)), planned["evaluate"], {"images": {}}, lambda event: None
    )
    assert sampling_of(context)["converts"] is converts
    assert ("converts" in planned["evaluate"].step.settings) is converts


def test_a_copy_that_a_clean_up_took_before_the_run_began_is_made_again(
    checkpoint: Path, tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tiny_config, "data.mode=RGB", f"storage.root={tmp_path / 'root'}")
    storage = LocalStorage(config.storage.root)
    subject = import_model(checkpoint, config, storage)
    storage.delete("models-elsewhere")

    def begin(*_: Any, **__: Any) -> None:
        collect_garbage(storage, grace_s=-10.0)  # which the run's record tells that it is needed
        assert load_network(storage, config, Source("model", key=subject.key)).counts is None
        raise TrainingError("Enough. Stop.")

    monkeypatch.setattr(driver, "before_ray", lambda *_, **__: [])
    monkeypatch.setattr(driver, "_capacity", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(driver, "execute", begin)
    with pytest.raises(TrainingError):
        run_config(config, ("report",), subject=subject, observer=lambda event: None)


def test_weights_without_an_average_are_scored_by_a_protocol_of_their_own(
    checkpoint: Path, tiny_config: Path, tmp_path: Path
) -> None:
    config, storage = config_of(tiny_config, "data.mode=RGB"), LocalStorage(str(tmp_path / "root"))
    import_checkpoint(checkpoint, tmp_path / "folder")

    def weights() -> str:
        subject = import_model(tmp_path / "folder", config, storage)
        steps = make_steps(config, [], subject=subject)
        planned = {p.step.name: p for p in plan(steps, storage)}
        context = StepContext(config, storage, planned["evaluate"], {}, lambda event: None)
        return sampling_of(context)["weights"]

    assert weights() == "ema"
    path = tmp_path / "folder" / "model.json"
    document = json.loads(path.read_text())
    document["weights"] = {"model": document["weights"]["ema"]}
    path.write_text(json.dumps(document))
    assert weights() == "model"
