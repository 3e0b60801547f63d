"""Hostile input, in a process of its own: python fuzz.py DIRECTORY SEED COUNT.

Makes good files of every format, mutates each into malformed ones, and preprocesses them. The last
line is a JSON object: how many files of which kind, what became of them, and the peak memory. A
crash or a hang ends the process; the last file that was begun is the last line then.
"""

import faulthandler
import gzip
import io
import json
import resource
import sys
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline.convert import preprocess_shard
from pipeline.settings import DataConfig
from pipeline.sources import list_inputs
from pipeline.storage import LocalStorage
from pipeline.units import unit_directory

HANG_S = 30
SIDE, NUM_ITEMS = 24, 6
RNG = np.random.default_rng(0)


def picture(kind: str, **options: Any) -> bytes:
    """A good image file."""
    mode = options.pop("mode", "RGB")
    shape = (SIDE, SIDE) if mode in ("L", "I;16") else (SIDE, SIDE, len(mode))
    high = 65536 if mode == "I;16" else 256
    pixels = RNG.integers(0, high, shape).astype(np.uint16 if mode == "I;16" else np.uint8)
    image = Image.fromarray(pixels) if mode == "I;16" else Image.fromarray(pixels, mode)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def animation() -> bytes:
    frames = [Image.fromarray(RNG.integers(0, 256, (SIDE, SIDE), np.uint8)) for _ in range(3)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def make_images() -> dict[str, bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "rgb.jpg": picture("JPEG"),
        "progressive.jpg": picture("JPEG", progressive=True, exif=exif),
        "cmyk.jpg": picture("JPEG", mode="CMYK"),
        "grey.png": picture("PNG", mode="L"),
        "alpha.png": picture("PNG", mode="RGBA"),
        "deep.png": picture("PNG", mode="I;16"),
        "lossy.webp": picture("WEBP"),
        "moving.webp": animation(),
        "plain.bmp": picture("BMP"),
        "raw.tif": picture("TIFF"),
        "deflated.tiff": picture("TIFF", compression="tiff_adobe_deflate"),
        "lzw.tiff": picture("TIFF", compression="tiff_lzw"),
    }


def make_tar(mode: Any) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for k in range(NUM_ITEMS):
            for suffix, content in (("png", picture("PNG")), ("cls", str(k).encode())):
                entry = tarfile.TarInfo(f"{'long/' * 30 if k == 2 else ''}{k:03d}.{suffix}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def make_zip(compression: int, members: dict[str, bytes] | None = None) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        if members is None:
            members = {f"{'ab'[k % 2]}/{k}.png": picture("PNG") for k in range(NUM_ITEMS)}
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def make_parquet(columns: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, row_group_size=4, write_page_checksum=True)
    return buffer.getvalue()


def make_idx() -> bytes:
    header = b"\0\0\x08\x03" + np.array([NUM_ITEMS, SIDE, SIDE], ">u4").tobytes()
    return header + RNG.integers(0, 256, NUM_ITEMS * SIDE * SIDE, np.uint8).tobytes()


def make_npy(*shape: int, dtype: str = "<f4") -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, RNG.normal(size=shape).astype(dtype))
    return buffer.getvalue()


def make_npz(save: Callable[..., None]) -> bytes:
    buffer = io.BytesIO()
    values = RNG.normal(size=(NUM_ITEMS, 2, 16)).astype(np.float32)
    save(buffer, sequence=values, label=np.arange(NUM_ITEMS))
    return buffer.getvalue()


def make_shards() -> dict[str, bytes]:
    pictures = [picture("PNG") for _ in range(NUM_ITEMS)]
    structs = [{"bytes": content, "path": f"{k}.png"} for k, content in enumerate(pictures)]
    return {
        "plain.tar": make_tar("w"),
        "zipped.tar.gz": make_tar("w:gz"),
        "squeezed.tar.bz2": make_tar("w:bz2"),
        "tight.tar.xz": make_tar("w:xz"),
        "stored.zip": make_zip(zipfile.ZIP_STORED),
        "deflated.zip": make_zip(zipfile.ZIP_DEFLATED),
        "bytes.parquet": make_parquet({"image": pictures, "label": list(range(NUM_ITEMS))}),
        "struct.parquet": make_parquet({"image": structs, "label": list("abcabc")}),
        "a-images-idx3-ubyte": make_idx(),
        "b-images-idx3-ubyte.gz": gzip.compress(make_idx()),
    }


def make_sequences() -> dict[str, bytes]:
    nested = RNG.normal(size=(NUM_ITEMS, 2, 16)).astype(np.float32).tolist()
    return {
        "one.npy": make_npy(2, 16),
        "single.npy": make_npy(NUM_ITEMS, 2, 16),
        "double.npy": make_npy(4 * NUM_ITEMS, 2, 16, dtype="<f8"),
        "plain.npz": make_npz(np.savez),
        "deflated.npz": make_npz(np.savez_compressed),
        "rows.parquet": make_parquet({"sequence": nested, "label": list(range(NUM_ITEMS))}),
    }


def mutate(content: bytes, others: list[bytes], rng: np.random.Generator) -> bytes:
    """One of the ways in which files go wrong, or are made to."""
    out = bytearray(content)
    edge = min(len(out), 600)
    match rng.integers(0, 8):
        case 0:  # flipped bits anywhere
            for place in rng.integers(0, len(out), rng.integers(1, 32)):
                out[place] ^= 1 << int(rng.integers(0, 8))
        case 1:  # flipped bits where headers are
            for place in rng.integers(0, edge, rng.integers(1, 4)):
                out[place] ^= 1 << int(rng.integers(0, 8))
        case 2:  # cut short
            del out[int(rng.integers(0, len(out))) :]
        case 3:  # the head of another format
            head = others[int(rng.integers(0, len(others)))][: int(rng.integers(4, 200))]
            out[: len(head)] = head
        case 4:  # hostile sizes
            size = bytes([rng.choice([0xFF, 0x7F, 0x00]), 0xFF, 0xFF, rng.choice([0xFF, 0x7F])])
            for _ in range(int(rng.integers(1, 4))):
                start = int(rng.integers(0, edge))
                place = start if rng.random() < 0.5 else max(0, len(out) - 1 - start)
                out[place : place + 4] = size
        case 5:  # a hole
            start = int(rng.integers(0, len(out)))
            width = int(rng.integers(1, 700))
            out[start : start + width] = bytes(len(out[start : start + width]))
        case 6:  # a piece twice, or gone
            start = int(rng.integers(0, len(out)))
            piece = out[start : start + int(rng.integers(1, 2000))]
            out[start:start] = piece if rng.random() < 0.5 else b""
            if rng.random() < 0.5:
                del out[start : start + len(piece)]
        case _:  # noise
            start = int(rng.integers(0, len(out)))
            noise = rng.integers(0, 256, int(rng.integers(1, 300)), np.uint8).tobytes()
            out[start : start + len(noise)] = noise
    return bytes(out)


def preprocess_all(source: Path, root: Path, **settings: Any) -> list[dict[str, Any]]:
    """What became of every shard of a source: sources accepted and refused."""
    data = DataConfig.model_validate({"sources": (str(source),), **settings})
    storage = LocalStorage(str(root))
    found = []
    for shard in list_inputs(data, storage).shards:
        print(f"began {shard.name}", flush=True)
        faulthandler.dump_traceback_later(HANG_S, exit=True)
        manifest = preprocess_shard(shard, data, storage)
        faulthandler.cancel_dump_traceback_later()
        directory = root / unit_directory(shard, data)
        accepted = [
            source
            for file in manifest["files"]
            for source in pa.ipc.open_file(str(directory / file["file"]))
            .read_all()["source"]
            .to_pylist()
        ]
        refused = [item["source"] for item in manifest["refused"]]
        reasons = [item["reason"] for item in manifest["refused"]]
        found.append(
            {
                "shard": shard.name,
                "files": [file.name for file in shard.files],
                "accepted": accepted,
                "refused": refused,
                "reasons": reasons,
                "left_out": manifest["left_out"],
            }
        )
    return found


def main() -> None:
    directory, seed, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    rng = np.random.default_rng(seed)
    images, shards, sequences = make_images(), make_shards(), make_sequences()
    everything = list((images | shards | sequences).values())
    share = count // len(everything) + 1

    def write_mutants(folder: str, good: dict[str, bytes], per_format: int) -> dict[str, bytes]:
        (directory / folder).mkdir(parents=True)
        made = {}
        for name, content in good.items():
            for k in range(per_format):
                made[f"{k:04d}-{name}"] = mutate(content, everything, rng)
        for name, content in made.items():
            (directory / folder / name).write_bytes(content)
        return made

    loose = write_mutants("images", images, share)
    write_mutants("shards", shards, share)
    write_mutants("sequences", sequences, share)
    # Malformed images inside sound archives.
    (directory / "packed").mkdir()
    with tarfile.open(directory / "packed" / "a.tar", "w") as tar:
        for name, content in loose.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    (directory / "packed" / "a.zip").write_bytes(make_zip(zipfile.ZIP_STORED, loose))
    rows = [{"bytes": content, "path": name} for name, content in loose.items()]
    (directory / "packed" / "a.parquet").write_bytes(make_parquet({"image": rows}))

    root = directory / "root"
    as_images = {"resolution": 16, "mode": "RGB", "max_pixels": 1 << 22}
    outcomes = {
        "loose": preprocess_all(directory / "images", root, **as_images),
        "packed": preprocess_all(directory / "packed", root, **as_images),
        "shards": preprocess_all(directory / "shards", root, **as_images),
        "sequences": preprocess_all(directory / "sequences", root, sequence_shape=(2, 16)),
    }
    reasons = Counter(r for found in outcomes.values() for unit in found for r in unit["reasons"])
    document = {
        "num_items": {"one.npy": 1, "double.npy": 4 * NUM_ITEMS, "": NUM_ITEMS},
        "num_files": share * len(everything),
        "loose": sorted(loose),
        "outcomes": outcomes,
        "reasons": dict(reasons.most_common()),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
