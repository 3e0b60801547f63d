"""What `preprocess --inspect` prints: the manifest of a data set as a person wants it."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console

from pipeline.storage import in_bytes

CLASSES_SHOWN, REFUSED_SHOWN, LABELS_SHOWN = 20, 10, 5
LINE_CHARACTERS = 120  # of a name that may hold anything


def show_dataset(console: Console, document: Mapping[str, Any], contact_sheet: str) -> None:
    """Prints what a preprocessed data set holds, what it does not hold and why."""
    from pipeline.readers.names import show  # numpy: only here

    def say(text: str) -> None:  # names may look like markup or :emoji:
        console.print(text, soft_wrap=True)

    digits = ".4g" if document["dtype"] == "float32" else ".1f"
    files = [file for shard in document["shards"] for file in shard["files"]]
    directories = [shard["directory"] for shard in document["shards"] if shard["files"]]
    more = f" and {len(directories) - 1:,} more" if len(directories) > 1 else ""
    such_as = ", ".join(show(name, LINE_CHARACTERS) for name in document["ignored_first"])
    rows = {
        "items": ", ".join(f"{count:,} {split}" for split, count in document["counts"].items()),
        "shape": " x ".join(map(str, document["shape"])) + f", {document['dtype']}",
        "mean": ", ".join(f"{mean:{digits}}" for mean in document["channel_mean"])
        + " by channel, of the training split",
        "deviation": ", ".join(f"{std:{digits}}" for std in document["channel_std"]),
        "sources": _sources(document["inputs"]),
        "Arrow files": f"{len(files):,}, {in_bytes(sum(file['bytes'] for file in files))}, in "
        f"{directories[0]}{more}, below the storage root",
        "transform": _transform(document["transform"]),
        "limits": _limits(document["transform"], show),
        "left out": ", ".join(f"{n:,} by {why}" for why, n in document["left_out"].items())
        + (f"; by name such as {such_as}" if such_as else ""),
        "animated": f"{n:,}, of each the first frame" if (n := document["animated"]) else "",
        "refused": f"{document['refused']['count']:,}",
        "contact sheet": show(contact_sheet),
    }
    for heading, text in rows.items():
        if text:
            say(f"{heading:15}{text}")
    for lines in (_classes(document, show), _refused(document["refused"], show)):
        for line in ["", *lines] if lines else []:
            say(line)


def _sources(inputs: Sequence[Mapping[str, Any]]) -> str:
    counts = Counter(i["format"] for i in inputs if i["format"] != "files")
    parts = [f"{count:,} {kind}" for kind, count in counts.items()]
    if loose := sum(len(i["files"]) for i in inputs if i["format"] == "files"):
        parts.append(f"{loose:,} loose files")
    return ", ".join([*parts, in_bytes(sum(i["bytes"] for i in inputs))])


def _transform(data: Mapping[str, Any]) -> str:
    if data["sequence_shape"] is not None:
        return "none, sequences are kept as they are"
    draft = ", jpeg_draft" if data["jpeg_draft"] else ""
    return (
        f"resolution {data['resolution']}, mode {data['mode']}, fit {data['fit']}, resample "
        f"{data['resample']}, background {data['background']}{draft}"
    )


def _limits(data: Mapping[str, Any], show: Callable[[str, int], str]) -> str:
    """The settings by which something may be left out, refused or held out."""
    parts = [f"{split} {data[f'{split}_fraction']:g}" for split in ("validation", "test")]
    if data["sequence_shape"] is None:
        parts.append(f"max_pixels {data['max_pixels']:,}")
        parts.append(f"min_resolution_px {data['min_resolution_px']:,}")
    parts += [name for name in ("require_labels", "drop_duplicates") if data[name]]
    if labels := data["include_labels"]:
        named = ", ".join(show(str(label), LINE_CHARACTERS) for label in labels[:LABELS_SHOWN])
        more = f" and {len(labels) - LABELS_SHOWN:,} more" if len(labels) > LABELS_SHOWN else ""
        parts.append(f"include_labels {named}{more}")
    return ", ".join(parts)


def _classes(document: Mapping[str, Any], show: Callable[[str, int], str]) -> list[str]:
    """A table of how often each class is in each split; nothing where nothing has a label."""
    labels, unlabelled = document["labels"], document["unlabelled"]
    names = list(dict.fromkeys(name for counts in labels.values() for name in counts))
    if not names:
        return []
    table = [(f"classes ({len(names):,})", *labels)]
    for name in names[:CLASSES_SHOWN]:
        counts = (f"{counts.get(name, 0):,}" for counts in labels.values())
        table.append((show(name, LINE_CHARACTERS), *counts))
    lines = _aligned(table)
    if len(names) > CLASSES_SHOWN:
        lines.append(f"and {len(names) - CLASSES_SHOWN:,} more")
    if any(unlabelled.values()):
        lines.append("without label: " + ", ".join(f"{n:,} {s}" for s, n in unlabelled.items()))
    return lines


def _refused(refused: Mapping[str, Any], show: Callable[[str, int], str]) -> list[str]:
    """Reasons with their counts, then the first items."""
    items = refused["items"]
    if not items:
        return []
    counts = ((reason, f"{count:,}") for reason, count in refused["by_reason"].items())
    lines = _aligned([("refused", "count"), *counts])
    for item in items[:REFUSED_SHOWN]:
        source, detail = (show(item[key], LINE_CHARACTERS) for key in ("source", "detail"))
        lines.append(f"{source}: {item['reason']}, {detail}")
    if len(items) > REFUSED_SHOWN:
        more = len(items) - REFUSED_SHOWN
        lines.append(f"and {more:,} more, all in quarantine.jsonl, beside dataset-<hash>.json")
    return lines


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of a table, the first column flush left, the others flush right; never wrapped."""
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    return [
        (first + " " * (widths[0] - cell_len(first)))
        + "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
        for first, *cells in rows
    ]
