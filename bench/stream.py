"""Trains from more images than are to be decoded at once, and measures what that takes: resident memory, and images/s
beside those of the decoders alone.

    python bench/stream.py FOLDER [--images 20000] [--workers 1 2 4]

makes the JPEGs in FOLDER where there is no such folder: 500 × 375 pixels, smooth fields of colour with noise on them,
of about 80 kB, as photographs of that size have. It prints Markdown tables to stdout.
"""

import argparse
import importlib.util
import io
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vitrail.data import cache, stream, workers
from vitrail.data.archives import cache_root
from vitrail.data.workers import cores
from vitrail.input.pixels import pixels_of

WIDTH, HEIGHT = 500, 375
CLASSES = 10
SIZE = 224
# Random squares of the images, and a model that costs little beside decoding: it is the input that is measured.
RECIPE = [
    "vit-12", f"--image-size={SIZE}", "--patch-size=32", "--hidden-size=16", "--mlp-dim=16", "--num-heads=1",
    "--num-layers=1", "--epochs=1", "--batch-size=100", "--device=cpu", "--flip=none", "--rotate=0", "--precision=auto",
]  # fmt: skip


def make(folder: str, numbers: range) -> None:
    """Writes JPEGs; each is a function of its number."""
    for number in numbers:
        random = np.random.default_rng(number)
        fields = Image.fromarray(random.integers(0, 256, (9, 12, 3), np.uint8)).resize((WIDTH, HEIGHT), Image.BICUBIC)
        noise = random.normal(0, 14, (HEIGHT, WIDTH, 1)).astype(np.float32)
        pixels = (np.asarray(fields) + noise).clip(0, 255).astype(np.uint8)
        path = Path(folder) / f"class-{number % CLASSES}" / f"{number:06}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=88)
        path.write_bytes(buffer.getvalue())


def family(root: int) -> list[int]:
    """A process and all that descend from it."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue  # it has ended
    found = [root]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def resident(pids: list[int]) -> tuple[int, int]:
    """Bytes in memory of these processes: what they share counted once (PSS), and as often as they share it (RSS)."""
    once = often = 0
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
        except OSError:
            continue
        sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
        once, often = once + sizes["Pss"], often + sizes["Rss"]
    return once, often


def seconds_of(pid: int) -> float:
    """Processor time of a process so far."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def train(folder: Path, output: Path) -> dict[str, float]:
    """A run by streaming: its rate, the most memory of all its processes, and processor time an image."""
    command = [sys.executable, "-m", "vitrail", "train", *RECIPE, "--stream", f"--data={folder}", f"--output={output}"]
    process = subprocess.Popen(command)
    peaks, seconds, done = [(0, 0)], {}, threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            pids = family(process.pid)
            peaks.append(resident(pids))
            seconds.update({pid: spent for pid in pids if (spent := seconds_of(pid))})

    watcher = threading.Thread(target=watch)
    watcher.start()
    status = process.wait()
    done.set()
    watcher.join()
    if status:
        raise SystemExit(status)
    metrics = json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])
    images = metrics["samples_seen"] * 1.25  # those it was judged by, a fifth of all, were decoded too
    main = seconds.pop(process.pid)
    return {
        "rate": metrics["images_per_second"], "once": max(peak[0] for peak in peaks),
        "often": max(peak[1] for peak in peaks), "main": main / images, "workers": sum(seconds.values()) / images,
    }  # fmt: skip


def streamed(data: str, count: int) -> float:
    """Images/s of the workers where nothing else is done with the images."""
    images = cache.load(data, SIZE, stream=True).splits["train"]
    index = np.random.default_rng(0).permutation(len(images))[:count].tolist()
    for _ in images.read(index[: images.ahead]):  # the workers start
        pass
    began = time.perf_counter()
    for start in range(0, len(index), 100):
        images.expect(index[start : start + 100 + images.ahead])
        for _ in images.read(index[start : start + 100]):
            pass
    return len(index) / (time.perf_counter() - began)


def cached(folder: Path, some: int) -> tuple[float, float]:
    """Images/s of decoding into the cache, and of squares cut from what is mapped, in random order, by one thread."""
    with tempfile.TemporaryDirectory(dir=cache_root()) as root:
        for path in sorted(folder.rglob("*.jpg"), key=lambda path: path.name)[:some]:
            link = Path(root) / "few" / path.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path.resolve())
        before = os.environ.get("VITRAIL_CACHE")
        os.environ["VITRAIL_CACHE"] = f"{root}/cache"
        began = time.perf_counter()
        dataset = cache.load(f"{root}/few", SIZE)
        seconds = time.perf_counter() - began
        pixels = pixels_of(dataset.splits["train"], SIZE, torch.device("cpu"))
        torch.set_num_threads(1)
        order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
        began = time.perf_counter()
        for index in order.split(100):
            pixels.cut(index, torch.full((len(index), 2), 0.5))
        rate = len(order) / (time.perf_counter() - began)
        os.environ.pop("VITRAIL_CACHE") if before is None else os.environ.update(VITRAIL_CACHE=before)
    return some / seconds, rate


def as_parquet(folder: Path, count: int) -> str | None:
    """The address of a Parquet file with some of the images; None where there is no library for it."""
    if importlib.util.find_spec("datasets") is None:
        return None
    import datasets

    file = folder.with_name(f"{folder.name}-{count}.parquet")
    if not file.exists():
        paths = sorted(folder.rglob("*.jpg"), key=lambda path: path.name)[:count]
        names = sorted({path.parent.name for path in paths})
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
        rows = {"image": [{"bytes": path.read_bytes(), "path": None} for path in paths],
                "label": [names.index(path.parent.name) for path in paths]}  # fmt: skip
        datasets.Dataset.from_dict(rows, features=features).to_parquet(file)
    return f"hf:{file}"


def rates(folder: Path, counts: list[int], some: int) -> float:
    """Prints the rates of each way by the number of workers; returns that of streaming with the last number."""
    parquet, found = as_parquet(folder, some), dict[str, list[str]]()
    for count in counts:
        for module in (workers, stream):
            module.cores = lambda count=count: count
        alone = streamed(str(folder), some)
        decoding, mapped = cached(folder, some)
        rows = {"streamed from the folder": alone, "streamed from Parquet": parquet and streamed(parquet, some),
                "decoded into the cache": decoding, "cut from the cache, by one thread": mapped}  # fmt: skip
        for name, rate in rows.items():
            found.setdefault(name, []).append(f"{rate:,.0f}" if rate else "–")
    print(f"| images/s with workers: | {' | '.join(map(str, counts))} |\n| --- |{' ---: |' * len(counts)}")
    for name, cells in found.items():
        print(f"| {name} | {' | '.join(cells)} |")
    return alone


def main() -> None:
    """Makes the images, and prints what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument(
        "--workers", type=int, nargs="*", default=[], help="numbers of them to measure beside all cores"
    )
    args = parser.parse_args()
    if not args.folder.exists():
        print(f"making {args.images:,} JPEGs in {args.folder} …", file=sys.stderr)
        tasks = [range(start, min(start + 100, args.images)) for start in range(0, args.images, 100)]
        with multiprocessing.Pool() as pool:
            pool.starmap(make, [(str(args.folder), task) for task in tasks], chunksize=1)
    size = sum(path.stat().st_size for path in args.folder.rglob("*.jpg")) / args.images
    print(
        f"{args.images:,} JPEGs of {WIDTH} × {HEIGHT}, {size / 1e3:.0f} kB each, for {SIZE} pixels; {cores()} cores\n"
    )
    counts = [*(count for count in args.workers if count != cores()), cores()]
    alone = rates(args.folder, counts, min(args.images * 4 // 5, 4000))
    with tempfile.TemporaryDirectory() as folder:
        found = train(args.folder, Path(folder) / "run")
    print("\n| training from the stream | |\n| --- | ---: |")
    print(f"| images/s | {found['rate']:,.0f} |\n| of the workers alone | {found['rate'] / alone:.0%} |")
    print(f"| resident memory of all processes | {found['once'] / 1e9:.2f} GB |")
    print(f"| the same, shared pages counted in each | {found['often'] / 1e9:.2f} GB |")
    print(f"| processor time an image, workers | {found['workers'] * 1e3:.2f} ms |")
    print(f"| processor time an image, the rest | {found['main'] * 1e3:.2f} ms |")


if __name__ == "__main__":
    main()
