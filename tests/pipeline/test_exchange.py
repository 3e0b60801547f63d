"""Model folders in and out: whole or not there, and the same network afterwards."""

import hashlib
import json
import lzma
import tomllib
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from diffusion_core import Diffusion, UNet, UNetConfig, make_schedule, sample_ddim
from diffusion_core.interop import ImportedModel
from diffusion_core.scheduler_config import make_scheduler_config, read_scheduler_config
from pipeline import exchange, model_folder
from pipeline.checkpoints import to_safetensors
from pipeline.config import load_config
from pipeline.driver import make_plan
from pipeline.errors import ConfigError, DataError, StorageError
from pipeline.exchange import (
    export_model,
    import_checkpoint,
    import_scheduler_config,
    load_model_folder,
)
from pipeline.models import make_diffusion, make_unet
from pipeline.settings import DiffusionConfig, EvaluateConfig
from pipeline.storage import LocalStorage

FIXTURES = Path(__file__).resolve().parent.parent / "diffusion_core" / "fixtures"

SMALL = UNetConfig(
    channels=1,
    dim=8,
    dim_mults=(1, 2),
    attention=("linear", "full"),
    heads=(2, 1),
    head_dim=4,
    norm_groups=4,
)


def make_model(config: UNetConfig = SMALL, seed: int = 0) -> UNet:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = UNet(config)
        for parameter in model.parameters():  # the last layer begins at 0: nothing to compare
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.fixture
def imported() -> ImportedModel:
    """What a checkpoint of another library was read as."""
    return ImportedModel(
        config=SMALL,
        schedule=make_schedule("cosine", 100),
        objective="pred_v",
        weighting="min_snr",
        gamma=4.0,
        weights=make_model(seed=1).state_dict(),
        ema_weights=make_model(seed=2).state_dict(),
        global_step=1234,
        library_version="2.3.4",
    )


@pytest.fixture
def checkpoint(
    imported: ImportedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """Makes a file that is read as a given model, whatever it holds."""

    def make(**changes: Any) -> Path:
        path = tmp_path / "model-7.pt"
        path.write_bytes(b"a checkpoint")
        model = replace(imported, **changes)
        monkeypatch.setattr(exchange, "read_checkpoint", lambda path, **given: model)
        return path

    return make


def run(model: UNet, diffusion: Diffusion) -> Tensor:
    x_T = torch.randn((2, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    return sample_ddim(diffusion, model, x_T, num_steps=3)


def test_an_imported_model_loads_back_to_the_bit(
    imported: ImportedModel, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    done = import_checkpoint(checkpoint(), tmp_path / "m")
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == [
        "ema.safetensors",
        "model.json",
        "weights.safetensors",
    ]
    assert done.notes == []
    document = json.loads((tmp_path / "m" / "model.json").read_text())
    assert document["schedule"] == {"name": "cosine", "num_train_timesteps": 100, "options": {}}
    assert document["source"]["sha256"] == hashlib.sha256(b"a checkpoint").hexdigest()
    assert document["source"]["name"] == "model-7.pt"
    assert (document["global_step"], document["source"]["library_version"]) == (1234, "2.3.4")

    model, diffusion = load_model_folder(tmp_path / "m")
    assert model.config == SMALL
    assert not model.training
    expected = Diffusion(imported.schedule, "pred_v", "min_snr", 4.0)
    assert torch.equal(diffusion.weights, expected.weights)
    assert torch.equal(run(model, diffusion), run(make_model(seed=2), expected))
    weights = load_file(tmp_path / "m" / "weights.safetensors")
    assert torch.equal(weights["init_conv.weight"], imported.weights["init_conv.weight"])


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("2.3.4-images-self-condition", {}),
        ("2.3.4-sequences", {"overrides": ["heads=2", "head_dim=8"]}),
        ("1.0.0-images", {"overrides": ["norm_groups=4"], "objective": "pred_noise"}),
    ],
)
def test_a_real_checkpoint_computes_what_it_did(
    tmp_path: Path, case: str, options: dict[str, Any]
) -> None:
    path = tmp_path / "model-1.pt"
    path.write_bytes(lzma.decompress((FIXTURES / f"{case}.pt.xz").read_bytes()))
    import_checkpoint(path, tmp_path / "m", **options)
    model, _ = load_model_folder(tmp_path / "m")
    record = load_file(FIXTURES / f"{case}.safetensors")
    names = ("x_t", "t", "x_self_cond") if model.config.self_condition else ("x_t", "t")
    inputs = [record[name] for name in names]
    with torch.no_grad():
        torch.testing.assert_close(model(*inputs), record["ema"], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "schedule",
    [
        make_schedule("linear", 100, beta_end=0.03),
        make_schedule("trained_betas", 100, betas=[0.001 * (i + 1) for i in range(100)]),
        make_schedule("cosine", 100).shifted(base_resolution=32, resolution=64),
        make_schedule("cosine", 100).zero_terminal_snr(),
        make_schedule("lerp", 100),
    ],
    ids=lambda schedule: schedule.name,
)
def test_a_schedule_without_a_plain_name_comes_back_to_the_bit(
    checkpoint: Callable[..., Path], tmp_path: Path, schedule: Any
) -> None:
    import_checkpoint(checkpoint(schedule=schedule, weighting="uniform"), tmp_path / "m")
    _, diffusion = load_model_folder(tmp_path / "m")
    assert torch.equal(diffusion.schedule.signal_scale, schedule.signal_scale)
    assert torch.equal(diffusion.schedule.noise_scale, schedule.noise_scale)
    assert diffusion.schedule.name == schedule.name


def test_what_the_network_is_given_and_puts_out_comes_back(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    config = replace(SMALL, self_condition=True, learned_variance=True, num_classes=3)
    weights = make_model(config).state_dict()
    path = checkpoint(config=config, weights=weights, ema_weights=None)
    import_checkpoint(path, tmp_path / "m")
    model, diffusion = load_model_folder(tmp_path / "m")
    assert model.config == config
    assert (diffusion.self_condition, diffusion.learned_variance) == (True, True)
    assert diffusion.null_label == 3
    assert torch.equal(model.state_dict()["init_conv.weight"], weights["init_conv.weight"])


def test_options_reach_the_reader(
    imported: ImportedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(b"")
    seen: dict[str, Any] = {}

    def read(path: Path, **given: Any) -> ImportedModel:
        warnings.warn("the schedule never reaches noise.", stacklevel=1)
        seen.update(given)
        return imported

    monkeypatch.setattr(exchange, "read_checkpoint", read)
    done = import_checkpoint(
        path,
        tmp_path / "m",
        objective="pred_x0",
        library_version="1.6.4",
        overrides=["heads=4", "attention=['full','none']", "norm=rms", "time_theta=5"],
    )
    assert seen == {
        "objective": "pred_x0",
        "library_version": "1.6.4",
        "heads": 4,
        "attention": ("full", "none"),
        "norm": "rms",
        "time_theta": 5.0,
    }
    assert done.notes == ["the schedule never reaches noise."]


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"objective": "epsilon"}, "--objective must be one of pred_noise"),
        ({"overrides": ["head=4"]}, "Did you mean heads=...?"),
        ({"overrides": ["heads"]}, "--set takes field=value"),
        ({"overrides": ["heads=few"]}, "heads must be of type"),
        ({"overrides": ["dim_mults=[1, 2.5]"]}, "dim_mults must be of type"),
    ],
)
def test_wrong_options(
    checkpoint: Callable[..., Path], tmp_path: Path, options: dict[str, Any], fault: str
) -> None:
    with pytest.raises(ConfigError) as error:
        import_checkpoint(checkpoint(), tmp_path / "m", **options)
    assert fault in str(error.value)
    assert not (tmp_path / "m").exists()


def test_what_is_there_is_not_overwritten(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    import_checkpoint(checkpoint(), tmp_path / "m")  # an empty one is as good as none
    before = (tmp_path / "m" / "model.json").read_bytes()
    with pytest.raises(ConfigError, match="not empty"):
        import_checkpoint(checkpoint(global_step=1), tmp_path / "m")
    with pytest.raises(ConfigError, match="not empty"):
        export_model(str(tmp_path / "m"), tmp_path / "m")
    assert (tmp_path / "m" / "model.json").read_bytes() == before


def test_nothing_is_left_of_a_write_that_fails(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint()
    create = LocalStorage.create

    def fail_at_the_last(storage: LocalStorage, name: str, content: bytes) -> bool:
        if name == "model.json":
            raise StorageError("Cannot write: no space left. Make some.")
        return create(storage, name, content)

    monkeypatch.setattr(LocalStorage, "create", fail_at_the_last)
    with pytest.raises(StorageError, match="no space left"):
        import_checkpoint(path, tmp_path / "m")
    assert [p.name for p in tmp_path.iterdir()] == ["model-7.pt"]


def test_files_that_are_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Cannot read .*none\.pt"):
        import_checkpoint(tmp_path / "none.pt", tmp_path / "m")
    (tmp_path / "a.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(DataError, match=r"a\.pt"):
        import_checkpoint(tmp_path / "a.pt", tmp_path / "m")
    assert not (tmp_path / "m").exists()


def damage_weights(folder: Path) -> None:
    (folder / "ema.safetensors").write_bytes(b"x" + (folder / "ema.safetensors").read_bytes()[1:])


def rewrite(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        document = json.loads((folder / "model.json").read_text())
        (folder / "model.json").write_text(json.dumps(document | changes))

    return change


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (damage_weights, "content is not what model.json says"),
        (lambda folder: (folder / "ema.safetensors").unlink(), "Cannot read"),
        (lambda folder: (folder / "model.json").unlink(), "it has no model.json"),
        (lambda folder: (folder / "model.json").write_text("{"), "is not valid JSON"),
        (lambda folder: (folder / "model.json").write_text("[]"), "describes no network"),
        (rewrite(format=2), "format: Input should be 1"),
        (rewrite(unet={"dim": 8, "new": 1}), "unet has new, which this version does not know"),
        (rewrite(unet={"dim": 7}), "model.dim must be even"),
        (rewrite(unet={"dim": 8}), "weights are not of the network"),
        (rewrite(gamma="5"), "gamma: Input should be a valid number"),
        (rewrite(weights={"ema": {"file": "../x", "sha256": ""}}), "file: String should match"),
        (rewrite(objective="pred_flow"), "belongs to the schedule 'lerp'"),
        (
            rewrite(schedule={"name": "x", "signal_scale": [0.5, 0.6], "noise_scale": [0.5, 0.6]}),
            "does not fall",
        ),
    ],
)
def test_a_damaged_folder_is_refused(
    checkpoint: Callable[..., Path], tmp_path: Path, damage: Callable[[Path], None], fault: str
) -> None:
    import_checkpoint(checkpoint(), tmp_path / "m")
    damage(tmp_path / "m")
    with pytest.raises(DataError) as error:
        load_model_folder(tmp_path / "m")
    assert fault in str(error.value)


def test_a_model_folder_is_exported(
    imported: ImportedModel, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    import_checkpoint(checkpoint(), tmp_path / "m")
    done = export_model(str(tmp_path / "m"), tmp_path / "e")
    assert sorted(p.name for p in (tmp_path / "e").iterdir()) == [
        "model.json",
        "scheduler_config.json",
        "unet.safetensors",
    ]
    config = json.loads((tmp_path / "e" / "scheduler_config.json").read_text())
    assert config == make_scheduler_config(imported.schedule, "pred_v")
    assert done.num_parameters == sum(p.numel() for p in make_model().parameters())
    assert torch.equal(
        run(*load_model_folder(tmp_path / "e")), run(*load_model_folder(tmp_path / "m"))
    )
    with pytest.raises(ConfigError, match="--set is not for a model folder"):
        export_model(str(tmp_path / "m"), tmp_path / "f", ["train.num_steps=1"])


def test_flow_is_not_exported(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    path = checkpoint(
        schedule=make_schedule("lerp", 100), objective="pred_flow", weighting="uniform"
    )
    import_checkpoint(path, tmp_path / "m")
    with pytest.raises(ConfigError, match="knows no flow"):
        export_model(str(tmp_path / "m"), tmp_path / "e")
    assert not (tmp_path / "e").exists()


def test_a_model_without_ema_says_so(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    import_checkpoint(checkpoint(ema_weights=None), tmp_path / "m")
    done = export_model(str(tmp_path / "m"), tmp_path / "e")
    assert done.notes == ["the model has no EMA weights: its weights as trained are exported"]
    model, _ = load_model_folder(tmp_path / "e")
    assert torch.equal(model.init_conv.weight, make_model(seed=1).init_conv.weight)


def finish_training(config_path: Path) -> UNet:
    """Puts the manifest and the weights of a finished training where the workflow looks."""
    config = load_config(config_path)
    planned = make_plan(config, ("train",))
    step = next(p for p in planned.steps if p.step.name == "train")
    model = make_unet(config, 5)
    with torch.no_grad():
        model.final_conv.weight.fill_(0.25)
    content = to_safetensors(model.state_dict())
    manifest = {
        "step": "train",
        "key": step.key,
        "metrics": {"num_steps": config.train.num_steps, "num_classes": None},
        "artifacts": {
            "ema.safetensors": {
                "file": "ema-0.safetensors",
                "sha256": hashlib.sha256(content).hexdigest(),
            }
        },
        "versions": {"raydiffusion": "0.1.0"},
    }
    planned.storage.create(f"{step.directory}/ema-0.safetensors", content)
    planned.storage.create(f"{step.directory}/manifest.json", json.dumps(manifest).encode())
    return model.eval()


def test_a_finished_training_is_exported(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = tiny_config.read_text().replace("[evaluate]", '[evaluate]\nspacing = "leading"')
    tiny_config.write_text(
        text.replace("[diffusion]", "[diffusion]\nschedule_options = { s = 0.02 }")
    )
    with pytest.raises(ConfigError, match=r"is not finished: .*Run `raydiffusion train"):
        export_model(str(tiny_config), tmp_path / "e")
    trained = finish_training(tiny_config)
    done = export_model(str(tiny_config), tmp_path / "e")
    config = load_config(tiny_config)
    expected = make_diffusion(config)
    model, diffusion = load_model_folder(tmp_path / "e")
    assert torch.equal(run(model, diffusion), run(trained, expected))
    assert done.document.global_step == 300
    assert done.document.source.name == "tiny"
    document = json.loads((tmp_path / "e" / "model.json").read_text())
    assert document["schedule"]["options"] == {"s": 0.02}
    settings = read_scheduler_config(
        json.loads((tmp_path / "e" / "scheduler_config.json").read_text())
    )
    assert (settings.objective, settings.spacing) == ("pred_v", "leading")
    torch.testing.assert_close(settings.schedule.betas, expected.schedule.betas)
    with pytest.raises(ConfigError, match="not finished"):
        export_model(str(tiny_config), tmp_path / "f", ["train.seed=1"])


def write_scheduler(folder: Path, **values: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "scheduler_config.json"
    path.write_text(json.dumps({"_class_name": "DDIMScheduler", **values}))
    return path


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
        {
            "_class_name": "DDPMScheduler",
            "beta_schedule": "sigmoid",
            "beta_start": 1e-5,
            "beta_end": 0.03,
            "timestep_spacing": "linspace",
            "clip_sample": False,
        },
        {
            "rescale_betas_zero_snr": True,
            "prediction_type": "v_prediction",
            "timestep_spacing": "trailing",
        },
    ],
)
def test_a_scheduler_config_as_toml_makes_the_same_process(
    tmp_path: Path, tiny_config: Path, values: dict[str, Any]
) -> None:
    path = write_scheduler(tmp_path / "scheduler", **values)
    read = import_scheduler_config(tmp_path)  # a folder of a pipeline
    assert read.notes == []
    sections = tomllib.loads(read.to_toml())
    diffusion = DiffusionConfig.model_validate_json(json.dumps(sections["diffusion"]))
    evaluate = EvaluateConfig.model_validate_json(json.dumps(sections["evaluate"]))
    config = load_config(tiny_config).model_copy(update={"diffusion": diffusion})
    settings = read_scheduler_config(json.loads(path.read_text()))
    found = make_diffusion(config)
    assert torch.equal(found.schedule.signal_scale, settings.schedule.signal_scale)
    assert found.objective == settings.objective
    assert (evaluate.spacing, evaluate.clip_x_start) == (settings.spacing, settings.clip_x_start)
    assert evaluate.eta == (1 if settings.sampler == "ddpm" else 0)


@pytest.mark.parametrize(
    "values", [{}, {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}]
)
def test_what_a_config_cannot_express_is_said(tmp_path: Path, values: dict[str, Any]) -> None:
    given = {"num_train_timesteps": 2, "trained_betas": [0.5, 0.995], **values}
    read = import_scheduler_config(write_scheduler(tmp_path, **given))
    assert read.diffusion is None
    assert read.to_toml() == ""
    assert len(read.notes) == 1
    assert "betas given one by one" in read.notes[0]


def test_what_evaluate_does_otherwise_is_said(tmp_path: Path) -> None:
    path = write_scheduler(tmp_path, steps_offset=1, beta_end=0.001)
    notes = import_scheduler_config(path).notes
    assert len(notes) == 2
    assert "sampling starts from noise that training never showed" in notes[0]
    assert "shifts its timesteps by 1" in notes[1]
    path = write_scheduler(tmp_path, _class_name="DDPMScheduler", variance_type="fixed_large")
    assert "variance is fixed_large" in import_scheduler_config(path).notes[0]
    path = write_scheduler(tmp_path, _class_name="DPMSolverMultistepScheduler")
    assert "DPM-Solver++(2M)" in import_scheduler_config(path).notes[0]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("{", "is not valid JSON"),
        ("[]", "is a JSON object"),
        ('{"_class_name": "PNDMScheduler"}', "PNDMScheduler is no sampler of ours"),
        (None, "Cannot read"),
    ],
)
def test_files_that_are_no_scheduler_config(tmp_path: Path, text: str | None, fault: str) -> None:
    path = tmp_path / "scheduler_config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError) as error:
        import_scheduler_config(path)
    assert fault in str(error.value)
    assert str(path) in str(error.value)
    path.unlink(missing_ok=True)
    with pytest.raises(DataError, match=r"There is no scheduler_config\.json in"):
        import_scheduler_config(tmp_path)


def test_the_document_is_what_was_written(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    done = import_checkpoint(checkpoint(), tmp_path / "m")
    assert model_folder.read_document(tmp_path / "m") == done.document
