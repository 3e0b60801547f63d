import json
import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).with_name("fuzz.py")


@pytest.mark.parametrize(
    ("seed", "count"),
    [(0, 400), *(pytest.param(seed, 3000, marks=pytest.mark.slow) for seed in range(1, 5))],
)
def test_every_malformed_file_is_accepted_or_quarantined(
    tmp_path: Path, seed: int, count: int
) -> None:
    done = subprocess.run(
        [sys.executable, str(FUZZ), str(tmp_path), str(seed), str(count)],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-3000:]
    assert done.stderr == ""  # nothing warns, nothing logs
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["num_files"] >= 300
    assert found["peak_mib"] < 1500
    assert len(found["reasons"]) >= 5, found["reasons"]
    for kind, units in found["outcomes"].items():
        for unit in units:
            accepted, refused = unit["accepted"], unit["refused"]
            assert len(set(accepted)) == len(accepted), unit["shard"]
            assert not set(accepted) & set(refused), unit["shard"]
            assert accepted or refused, (kind, unit["shard"])
    # Nothing is lost unseen: whoever does not give all that the good file held says why.
    for unit in found["outcomes"]["shards"] + found["outcomes"]["sequences"]:
        for file in unit["files"]:
            accepted, refused = (
                [name for name in unit[kind] if name == file or name.startswith(f"{file}/")]
                for kind in ("accepted", "refused")
            )
            kind = file.partition("-")[2]
            expected = found["num_items"].get(kind, found["num_items"][""])
            left_out = unit["left_out"].get("name", 0)
            assert refused or len(accepted) + left_out >= expected, (file, unit)
    # Of a file that holds one image, exactly one thing became.
    loose = [
        name.rpartition("/")[2]
        for unit in found["outcomes"]["loose"]
        for name in unit["accepted"] + unit["refused"]
    ]
    assert sorted(loose) == found["loose"]
    for unit in found["outcomes"]["packed"]:
        outcomes = unit["accepted"] + unit["refused"]
        assert len(outcomes) == len(found["loose"]), unit["shard"]
