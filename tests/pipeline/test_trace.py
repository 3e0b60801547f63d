from pathlib import Path

from pipeline.trace import TraceReader, trace_rank


def test_a_trace_is_read_as_it_grows(tmp_path: Path) -> None:
    path, told = tmp_path / "trace", []
    reader = TraceReader(path)
    reader.read()
    on_row = trace_rank(str(path), lambda *args: told.append(args), rank=1, world_size=2)
    on_row({"global_step": 3}, 2)
    with path.open("a") as file:
        file.write('{"kind": "ro')
    reader.read()
    assert [entry["rank"] for entry in reader.began] == [1]
    assert [(r["global_step"], r["first_step"]) for r in reader.rows] == [(3, 2)]
    assert told == [({"global_step": 3}, 2)]
    with path.open("a") as file:
        file.write('w", "global_step": 4}\n')
    reader.read()
    assert [r["global_step"] for r in reader.rows] == [3, 4]
