from pathlib import Path

import pytest

from pipeline.config import load_config
from pipeline.driver import run_config
from pipeline.errors import ConfigError, DataError


@pytest.mark.parametrize("name", ["validation_fraction", "test_fraction"])
def test_a_score_without_images_held_out_is_refused_before_any_work(
    tiny_config: Path, tmp_path: Path, name: str
) -> None:
    config = load_config(tiny_config, [f"data.{name}=0", f"storage.root={tmp_path / 'root'}"])
    for targets in (("report",), ("preprocess", "features"), ("evaluate",)):
        with pytest.raises(ConfigError, match=rf"data\.{name} is 0, and the score needs images"):
            run_config(config, targets, observer=lambda event: None)
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize("extractor", ["classifier", "self_supervised", "inception"])
def test_sequences_are_scored_by_an_extractor_of_ones_own_alone(
    tmp_path: Path, extractor: str
) -> None:
    path = tmp_path / "c.toml"
    path.write_text('name = "x"\n[data]\nsources = ["a.npy"]\nsequence_shape = [2, 64]\n')
    settings = [f"storage.root={tmp_path / 'root'}", "evaluate.num_samples=20480"]

    def run(extractor: str) -> None:
        config = load_config(path, [*settings, f"features.extractor={extractor}"])
        run_config(config, ("evaluate",), observer=lambda event: None)

    message = f"The extractor {extractor} is one of images, and data.sequence_shape makes sequences"
    with pytest.raises(ConfigError, match=message):
        run(extractor)
    with pytest.raises(DataError, match="no sequences at"):  # it looks for them
        run("json:loads")
