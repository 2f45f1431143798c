"""What `vitrail bench` measures, whom with, and how it shows that. What needs the libraries that it compares with is
skipped where they are not: `make bench` installs them in an environment of its own."""

import importlib.util
import itertools
import os
import re
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vitrail.cli import main
from vitrail.commands.commands import BENCH_TASKS
from vitrail.environment import describe
from vitrail.errors import BadInput
from vitrail.speed import bench, peers, speedpage
from vitrail.speed.bench import FLOORS, TASKS, Session, make_images
from vitrail.speed.operators import KINDS, OTHER, OUTSIDE, kind, profiled
from vitrail.speed.rounds import (
    FLOOR,
    OURS,
    Case,
    Row,
    Setting,
    build,
    cases,
    inference,
    interleaved,
    training,
    training_unit,
    warm_up,
)
from vitrail.vit import floor
from vitrail.vit.config import ViTConfig
from vitrail.vit.floor import Product, bandwidth, forward_flops, matrix_rate, product_seconds, products, training_flops
from vitrail.vit.model import VisionTransformer

CPU = torch.device("cpu")
TINY = ViTConfig(image_size=16, patch_size=8, hidden_size=16, mlp_dim=32, num_heads=2, num_layers=2, num_classes=3)
MISSING = [name for name, module in peers.MODULES.items() if importlib.util.find_spec(module) is None]
needs_peers = pytest.mark.skipif(
    bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (make bench installs them)"
)


@pytest.fixture(autouse=True)
def short_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floor, "SAMPLE_SECONDS", 1e-4)


def tiny(precision: Literal["fp32", "bf16"] = "fp32", **others: Any) -> Setting:
    alone: dict[str, Any] = {"rounds": 2, "seconds": 0.02, "cases": (Case("tiny", TINY, 4),)}
    return Setting(CPU, precision, **alone | {"contenders": {OURS: VisionTransformer}} | others)


# The floor


def test_products_of_a_forward_pass() -> None:
    """Written out: 5 tokens, 4 patches of 192 numbers, 2 heads of 8."""
    block = [
        Product(15, 16, 48), Product(5, 8, 5, 1, 6), Product(5, 5, 8, 1, 6), Product(15, 16, 16), Product(15, 16, 32),
        Product(15, 32, 16),
    ]  # fmt: skip
    last = [
        Product(3, 16, 16, 2), Product(15, 16, 32), Product(1, 8, 5, 1, 6), Product(1, 5, 8, 1, 6), Product(3, 16, 32),
        Product(3, 32, 16),
    ]  # fmt: skip
    ends = [Product(12, 192, 16), Product(3, 16, 3)]
    assert sum(p.flops for p in products(TINY, 3, False)) == sum(p.flops for p in [*ends, *block, *last])
    assert sum(p.flops for p in products(TINY, 3, False, every_token=True)) == sum(p.flops for p in [*ends, *block * 2])


def test_flops_of_a_known_model() -> None:
    """ViT-B/16: 17.6 G multiply-adds, as everyone counts them."""
    assert forward_flops(ViTConfig(), every_token=True) == pytest.approx(2 * 17.56e9, rel=1e-3)
    assert forward_flops(ViTConfig()) == pytest.approx(2 * 16.35e9, rel=1e-2)


@pytest.mark.parametrize("classifier", ["token", "gap"])
@pytest.mark.parametrize("every_token", [False, True])
def test_products_add_up_to_the_flops(classifier: Literal["token", "gap"], every_token: bool) -> None:
    config = replace(TINY, classifier=classifier, representation_size=24)
    for flops, train in ((forward_flops, False), (training_flops, True)):
        found = sum(product.flops for product in products(config, 7, train, every_token))
        assert found == 7 * flops(config, every_token=every_token)


def test_a_hybrid_has_other_products() -> None:
    with pytest.raises(ValueError, match="hybrid"):
        forward_flops(ViTConfig(image_size=32, patch_size=1, resnet_blocks=(1,)))


@pytest.mark.parametrize("classifier", ["token", "gap"])
def test_flops_are_those_that_torch_counts(classifier: Literal["token", "gap"]) -> None:
    config = replace(TINY, classifier=classifier)
    model, images = VisionTransformer(config), torch.rand(3, 3, 16, 16)
    # A fused attention's products are not counted on a CPU: there they are asked for one by one.
    with FlopCounterMode(display=False) as forward, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(images)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as both:
        F.cross_entropy(model(images), torch.zeros(3, dtype=torch.long)).backward()
    assert forward.get_total_flops() == 3 * forward_flops(config)
    assert both.get_total_flops() == 3 * training_flops(config)


def test_rates() -> None:
    pair = [Product(64, 64, 64), Product(16, 8, 16, batch=4)]
    for dtype in (torch.float32, torch.bfloat16):
        one = product_seconds(pair, CPU, dtype)
        assert 0 < one < 1
    many = product_seconds([replace(product, count=1000) for product in pair], CPU, torch.float32)
    assert many > 50 * product_seconds(pair, CPU, torch.float32)
    assert 1e7 < matrix_rate(CPU, torch.float32, size=64) < 1e15
    assert 1e7 < bandwidth(CPU) < 1e14


# Taking turns


def test_contenders_take_turns() -> None:
    calls: list[str] = []

    def contender(name: str, seconds: float, images: int) -> Callable[[], int]:
        def work() -> int:
            calls.append(name)
            time.sleep(seconds)
            return images

        return work

    found = interleaved(
        {"a": contender("a", 0.002, 10), "b": contender("b", 0.004, 10), "c": contender("c", 0.002, 5)},
        3, 0.03, lambda: calls.append("wait"),
    )  # fmt: skip
    assert {name: len(values) for name, values in found.items()} == {"a": 3, "b": 3, "c": 3}
    assert all(max(values) <= limit for values, limit in zip(found.values(), (5000, 2500, 2500), strict=True))
    order = [name for name, _ in itertools.groupby(call for call in calls if call != "wait")]
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"  # warming up, and three rounds
    assert calls[-1] == "wait"


def test_a_unit_longer_than_a_turn_is_done_three_times_in_each_and_once_before() -> None:
    calls = itertools.count()

    def work() -> int:
        time.sleep(0.01)
        return next(calls) * 0 + 1

    interleaved({"slow": work}, 3, 0.001, lambda: None)
    warm = next(calls) - 3 * (1 + 3)
    assert 2 <= warm <= 5


def test_warming_up_ends_when_units_take_the_same_time() -> None:
    done = []

    def work() -> int:
        done.append(1)
        time.sleep(0.5 if len(done) == 1 else 0.1)
        return 1

    assert warm_up(work, lambda: None) == pytest.approx(0.1, rel=0.5)
    assert 3 <= len(done) <= 5


# The tasks, on a model that is next to nothing


@pytest.mark.parametrize(
    ("task", "batches", "precision"), [(training, [4], "fp32"), (training, [4], "bf16"), (inference, [1, 64], "fp32")]
)
def test_a_task(task: Callable[[Setting], list[Row]], batches: list[int], precision: Literal["fp32", "bf16"]) -> None:
    rows = task(tiny(precision))
    assert [(row.contender, row.batch) for row in rows] == [(name, b) for b in batches for name in (OURS, FLOOR)]
    for row in rows:
        assert (row.task, row.model, row.device, row.precision) == (task.__name__, "tiny", "cpu", precision)
        assert (row.unit, len(row.values)) == ("images/s", 2)
        assert row.spread[0] <= row.median <= row.spread[1]
        assert row.spread[0] > 0


def test_the_profile_says_where_a_step_goes() -> None:
    case = Case("wide", replace(TINY, hidden_size=256, mlp_dim=1024, num_heads=4), 16)
    rows = profiled(replace(tiny(), cases=(case,)))
    found = {row.contender: row.median for row in rows}
    assert sum(found.values()) == pytest.approx(100)
    assert list(found) == sorted(found, key=lambda name: -found[name])
    assert {"matrix products", "GELU", "LayerNorm", "AdamW", "softmax of attention", OUTSIDE} <= set(found)
    assert set(found) <= {*KINDS, OTHER, OUTSIDE}
    names = {"addmm": "matrix products", "add_": "additions and products", "gelu_backward": "GELU", "view": OTHER}
    assert {name: kind(name) for name in names} == names


def test_every_contender_has_a_head_that_tells() -> None:
    rebuilt = {"a": VisionTransformer, "b": lambda config: VisionTransformer(replace(config, representation_size=5))}
    model: Any
    for model in build(TINY, tiny(contenders=rebuilt)).values():
        assert model.head.weight.std() > 0.1
        F.cross_entropy(model(torch.rand(2, 3, 16, 16)), torch.tensor([0, 1])).backward()
        assert all(weight.grad is not None and weight.grad.any() for weight in model.parameters())


def test_a_training_unit_trains() -> None:
    model = VisionTransformer(TINY)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    assert training_unit(model, Case("tiny", TINY, 4), tiny())() == 4
    changed = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert {"head.weight", "head.bias"} <= changed  # the rest has no gradient as long as the head is zero
    assert all(weight.grad is None for weight in model.parameters())


def test_what_is_measured() -> None:
    assert [(case.name, case.batch) for case in cases(CPU)] == [("VIT-12", 128), ("ViT-B/16", 8)]
    assert [case.batch for case in cases(torch.device("cuda"))] == [128, 128]
    assert tuple(TASKS) == BENCH_TASKS
    assert list(tiny(contenders=Setting(CPU, "fp32", 1, 1, ()).contenders).contenders) == [OURS, *peers.PEERS]


def test_memory() -> None:
    config = replace(TINY, hidden_size=256, mlp_dim=1024, num_heads=4)
    (row,) = bench.memory(tiny(cases=(Case("small", config, 8),)))
    weights = sum(weight.numel() for weight in VisionTransformer(config).parameters()) * 4 / 1e6  # MB
    assert (row.task, row.contender, row.batch, row.unit) == ("memory", OURS, 8, "MB")
    assert 3 * weights < row.median < 10 * weights + 100  # with gradients and two momenta, it is four times the weights


def test_start() -> None:
    rows = bench.started({"nothing": ("-c", "pass"), "a nap": ("-c", "import time; time.sleep(0.5)")}, tiny())
    assert [(row.task, row.contender, row.unit, len(row.values)) for row in rows] == [
        ("start", "nothing", "s", 2), ("start", "a nap", "s", 2),
    ]  # fmt: skip
    assert rows[1].median > rows[0].median > 0
    with pytest.raises(RuntimeError, match=r"broken ended with status 1:\n(.|\n)*no such thing"):
        bench.started({"broken": ("-c", "raise ValueError('no such thing')")}, tiny())


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    make_images(folder, 160)
    return folder


def test_images_that_are_made(images: Path, tmp_path: Path) -> None:
    files = sorted(images.rglob("*.jpg"))
    assert len(files) == 160
    assert {file.parent.parent for file in files} == {images / "train"}
    assert 1800 < sum(file.stat().st_size for file in files) / len(files) < 2100
    make_images(tmp_path, 1)
    assert (tmp_path / "train/class-00/0000.jpg").read_bytes() == files[0].read_bytes()


@pytest.mark.parametrize("rotate", [False, True])
def test_our_input(images: Path, rotate: bool) -> None:
    unit = bench.our_input(images, rotate, CPU)
    assert [unit(), unit()] == [128, 128]


def test_a_data_set_is_made_where_none_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "IMAGES", 20)
    before = os.environ.get("VITRAIL_CACHE")
    with bench.a_data_set(None) as folder:
        assert len(list(folder.rglob("*.jpg"))) == 20
        assert os.environ["VITRAIL_CACHE"] == str(folder.parent / "cache")
    assert os.environ.get("VITRAIL_CACHE") == before
    assert not folder.exists()


def test_data_that_will_not_do(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="has no folders train/CLASS"), bench.a_data_set(tmp_path):
        pass
    (tmp_path / "train" / "cat").mkdir(parents=True)
    with pytest.raises(BadInput, match="cat has none of the files"), bench.a_data_set(tmp_path):
        pass
    Image.new("RGB", (80, 64)).save(tmp_path / "train" / "cat" / "1.png")
    with pytest.raises(BadInput, match=r"1\.png has 80 × 64 pixels"), bench.a_data_set(tmp_path):
        pass


# The table, the page, the plot


def row(contender: str, *values: float, task: Any = "training", unit: Any = "images/s", **others: Any) -> Row:
    given: dict[str, Any] = {"model": "VIT-12", "device": "cpu", "precision": "fp32", "batch": 128, "note": ""} | others
    return Row(task=task, contender=contender, unit=unit, values=values, **given)


def session(*rows: Row, **environment: Any) -> Session:
    about = describe(CPU) | {"peers": {"timm": "1.0", "vit-pytorch": "1.1"}, "cpu": "A Processor", "cores": 2}
    return Session(about | environment, {"fp32": 250e9}, 12e9, rows)


def found() -> Session:
    return session(
        row(OURS, 60, 50, 70), row("timm", 40, 40, 44), row("vit-pytorch", 48, 50, 52, note="no biases"),
        row(FLOOR, 75, 85, note="5.00 GFLOP an image"),
        row(OURS, 900, task="memory", unit="MB"), row("timm", 1200, task="memory", unit="MB"),
        row("vitrail -h", 0.05, task="start", model="", precision="", batch=0, unit="s"),
    )  # fmt: skip


def test_table() -> None:
    flops, training = training_flops(cases(CPU)[0].config), "training, VIT-12, batch 128, fp32"
    assert speedpage.table_rows(found()) == [
        (training, OURS, "60.0 images/s", "50.0 – 70.0", "1.20", "75%", f"{60 * flops / 250e9:.0%}"),
        ("", "timm", "40.0 images/s", "40.0 – 44.0", "0.80", "50%", f"{40 * flops / 250e9:.0%}"),
        ("", "vit-pytorch", "50.0 images/s", "48.0 – 52.0", "1.00", "62%", f"{50 * flops / 250e9:.0%}"),
        ("", FLOOR, "80.0 images/s", "75.0 – 85.0", "", "", f"{80 * flops / 250e9:.0%}"),
        ("memory, VIT-12, batch 128, fp32", OURS, "900 MB", "", "1.33", "", ""),
        ("", "timm", "1,200 MB", "", "1.00", "", ""),
        ("start", "vitrail -h", "0.05 s", "", "", "", ""),
    ]  # fmt: skip
    assert all(len(cells) == len(speedpage.COLUMNS) for cells in speedpage.table_rows(found()))
    assert speedpage.notes(found().rows) == [
        "vit-pytorch: no biases", "training, VIT-12, batch 128, fp32: 5.00 GFLOP an image",
    ]  # fmt: skip


def test_page(tmp_path: Path) -> None:
    page, kept = tmp_path / "docs" / "speed.md", tmp_path / "results" / "speed" / "a-processor-2-cores.json"
    speedpage.write_page(page, measured := found())
    text = page.read_text("utf-8")
    assert text.startswith("# Speed")
    assert text.count("<!-- bench a-processor-2-cores -->") == text.count("<!-- end a-processor-2-cores -->") == 1
    assert "| training, VIT-12, batch 128, fp32 | vitrail | 60.0 images/s | 50.0 – 70.0 | 1.20 | 75% |" in text
    assert "![" in text
    assert "(images/speed-a-processor-2-cores.svg)" in text
    assert re.search(
        r"^1\. .*UTC, `.*`, commit .*, torch 2.*, timm 1\.0, .* 250 GFLOP/s in fp32, a copy 12\.0 GB/s\.$", text, re.M
    )
    assert speedpage.read_record(kept) == [measured]


def test_what_is_measured_again_takes_the_place_of_what_was_there(tmp_path: Path) -> None:
    page = tmp_path / "docs" / "speed.md"
    page.parent.mkdir()
    page.write_text("# My title\nabove\n")
    speedpage.write_page(page, found())
    page.write_text(page.read_text("utf-8") + "below\n")
    speedpage.write_page(page, session(row("timm", 1.5), gpu="A GPU"))
    speedpage.write_page(page, session(row(OURS, 61), row("timm", 41), row(OURS, 99, precision="bf16")))
    text = page.read_text("utf-8")
    assert text.startswith("# My title\nabove\n\n<!-- bench a-processor-2-cores -->\n## A Processor, 2 cores\n")
    assert "\nbelow\n" in text
    assert text.endswith("<!-- end a-gpu -->\n")
    assert text.count("<!-- bench ") == 2
    ours = text[: text.index("below")]
    assert "50.0 – 70.0" not in ours  # the group was measured again, all of it
    cells = re.findall(r"^\| ([^|]*) \| ([^|]*) \| ([^|]*) \|.* (\d) \|$", ours, re.M)
    assert cells == [
        ("training, VIT-12, batch 128, bf16", OURS, "99.0 images/s", "2"),
        ("training, VIT-12, batch 128, fp32", OURS, "61.0 images/s", "2"), ("", "timm", "41.0 images/s", "2"),
        ("memory, VIT-12, batch 128, fp32", OURS, "900 MB", "1"), ("", "timm", "1,200 MB", "1"),
        ("start", "vitrail -h", "0.05 s", "1"),
    ]  # fmt: skip
    assert len(re.findall(r"^\d\. ", ours, re.M)) == 2


def test_a_page_or_record_that_is_not_as_it_was_written(tmp_path: Path) -> None:
    page = tmp_path / "docs" / "speed.md"
    speedpage.check_page(page, found().environment)
    assert list(tmp_path.iterdir()) == []
    speedpage.write_page(page, found())
    whole = page.read_text("utf-8")
    page.write_text(whole.replace("<!-- end a-processor-2-cores -->\n", ""))
    with pytest.raises(BadInput, match="no <!-- end a-processor-2-cores -->"):
        speedpage.check_page(page, found().environment)
    page.write_text(whole)
    (tmp_path / "results" / "speed" / "a-processor-2-cores.json").write_text('[{"rows": 3}]')
    with pytest.raises(BadInput, match="is not as vitrail bench wrote it"):
        speedpage.write_page(page, found())
    assert page.read_text("utf-8") == whole
    with pytest.raises(BadInput, match="is a folder"):
        speedpage.check_page(tmp_path, found().environment)


def test_a_record_of_another_machine_is_added_to_the_page(tmp_path: Path) -> None:
    there, page = tmp_path / "there" / "docs" / "speed.md", tmp_path / "here" / "docs" / "speed.md"
    speedpage.write_page(
        there, session(row(OURS, 60), gpu="A GPU", command="vitrail bench --data '/home/me/my images'")
    )
    speedpage.write_page(page, found())
    before = page.read_text("utf-8")
    kept = tmp_path / "there" / "results" / "speed" / "a-gpu.json"
    assert speedpage.add_record(page, kept) == 1
    assert page.read_text("utf-8").startswith(before.rstrip())
    assert "60.0 images/s" in page.read_text("utf-8").removeprefix(before)
    assert "`vitrail bench --data 'my images'`" in page.read_text("utf-8")  # where it lay is nobody's business
    assert (tmp_path / "here" / "results" / "speed" / "a-gpu.json").read_text() == kept.read_text()
    with pytest.raises(BadInput, match=r"other\.json has no rows"):
        speedpage.add_record(page, tmp_path / "other.json")


def test_the_machines_rate_is_the_highest_that_was_measured(tmp_path: Path) -> None:
    page = tmp_path / "docs" / "speed.md"
    disturbed = replace(found(), matrix_rate={"fp32": 100e9})
    speedpage.write_page(page, disturbed)
    speedpage.write_page(
        page, session(row("vitrail -h", 0.05, task="start", model="", precision="", batch=0, unit="s"))
    )
    share = f"{60 * training_flops(cases(CPU)[0].config) / 250e9:.0%}"
    assert f"| vitrail | 60.0 images/s | 50.0 – 70.0 | 1.20 | 75% | {share} | 1 |" in page.read_text("utf-8")


def test_plot() -> None:
    rows = [row("t<m", 40), row(OURS, 60), row(FLOOR, 80)]
    more = [replace(each, task="inference", batch=batch) for each in rows for batch in (1, 64)]
    drawn = speedpage.plot([*found().rows[4:], *rows, *more, replace(rows[0], model="ViT-B/16")], "A & B")
    assert drawn is not None
    svg = ET.fromstring(drawn)
    texts = ["".join(text.itertext()) for text in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert texts[:2] == ["training, VIT-12, batch 128, fp32: images/s", "t<m"]
    assert texts.count("floor 80.0") == 2
    assert "inference, VIT-12, batch 64, fp32: images/s" in texts
    assert not any("batch 1," in text or "B/16" in text for text in texts)
    peer, ours = (float(bar.attrib["width"]) for bar in list(svg.iter("{http://www.w3.org/2000/svg}rect"))[:2])
    assert ours / peer == pytest.approx(1.5, rel=1e-2)
    assert "prefers-color-scheme: dark" in drawn
    assert speedpage.plot(found().rows[4:], "") is None


# The command


def test_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "trainign"]) == 2
    assert "'trainign' is not one of training, profile, inference, input, memory, start; did you mean 'training'?" in (
        capsys.readouterr().err
    )


@pytest.mark.skipif(not MISSING, reason="the libraries are installed here")
def test_a_library_that_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "start", "--device=cpu"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.search(r"not installed.*pip install 'vitrail\[bench\]'.*make bench", err)


# What needs the libraries


def parameters(model: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters())


@needs_peers
@pytest.mark.parametrize("name", peers.PEERS)
@pytest.mark.parametrize("config", [TINY, ViTConfig()], ids=["tiny", "ViT-B/16"])
def test_peers_are_the_same_model(name: str, config: ViTConfig) -> None:
    with torch.device("meta") if name != "vit-pytorch" else torch.device("cpu"):
        peer, ours = peers.PEERS[name](config), VisionTransformer(config)
    other = {  # three biases for each block less, two LayerNorms around the patch projection more
        "vit-pytorch": 2 * (3 * config.patch_size**2 + config.hidden_size) - 3 * config.hidden_size * config.num_layers
    }
    assert parameters(peer) - parameters(ours) == other.get(name, 0)
    assert (name in other) == (name in peers.DIFFERENCES)
    activations = [module for module in peer.modules() if isinstance(module, torch.nn.GELU)]
    assert all(module.approximate == "tanh" for module in activations)
    assert len(activations) == (0 if name == "transformers" else config.num_layers)
    norms = [module for module in peer.modules() if isinstance(module, torch.nn.LayerNorm)]
    assert len(norms) >= 2 * config.num_layers + 1
    assert {module.eps for module in norms} == {1e-6}
    assert not any(module.p for module in peer.modules() if isinstance(module, torch.nn.Dropout))


@needs_peers
def test_outputs_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("tiny", replace(TINY, hidden_size=64, mlp_dim=256), 4)
    found = peers.same_outputs(case.config, CPU, case.batch)
    assert found["logits"] < 1e-5
    assert found["gradients"] < 1e-4
    bench.check_outputs(case, CPU)
    monkeypatch.setattr(peers, "with_official_details", lambda model: model.apply(double_norms))
    with pytest.raises(RuntimeError, match="tiny: with the same weights, the logits of Vitrail and timm differ by"):
        bench.check_outputs(case, CPU)


def double_norms(module: torch.nn.Module) -> None:
    if isinstance(module, torch.nn.LayerNorm):
        module.eps = 0.1


@needs_peers
def test_gradients_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = VisionTransformer.forward
    # the same logits, other gradients
    monkeypatch.setattr(
        VisionTransformer, "forward", lambda model, images: 2 * plain(model, images) - plain(model, images).detach()
    )
    with pytest.raises(RuntimeError, match="tiny: with the same weights, the gradients of Vitrail and timm differ by"):
        bench.check_outputs(Case("tiny", replace(TINY, hidden_size=64, mlp_dim=256), 4), CPU)


@needs_peers
def test_peers_compute_every_token() -> None:
    peer = peers.build_vit_pytorch(TINY)
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(peer(torch.rand(3, 3, 16, 16)), torch.zeros(3, dtype=torch.long)).backward()
    # It normalises patches before they are projected, so that the projection's input has a gradient too.
    projection = 2 * TINY.grid**2 * 3 * TINY.patch_size**2 * TINY.hidden_size
    assert counter.get_total_flops() == 3 * (training_flops(TINY, every_token=True) + projection)


@needs_peers
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("rotate", [False, True])
def test_image_folder(images: Path, rotate: bool, workers: int) -> None:
    loader = peers.image_folder_loader(images / "train", 64, 128, workers, rotate)
    batches = iter(loader)
    seen = [next(batches) for _ in range(3)]  # more than the 160 that there are
    for batch, labels in seen:
        assert batch.shape == (128, 3, 64, 64)
        assert -1 <= batch.min() < -0.5 < 0.5 < batch.max() <= 1
        assert set(labels.tolist()) <= set(range(20))
    black = (torch.cat([batch for batch, _ in seen])[:, :, 0, 0] == -1).all(dim=1).float().mean()
    assert (black > 0.5) == rotate  # corners that a rotation leaves


@needs_peers
def test_all_of_it(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setting = Setting(CPU, "fp32", 1, 0.05, (Case("tiny", TINY, 4),), images)
    *before, measured = bench.measure(("training", "inference", "input", "memory"), setting)
    assert [len({row.task for row in each.rows}) for each in before] == [1, 2, 3]  # what there is after each task
    of = {task: [row.contender for row in measured.rows if row.task == task] for task in TASKS}
    assert of["training"] == [OURS, *peers.PEERS, FLOOR]
    assert of["inference"] == [OURS, *peers.PEERS, FLOOR] * 2
    assert of["input"] == [OURS, "ImageFolder, 0 workers", "ImageFolder, 2 workers", FLOORS[1]] * 2
    assert of["memory"] == [OURS, *peers.PEERS]
    assert all(value > 0 for row in measured.rows if row.task != "memory" for value in row.values)
    assert "logits of Vitrail and timm differ by" in capsys.readouterr().err
    assert measured.environment["peers"].keys() == peers.MODULES.keys()
    speedpage.write_page(tmp_path / "docs" / "speed.md", measured)
    (kept,) = (tmp_path / "results" / "speed").iterdir()
    assert speedpage.read_record(kept) == [measured]


@needs_peers
def test_start_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = bench.start(tiny(rounds=1))
    assert [row.contender for row in rows] == ["vitrail -h", "vitrail train digits, one step", "import timm"]
