"""Chunks of samples: the same however they are spread, once drawn never drawn again."""

import hashlib
import json
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch

from pipeline import drawing
from pipeline.checkpoints import to_safetensors
from pipeline.config import load_config
from pipeline.drawing import Series, _deal, _draw_chunks, draw_chunk, draw_items, iter_drawn
from pipeline.errors import EvaluationError
from pipeline.extractors import ARTIFACT, load_extractor
from pipeline.extractors.small import SmallNetwork
from pipeline.sampling import draw_labels
from pipeline.settings import Config
from pipeline.storage import LocalStorage
from pipeline.subjects import Source, load_network


@pytest.fixture(autouse=True)
def forget_networks() -> Iterator[None]:
    """What a worker process remembers between tasks."""
    yield
    drawing._load_network.cache_clear()
    drawing._load_extractor.cache_clear()


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(str(tmp_path / "root"))


@pytest.fixture
def features(storage: LocalStorage) -> str:
    """The manifest of a classifier that learned nothing, as JSON."""
    torch.manual_seed(0)
    weights = to_safetensors(SmallNetwork(1, 4, 3).state_dict())
    storage.create("steps/features/k/w", weights)
    artifact = {"file": "w", "sha256": hashlib.sha256(weights).hexdigest()}
    facts = {
        "extractor": "classifier", "channels": 1, "num_features": 4, "num_classes": 3,
        "classifies": True,
    }  # fmt: skip
    return json.dumps(
        {"step": "features", "key": "k", "artifacts": {ARTIFACT: artifact}, "metrics": facts}
    )


@pytest.fixture
def config(tiny_config: Path) -> Config:
    return load_config(
        tiny_config, ["evaluate.num_steps=2", "evaluate.seed=3", "model.class_conditional=true"]
    )


@pytest.fixture
def series(config: Config) -> Series:
    """150 samples in three chunks, the last one short."""
    counts = {"0": 10, "1": 20, "2": 30}
    return Series("x", Source("untrained", counts=counts), config.evaluate, 150)


@pytest.fixture
def run(storage: LocalStorage, config: Config, features: str) -> Callable[..., list[int]]:
    """One task: draws some chunks below a directory; what it yielded."""

    def draw(directory: str, jobs: Sequence[tuple[Series, int]]) -> list[int]:
        arguments = (storage.uri, config.model_dump_json(), features, directory, jobs)
        return list(_draw_chunks(*arguments))

    return draw


def read(storage: LocalStorage, directory: str) -> dict[str, bytes]:
    names = storage.list(f"{directory}/chunks")
    return {name: storage.read(f"{directory}/chunks/{name}") for name in names}


def test_samples_are_the_same_however_chunks_are_spread(
    run: Callable[..., list[int]], storage: LocalStorage, series: Series
) -> None:
    starts = [(series, first) for first in series.starts]
    assert run("together", starts) == [64, 64, 22]
    for job in reversed(starts):
        run("apart", [job])
    together = read(storage, "together")
    assert together == read(storage, "apart")
    assert list(together) == [f"x-{first:08d}.safetensors" for first in (0, 64, 128)]
    chunks = [safetensors.numpy.load(content) for content in together.values()]
    found = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}
    assert found["items"].shape == (150, 1, 8, 8)
    assert found["items"].dtype == np.uint8
    assert (found["features"].shape, found["logits"].shape) == ((150, 4), (150, 3))
    expected = draw_labels({0: 10, 1: 20, 2: 30}, series.settings.seed, range(150))
    assert found["labels"].tolist() == expected.tolist()


def test_what_is_drawn_is_not_drawn_again(
    run: Callable[..., list[int]], storage: LocalStorage, series: Series
) -> None:
    storage.create("d/chunks/x-00000064.safetensors", b"drawn before")
    assert run("d", [(series, first) for first in series.starts]) == [64, 64, 22]
    assert read(storage, "d")["x-00000064.safetensors"] == b"drawn before"


def draw_and_tell(arguments: tuple[Any, ...], told: Connection) -> None:
    """A process that draws; it says when each chunk is there, and never ends by itself."""
    for count in _draw_chunks(*arguments):
        told.send(count)
    told.recv()


def test_a_killed_task_repeats_one_chunk(
    config: Config,
    features: str,
    storage: LocalStorage,
    series: Series,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    jobs = [(series, first) for first in series.starts]
    arguments = (storage.uri, config.model_dump_json(), features, "d", jobs)
    context = multiprocessing.get_context("spawn")
    told, tells = context.Pipe()
    process = context.Process(target=draw_and_tell, args=(arguments, tells), daemon=True)
    process.start()
    assert told.recv() == 64
    process.kill()
    process.join()
    before = read(storage, "d")
    drawn: list[int] = []

    def count_and_draw(*arguments: Any) -> Any:
        drawn.append(arguments[3][0])
        return draw_chunk(*arguments)

    monkeypatch.setattr(drawing, "draw_chunk", count_and_draw)
    assert list(_draw_chunks(*arguments)) == [64, 64, 22]
    assert drawn == [first for first in series.starts if f"x-{first:08d}.safetensors" not in before]
    assert 1 <= len(before) <= 3
    after = read(storage, "d")
    assert {name: after[name] for name in before} == before


def test_settings_of_a_series_count_and_not_those_of_the_config(
    run: Callable[..., list[int]], storage: LocalStorage, series: Series
) -> None:
    more = series.settings.model_copy(update={"num_steps": 5})
    run("two", [(series, 0)])
    run("five", [(Series("x", series.source, more, 150), 0)])
    assert read(storage, "two") != read(storage, "five")


def test_samples_that_are_not_finite_are_counted(
    run: Callable[..., list[int]],
    storage: LocalStorage,
    series: Series,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load = drawing.load_network

    def load_broken(*arguments: Any) -> Any:
        network = load(*arguments)
        with torch.no_grad():
            for weights in network.model.final_conv.parameters():
                weights.fill_(torch.nan)
        return network

    monkeypatch.setattr(drawing, "load_network", load_broken)
    with pytest.raises(EvaluationError, match="22 of the samples 128 to 149 hold values that"):
        run("d", [(series, 128)])
    assert read(storage, "d") == {}


def test_given_images_go_the_same_way(
    run: Callable[..., list[int]],
    storage: LocalStorage,
    series: Series,
    write_data_set: Callable[..., dict[str, Any]],
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (70, 1, 8, 8), np.uint8)
    manifest = write_data_set(storage, images)
    given = Series("x", Source("images", manifest=manifest), series.settings, 70)
    assert run("d", [(given, 0), (given, 64)]) == [64, 6]
    chunks = [safetensors.numpy.load(content) for content in read(storage, "d").values()]
    assert np.array_equal(np.concatenate([chunk["items"] for chunk in chunks]), images)
    assert "labels" not in chunks[0]


def test_jobs_are_dealt_evenly_and_in_order() -> None:
    groups = _deal(list(range(10)), 4)
    assert [job for group in groups for job in group] == list(range(10))
    assert {len(group) for group in groups} == {2, 3}
    assert _deal([1, 2], 8) == [[1], [2]]
    assert _deal([], 8) == []


def test_samples_for_a_score_on_the_way_are_those_of_their_numbers(
    storage: LocalStorage, config: Config, features: str
) -> None:
    source = Source("untrained", counts={"0": 10, "1": 20, "2": 30})
    network = load_network(storage, config, source)
    assert network.counts is not None
    with torch.no_grad():  # a new one puts out zeros
        network.model.final_conv.weight.normal_(generator=torch.Generator().manual_seed(0))
    extractor = load_extractor(storage, json.loads(features))
    items = [drawn for drawn, _ in iter_drawn(config, network, extractor, 70, first=100)]
    numbers = range(100, 170)
    labels = draw_labels(network.counts, config.evaluate.seed, numbers)
    assert [len(part) for part in items] == [64, 6]
    assert np.array_equal(np.concatenate(items), draw_items(config, network, numbers, labels))
