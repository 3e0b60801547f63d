from pathlib import Path

import pytest

from pipeline.config import command_line, load_config, override_config, parse_config
from pipeline.driver import run_config
from pipeline.errors import ConfigError
from pipeline.settings import Config

MINIMAL = """
name = "x"
[data]
sources = ["a.tar"]
resolution = 32
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "c.toml"
    path.write_text(text)
    return path


def test_defaults_fill_what_is_not_said(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL))
    assert config.train.num_workers == 1
    assert config.data.sources == (str(tmp_path / "a.tar"),)


def test_sources_may_begin_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "[home]"))
    sources = '["~/in/*.tar", "~", "~nobody-is-called-so/a.tar", "a~.tar", "s3://b/~"]'
    path = write(tmp_path, MINIMAL.replace('["a.tar"]', sources))
    assert load_config(path).data.sources == (
        f"{tmp_path}/[[]home]/in/*.tar",
        f"{tmp_path}/[[]home]",
        f"{tmp_path}/~nobody-is-called-so/a.tar",
        f"{tmp_path}/a~.tar",
        "s3://b/~",
    )


def test_digits_is_valid() -> None:
    config = load_config(Path(__file__).parents[2] / "examples" / "digits" / "digits.toml")
    assert config.name == "digits"


def test_all_faults_at_once_with_the_nearest_key(tmp_path: Path) -> None:
    path = write(
        tmp_path, MINIMAL + 'mdoe = "L"\n[train]\nlearning_rat = 1e-3\nnum_steps = "3"\n[modle]\n'
    )
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    message = str(caught.value)
    assert "has 4 faults" in message
    assert "data.mdoe is not a known key. Did you mean 'mode'?" in message
    assert "train.learning_rat is not a known key. Did you mean 'learning_rate'?" in message
    assert "modle is not a known key. Did you mean 'model'?" in message
    assert "train.num_steps should be a valid integer, got '3'" in message


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data: either resolution .* must be given, got neither"):
        load_config(write(tmp_path, 'name = "x"\n[data]\nsources = ["a.tar"]\n'))


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("train.num_steps=7", "train", "num_steps", 7),
        ("train.learning_rate=1e-4", "train", "learning_rate", 1e-4),
        ("diffusion.schedule=linear", "diffusion", "schedule", "linear"),
        ('diffusion.schedule="linear"', "diffusion", "schedule", "linear"),
        ("diffusion.schedule_options={s=0.01}", "diffusion", "schedule_options", {"s": 0.01}),
        ("storage.root=s3://b/x", "storage", "root", "s3://b/x"),
        ("train.num_workers=[1, 2]", "train", "num_workers", (1, 2)),
    ],
)
def test_set_overrides(
    tmp_path: Path, override: str, section: str, key: str, value: object
) -> None:
    config = load_config(write(tmp_path, MINIMAL), [override])
    assert getattr(getattr(config, section), key) == value


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.num_steps", "--set takes section.key=value"),
        ("name.x=1", "'name' is no section"),
        ("train.global_batch_size=24", "must be a multiple of 16 and at least .* got 24. Use 32"),
        ("train.num_workers=[1, 5]", "16 x num_workers = 80, got 64. Use 80"),
        ("train.num_workers=[3, 2]", r"with min <= max, got \[3, 2\]. Change it"),
        ("train.num_workers=[1, 2, 3]", r"or \[min, max\] with min <= max, got \[1, 2, 3\]"),
        ("train.num_workers=0", "num_workers: must be a number from 1, .* got 0. Change it"),
        ('train.num_workers="2"', "must be a number from 1, .* got '2'"),
        ("data.resolution=30", "data.resolution must be divisible by 4"),
        ("cluster.address=ray://h:10001", "got 'ray://h:10001'. Give HEAD:6379 on a machine of"),
        ("data.test_fraction=0.97", "must leave images to train on"),
        ("evaluate.num_samples=100", "at least 10 x features.width = 160, got 100"),
        ("train={fid_every=1, fid_samples=9}", "train.fid_samples must be at least 10 x features."),
        (
            "train={validate_every=1}\ndata.validation_fraction=0",
            "data.validation_fraction must be above 0 with train.validate_every, got 0",
        ),
        ("train.accumulation_steps=65", "must be at most 64, the smallest share of a batch that"),
        ("train={accumulation_steps=17, num_workers=[1, 3]}", "must be at most 16, the smallest"),
        ("train.storage_patience_s=600", "storage_patience_s should be less than or equal to 480"),
        ("evaluate.num_steps=2000", "must not exceed diffusion.num_train_timesteps = 1000"),
        (
            "evaluate={num_steps=501, spacing='leading'}",
            r"evaluate\.num_steps = 501 with .* leaves out the last 499 of 1000 timesteps",
        ),
        (
            "evaluate.guidance_scale=3.0\nmodel.class_conditional=true\ntrain.label_dropout=0.0",
            r"evaluate\.guidance_scale = 3 needs a network that is sometimes not told the class",
        ),
        ("train.ema_decay=1.0", "train.ema_decay should be less than 1, got 1.0"),
        ("model.dim_mults=[1,2]", "one kind for each of the 2 levels"),
        (
            "data.shard_bytes=10000000000000",
            "data.shard_bytes should be less than or equal to 1073",
        ),
        ("data.resolution=100000", "an item must not have more than 268,435,456 bytes, got 30,000"),
        (
            "data.include_labels=[1.5]",
            r"include_labels\.0: a label must be .* got 1\.5: a float is",
        ),
        (
            'data.include_labels=["a", -7]',
            r"include_labels\.1: a label must be a whole number from 0",
        ),
        ('data.include_labels=[""]', "a label has 1 to 100 characters"),
        ("name=a/b", "name should match pattern|name String should match pattern"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, MINIMAL), override.splitlines())


def test_workers_are_a_number_or_from_min_to_max(tmp_path: Path) -> None:
    fixed = load_config(write(tmp_path, MINIMAL), ["train.num_workers=2"]).train
    assert (fixed.min_workers, fixed.max_workers) == (2, 2)
    elastic = load_config(write(tmp_path, MINIMAL), ["train.num_workers=[1, 2]"])
    assert (elastic.train.min_workers, elastic.train.max_workers) == (1, 2)
    assert Config.model_validate_json(elastic.model_dump_json()) == elastic  # as workers read it


def test_a_fault_of_the_workers_is_told_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has 1 fault:"):
        load_config(write(tmp_path, MINIMAL), ["train.num_workers=[0, 1]"])


def test_a_missing_file_and_bad_toml(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="There is no config file at"):
        load_config(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="is a directory"):
        load_config(tmp_path)
    with pytest.raises(ConfigError, match="is not valid TOML"):
        load_config(write(tmp_path, "name = "))


@pytest.mark.parametrize("value", ['mode = "L"', "min_resolution_px = 500", 'fit = "pad"'])
def test_settings_of_images_are_refused_with_sequences(tmp_path: Path, value: str) -> None:
    sequences = f'name = "x"\n[data]\nsources = ["a.npy"]\nsequence_shape = [2, 64]\n{value}\n'
    name = value.split()[0]
    with pytest.raises(ConfigError, match=f"data: {name} cannot be honoured for sequences"):
        load_config(write(tmp_path, sequences))


@pytest.mark.parametrize("num_steps", [1, 50, 60, 500, 1000])
def test_leading_steps_may_leave_out_a_few_timesteps(tmp_path: Path, num_steps: int) -> None:
    settings = [f"evaluate.num_steps={num_steps}", "evaluate.spacing=leading"]
    assert load_config(write(tmp_path, MINIMAL), settings).evaluate.num_steps == num_steps


def test_trials_are_sampled_by_steps_that_are_refused_too(tmp_path: Path) -> None:
    settings = ["evaluate.spacing=leading", "tune.num_steps=501", "tune.enabled=true"]
    with pytest.raises(ConfigError, match=r"tune\.num_steps = 501 with"):
        load_config(write(tmp_path, MINIMAL), settings)


def test_what_is_refused_in_a_file_is_read_with_a_model_of_before(tmp_path: Path) -> None:
    values = load_config(write(tmp_path, MINIMAL)).model_dump(mode="json")
    values["name"] = "x.toml"
    values["evaluate"] |= {"num_steps": 501, "spacing": "leading"}
    kept = parse_config(values, "x@1")
    assert len(kept.faults_of_new()) == 2
    assert override_config(kept, ["evaluate.eta=0.5"]).evaluate.eta == 0.5
    with pytest.raises(ConfigError, match=r"evaluate\.num_steps = 502 with"):
        override_config(kept, ["evaluate.num_steps=502"])


def test_the_verb_of_a_search_refuses_what_an_enabled_one_does(tmp_path: Path) -> None:
    settings = ["evaluate.spacing=leading", "tune.num_steps=501"]
    config = load_config(write(tmp_path, MINIMAL), settings)
    with pytest.raises(ConfigError, match=r"cannot be tuned:\n +tune\.num_steps = 501 with"):
        run_config(config, ("tune",), observer=lambda event: None)


def test_a_command_has_the_settings_that_were_given_but_secrets() -> None:
    overrides = ["train.seed=1", "notify.webhook=x", "name=a b"]
    assert command_line("train", "a b.toml", overrides) == (
        "train 'a b.toml' --set train.seed=1 --set 'name=a b'"
    )


def test_sequences_are_clipped_only_where_that_is_asked_for(tmp_path: Path) -> None:
    sequences = write(tmp_path, MINIMAL.replace("resolution = 32", "sequence_shape = [2, 64]"))
    config = load_config(sequences)
    assert not config.evaluate.clip_x_start
    assert not load_config(sequences, ["evaluate.num_steps=7"]).evaluate.clip_x_start
    assert load_config(sequences, ["evaluate.clip_x_start=true"]).evaluate.clip_x_start
    assert Config.model_validate_json(config.model_dump_json()) == config
    images = load_config(write(tmp_path, MINIMAL))
    assert images.evaluate.clip_x_start
    data = images.data.model_dump(mode="json")  # where sequence_shape is null
    assert parse_config({"name": "x", "data": data}, "x").evaluate.clip_x_start


def test_sequences_are_not_mirrored(tmp_path: Path) -> None:
    sequences = MINIMAL.replace("resolution = 32", "sequence_shape = [2, 64]")
    with pytest.raises(ConfigError, match=r"train\.horizontal_flip is for images"):
        load_config(write(tmp_path, sequences), ["train.horizontal_flip=true"])


def test_labels_to_include_are_numbers_names_or_none(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL), ['data.include_labels=[7, "007", "cat", -1]'])
    assert config.data.include_labels == (7, "007", "cat", -1)
    assert type(config).model_validate_json(config.model_dump_json()) == config


def test_the_config_of_fashion_mnist_is_valid() -> None:
    root = Path(__file__).parents[2]
    config = load_config(root / "examples" / "fashion_mnist" / "fashion_mnist.toml")
    assert config.data.require_labels


def test_scores_beside_training_need_images_that_are_held_out(tmp_path: Path) -> None:
    settings = ["train.fid_every=1", "data.validation_fraction=0", "data.test_fraction=0"]
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, MINIMAL), settings)
    for name in ("validation_fraction", "test_fraction"):
        assert f"data.{name} must be above 0 with train.fid_every" in str(caught.value)
    sequences = MINIMAL.replace("resolution = 32", "sequence_shape = [2, 64]")
    with pytest.raises(ConfigError, match=r"train\.fid_every scores images, and data\.sequence_sh"):
        load_config(write(tmp_path, sequences), settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["extractor=vgg"],
            "features: extractor must be one of classifier, self_supervised, incep",
        ),
        (["extractor=a.b:"], "or package.module:factory, got 'a.b:'"),
        (["extractor=a b:c"], "or package.module:factory, got 'a b:c'"),
        (["extractor=.a:c"], "or package.module:factory, got '.a:c'"),
        (["width=513"], "width must be at most 512 for the extractor classifier, got 513"),
        (["width=1"], "features.width should be greater than or equal to 2, got 1"),
        (["extractor=inception", "width=100"], "width must be one of 64, 192, 768, 2048 for incep"),
        (["weights=w.pth"], "weights are those of inception or of one's own extractor"),
        (
            ["extractor=self_supervised", f"weights_sha256={'a' * 64}"],
            "and self_supervised is trai",
        ),
        (
            ["extractor=a:b", f"weights_sha256={'a' * 64}"],
            "weights_sha256 is that of weights, which",
        ),
        (["extractor=inception", "weights_sha256=ABC"], "features.weights_sha256 "),
        (
            ["extractor=inception"],
            "evaluate.num_samples must be at least 10 x features.width = 20480",
        ),
    ],
)
def test_an_extractor_that_cannot_be_is_refused(
    tmp_path: Path, settings: list[str], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, MINIMAL), [f"features.{text}" for text in settings])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("extractor", "width", "found"),
    [
        ("classifier", None, 16), ("self_supervised", None, 16), ("self_supervised", 5, 5),
        ("inception", None, 2048), ("inception", 192, 192), ("a.b_1:make", None, None),
        ("a:b", 7, 7),
    ],
)  # fmt: skip
def test_the_number_of_features_is_that_of_the_extractor_unless_it_is_given(
    tmp_path: Path, extractor: str, width: int | None, found: int | None
) -> None:
    given = [] if width is None else [f"features.width={width}"]
    given += [f"features.extractor={extractor}", "evaluate.num_samples=20480"]
    assert load_config(write(tmp_path, MINIMAL), given).features.num_features == found


def test_weights_are_beside_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for weights, found in (
        ("w.pth", f"{tmp_path}/w.pth"),
        ("[1]/w.pth", f"{tmp_path}/[1]/w.pth"),
        ("~/w.pth", f"{tmp_path}/home/w.pth"),
        ("~nobody-is-called-so/w.pth", f"{tmp_path}/~nobody-is-called-so/w.pth"),
        ("s3://b/w.pth", "s3://b/w.pth"),
    ):
        settings = ["features.extractor=a:b", f"features.weights={weights}"]
        assert load_config(write(tmp_path, MINIMAL), settings).features.weights == found


def test_a_model_is_not_called_as_a_config_is(tiny_config: Path) -> None:
    with pytest.raises(ConfigError, match=r"name must not end in \.toml.* Leave the ending out"):
        load_config(tiny_config, ["name=x.toml"])
