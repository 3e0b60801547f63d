from pathlib import Path

import pytest

from pipeline.config import load_config
from pipeline.driver import run_config
from pipeline.errors import ConfigError


@pytest.mark.parametrize("name", ["validation_fraction", "test_fraction"])
def test_a_score_without_images_held_out_is_refused_before_any_work(
    tiny_config: Path, tmp_path: Path, name: str
) -> None:
    config = load_config(tiny_config, [f"data.{name}=0", f"storage.root={tmp_path / 'root'}"])
    for targets in (("report",), ("preprocess", "features"), ("evaluate",)):
        with pytest.raises(ConfigError, match=rf"data\.{name} is 0, and the score needs images"):
            run_config(config, targets, observer=lambda event: None)
    assert not (tmp_path / "root").exists()
