"""Analyse runs, models of timm, and two models side by side, and open the report in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from deepvit_train.collapse import measure
from deepvit_train.collapse.report import SECTIONS as ALL_SECTIONS
from deepvit_train.collapse.report import conclude, find
from deepvit_train.commands import analyze, train
from deepvit_train.commands.analyze_subject import from_timm
from deepvit_train.config.collapse import Axis, Metric
from deepvit_train.config.compose import compose_command
from deepvit_train.data.dataset import Batch
from deepvit_train.data.loaders import Loaders
from deepvit_train.distributed.world import World
from deepvit_train.error import CheckpointError, ConfigError
from deepvit_train.report.figure import Line, Panel, draw_lines, share_axes
from tests.conftest import QUICK

pytestmark = pytest.mark.xdist_group("analyze")  # its report takes seconds, and serves several tests
SECTIONS = [section for section in ALL_SECTIONS if section[0] != "prune"]  # which is drawn on request
QUICKLY = ["threads=1", "collapse.images=4", "batch_size=3", "data.workers=0"]
TIMM = "vit_tiny_patch16_224"


def analysed(*overrides: str) -> dict[str, Any]:
    return analyze.run(compose_command("analyze", [*QUICKLY, *overrides]))


@pytest.fixture(scope="module")
def trained(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two re-attention blocks on the digits."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train.run(compose_command("train", [*QUICK, f"run_dir={folder}"]))
    return folder


@pytest.fixture(scope="module")
def report(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of the run beside that of a plain timm model that was never trained."""
    out = tmp_path_factory.mktemp("report")
    features = ["features=true", "features_images=12", "features_eval_images=4"]
    analysed(f"checkpoint={trained}", f"compare=timm:{TIMM}", f"out={out}", *features)
    return out


def test_an_analysis_of_a_run_lies_in_its_folder(trained: Path) -> None:
    found = analysed(f"checkpoint={trained}", "report=false", "accuracy=true")
    assert json.loads((trained / "analysis" / "analysis.json").read_text()) == found
    assert not (trained / "analysis" / "report.html").exists()
    (model,) = found["models"]
    result = json.loads((trained / "result.json").read_text())
    assert model["accuracy"]["calibrated"]["top1"] == result["val/top1"]
    assert found["images"] == 4
    assert len(model["theta"]["trained"]) == 2
    assert model["theta"]["trained"] != model["theta"]["untrained"]
    for state in ("trained", "untrained"):
        assert len(model[state]["averages"]["similarity/post_norm/raw/column"]) == 2
    assert model["trained"]["averages"] != model["untrained"]["averages"]


def test_the_untrained_model_is_the_one_the_run_began_with(digits: Path, tmp_path: Path) -> None:
    overrides = [*QUICK, "optim.lr=0", "schedule.warmup_lr=0", "schedule.min_lr=0", f"run_dir={tmp_path}"]
    train.run(compose_command("train", overrides))
    (model,) = analysed(f"checkpoint={tmp_path}", "report=false")["models"]
    assert model["trained"] == model["untrained"]


def _images_of(root: Path) -> list[Batch]:
    """The images that an analysis of a timm model looks at."""
    overrides = [*QUICKLY, "batch_size=4", f"model=timm:{TIMM}", "data=imagefolder", f"data.root={root}"]
    config = compose_command("analyze", [*overrides, "out=unused"])
    world = World(rank=0, size=1, device=torch.device("cpu"))
    preprocessing = from_timm(config.model, None).preprocessing
    return analyze.images_of(config, Loaders(preprocessing, config.data, world), None).batches


def test_maps_of_a_timm_model_are_those_made_by_hand(image_folder: Path, tmp_path: Path) -> None:
    found = analysed(
        f"model=timm:{TIMM}",
        "data=imagefolder",
        f"data.root={image_folder}",
        f"out={tmp_path / 'out'}",
        "report=false",
    )["models"][0]
    # The same images through the model by hand: q and k of every block, softmax in float64.
    torch.manual_seed(0)
    model = timm.create_model(TIMM, pretrained=False).eval()
    (batch,) = _images_of(image_folder)
    maps = []
    with torch.no_grad():
        x = model._pos_embed(model.patch_embed(batch.images))
        for block in model.blocks:
            normed = block.norm1(x)
            weights, biases = block.attn.qkv.weight.chunk(3), block.attn.qkv.bias.chunk(3)
            q, k = (normed @ weights[part].T + biases[part] for part in (0, 1))
            heads = []
            for head in range(3):
                part = slice(64 * head, 64 * (head + 1))
                logits = q[..., part].double() @ k[..., part].double().transpose(1, 2) / 8
                heads.append(logits.softmax(dim=-1))
            maps.append(torch.stack(heads, dim=1))
            x = block(x)
    for axis in Axis:
        for metric in Metric:
            expected = measure.similarity_matrix(maps, axis, metric)
            name = f"similarity/pre_mix/{metric}/{axis}"
            actual = torch.tensor(found["trained"]["averages"][name], dtype=torch.float64)
            # Centred vectors of an untrained model are a thousandth of the maps: their digits are fewer.
            torch.testing.assert_close(actual, expected, atol=1e-6 if metric == Metric.raw else 1e-3, rtol=0)
    entropy = torch.stack([measure.entropy(each) for each in maps])
    actual = torch.tensor(found["trained"]["averages"]["entropy"], dtype=torch.float64)
    torch.testing.assert_close(actual, entropy, atol=1e-6, rtol=0)


def test_local_weights_of_a_timm_model(image_folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    weights = timm.create_model(TIMM, num_classes=7).state_dict()
    data = ["data=imagefolder", f"data.root={image_folder}", "report=false", "collapse.images=1"]
    save_file(weights, tmp_path / "tiny.safetensors")
    found = analysed(f"model=timm:{TIMM}", f"checkpoint={tmp_path / 'tiny.safetensors'}", *data)
    assert (tmp_path / "tiny" / "analysis" / "analysis.json").exists()
    (model,) = found["models"]
    assert model["trained"] != model["untrained"]
    del weights["blocks.3.attn.qkv.weight"]
    save_file(weights, tmp_path / "broken.safetensors")
    with pytest.raises(CheckpointError, match=r"broken\.safetensors: does not fit timm's"):
        analysed(f"model=timm:{TIMM}", f"checkpoint={tmp_path / 'broken.safetensors'}", *data)
    (tmp_path / "empty.pth").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"empty\.pth: an empty file"):
        analysed(f"model=timm:{TIMM}", f"checkpoint={tmp_path / 'empty.pth'}", *data)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "checkpoint is not given"),
        (["model=deepvit_s"], "nearest: model=timm:deepvit_s"),
        ([f"model=timm:{TIMM}", "out=x"], "needs data=imagefolder"),
        ([f"model=timm:{TIMM}", "data=digits"], "needs out=FOLDER"),
        (["model=timm:vit_tyni_patch16_224", "data=digits", "out=x"], "did you mean 'vit_tiny_patch16_224'"),
        (["model=timm:resnet18", "data=digits", "out=x"], "ResNet"),
        (["checkpoint=x", "collapse.threshold=2"], "collapse.threshold=2.0: must be at most 1"),
    ],
)
def test_mistakes(digits: Path, tmp_path: Path, overrides: list[str], message: str, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=re.escape(message)):
        analysed(*overrides)


def test_every_figure_is_drawn_and_in_the_report(report: Path) -> None:
    html = (report / "report.html").read_text()
    for name, title, _ in SECTIONS:
        assert f'<h2 id="{name}">{title}</h2>' in html
        kind = "png" if name == "class_attention" else "svg"
        assert (report / "figures" / f"{name}.{kind}").stat().st_size > 1000
        # The plain model has every figure but those of mixing.
        mixing = name in ("theta", "mixed_maps")
        assert (report / "figures" / f"compare_{name}.{kind}").exists() != mixing
    assert len(re.findall("<figure ", html)) == 2 * len(SECTIONS) - 2
    assert len(re.findall("<svg |<img ", html)) == 2 * len(SECTIONS) - 2
    # Three panels are 1200 pixels wide, so two such figures do not share a row of a page of 1200. A single
    # panel, which a model without known classes has, needs less.
    found = re.findall(r'<figure style="[^"]*, (\d+)px\)">\n<svg[^>]*Does the att', html)
    assert list(map(int, found)) == [960, 346]
    assert TIMM in html
    (_, plain) = json.loads((report / "analysis.json").read_text())["models"]
    assert plain["depth"]["trained"] == plain["depth"]["untrained"]  # no weights were given
    assert len(plain["depth"]["trained"]["class_token"]["knn_10"]) == 12


def test_the_report_begins_with_the_run_and_its_accuracy(trained: Path, report: Path) -> None:
    html = unescape((report / "report.html").read_text())
    state = json.loads((trained / "checkpoints" / "best" / "state.json").read_text())
    first = html.index(f"<p><strong>{trained.name}</strong> (reattention, 2 blocks, dim 16, 2 heads): ")
    assert first < html.index(f"<p><strong>{TIMM}, untrained</strong>") < html.index("<h2")
    said = f"Top-1 was {state['best']['val/top1']:.4f} on its own validation images at step {state['step']}."
    assert said in html[first : html.index("<h2")]
    assert "These maps have " in html[first : html.index("<h2")]
    assert "Its accuracy is not known" in html
    assert f"<title>Attention over depth: {trained.name} and {TIMM}, untrained</title>" in html
    assert "log 17, uniform maps" in (report / "figures" / "maps.svg").read_text()


def test_a_report_of_one_model_leaves_no_figure_of_an_earlier_second_one(
    trained: Path, report: Path, tmp_path: Path
) -> None:
    shutil.copytree(report, tmp_path / "again")
    figures = tmp_path / "again" / "figures"
    (figures / "compare_mine.svg").write_text("somebody's own")
    analysed(f"checkpoint={trained}", f"out={tmp_path / 'again'}")
    assert [file.name for file in figures.glob("compare_*")] == ["compare_mine.svg"]
    drawn = {file.name for file in (report / "figures").glob("[!c]*")}
    assert {file.name for file in figures.glob("[!c]*")} == drawn - {"depth.svg"}  # which was not asked for


def test_runs_of_one_name_are_told_apart_by_their_folders(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / trained.name, symlinks=True)
    both = [f"checkpoint={trained}", f"compare={tmp_path / trained.name}", "report=false"]
    labels = [model["label"] for model in analysed(*both, f"out={tmp_path / 'out'}")["models"]]
    assert labels == [str(trained), str(tmp_path / trained.name)]


def test_compared_panels_have_the_same_ends() -> None:
    small, large = (
        draw_lines(
            [
                Panel("a", "x", "y", [Line("l", [0, 1], [0.0, top])]),
                Panel("b", "x", "y", [Line("l", [0, 9], [0.0, 1.0])]),
            ],
            "",
        )
        for top in (1.0, 100.0)
    )
    share_axes([small, large])
    assert small.axes[0].get_ylim() == large.axes[0].get_ylim()
    assert small.axes[0].get_ylim()[1] >= 100
    assert small.axes[1].get_ylim()[1] < 2


def test_the_report_needs_nothing_else(report: Path) -> None:
    html = (report / "report.html").read_text()
    assert "<script" not in html
    linked = re.findall(r"""(?:src|href)=["']([^"']*)""", html) + re.findall(r"url\(([^)]*)\)", html)
    assert linked
    assert all(address.startswith(("data:", "#")) for address in linked)


# Notes on the page itself what it asked for and what went wrong.
WATCH = """<script>
addEventListener("load", () => {
  const asked = performance.getEntriesByType("resource").map(entry => entry.name);
  const broken = [...document.images].filter(image => !image.naturalWidth).length;
  document.body.dataset.seen = JSON.stringify({asked, broken});
});
</script>"""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
@pytest.mark.parametrize(
    "extra", ["", '<img src="http://127.0.0.1:9/x.png"><script>console.error(1)</script>']
)
def test_a_browser_shows_the_report_without_an_error_or_a_request(
    report: Path, tmp_path: Path, extra: str
) -> None:
    page = tmp_path / "page.html"
    page.write_text((report / "report.html").read_text().replace("</body>", f"{extra}{WATCH}</body>"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = ["chromium", *options, profile, "--virtual-time-budget=3000", "--dump-dom", f"file://{page}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    (seen,) = re.findall('data-seen="([^"]*)"', done.stdout)
    if extra:  # what this test sees where a page asks for something and complains
        assert "127.0.0.1:9" in seen
        assert "CONSOLE" in done.stderr
        return
    assert json.loads(unescape(seen)) == {"asked": [], "broken": 0}
    assert "CONSOLE" not in done.stderr
    assert len(re.findall("<svg |<img ", done.stdout)) == 2 * len(SECTIONS) - 2


def test_what_the_report_says() -> None:
    def state(similar: list[int], cosine: float) -> dict[str, Any]:
        counted = {"blocks": similar, "count": len(similar), "ratio": 0.0, "to_previous": cosine}
        definitions = [f"{maps}/{metric}/column" for maps in ("pre_mix", "post_norm") for metric in Metric]
        features = [[1.0, 0.5, 0.2], [0.5, 1.0, 0.95], [0.2, 0.95, 1.0]]
        averages = {
            "features": features,
            "tokens": [0.1, 0.2, 0.3],
            "branch_share": [0.5, 0.25, 0.75],
            "map_swap": [0.0 if block in similar else 0.3 for block in (1, 2)],
            "removal": [0.5, -0.002, 0.1],
        }
        return {"similar_blocks": dict.fromkeys(definitions, counted), "averages": averages}

    def sentences(trained: list[int], untrained: list[int]) -> str:
        model: dict[str, Any] = {"theta": {"trained": [None] * 3}, "accuracy": None}
        config = compose_command("analyze", ["checkpoint=x"]).collapse
        return " ".join(
            find(model | {"trained": state(trained, 0.95), "untrained": state(untrained, 0.1)}, config)
        )

    collapsed = sentences([1, 2], [])
    assert collapsed.startswith("2 of the 2 blocks after the first are replaceable")
    assert "rises by less than 0.01): blocks 1, 2. In the same model untrained it is 0." in collapsed
    assert "Block 1 is missed least: without it the loss changes by -0.0020." in collapsed
    assert "least in block 1 (0.250 of a token's length) and most in block 2 (0.750)" in collapsed
    assert "2 of the 2 blocks after the first are similar" in collapsed
    assert "untrained it is 0" in collapsed
    assert "From block 1 on, every block is similar" in collapsed
    assert "raw column cosine of pre-mix maps to the block before: 0.950, untrained 0.100" in collapsed
    assert "cosine of 0.9 to the last block's at block 1" in collapsed
    assert "No block is similar." in sentences([], [])
    assert "does not show collapse" in sentences([1], [1, 2])
    assert "These blocks are similar, counted from 0: 1." in sentences([1], [])


def test_the_first_lines_of_a_report() -> None:
    def state(swaps: list[float], tokens: list[float]) -> dict[str, Any]:
        return {"averages": {"features": [[1.0]] * 3, "map_swap": swaps, "tokens": tokens}}

    model: dict[str, Any] = {"accuracy": {"calibrated": {"top1": 0.75}}}
    model |= {
        "trained": state([0.5, 0.001], [0.1, 0.2, 0.375]),
        "untrained": state([0, 0], [0.1, 0.2, 0.875]),
    }
    config = compose_command("analyze", ["checkpoint=x"]).collapse
    said = conclude(model, {"split": "val", "name": "digits"}, config)
    assert said.startswith(
        "Top-1 is 0.7500 on val of digits. The tokens that leave the last block have a mean"
    )
    assert "These maps have collapsed in part: 1 block is" in said
    assert "The attention maps of 1 of the 2 blocks after the first matter, untrained those of 0" in said
    assert "last block have a mean cosine of 0.375 to each other, untrained 0.875. In the study" in said
    one = model | {
        state: {"averages": {"map_swap": [], "tokens": [0.5]}} for state in ("trained", "untrained")
    }
    assert "There is one block" in conclude(one, {"split": "val", "name": "digits"}, config)


def test_pruning_leaves_out_blocks_from_the_least_missed_on(digits: Path, tmp_path: Path) -> None:
    train.run(compose_command("train", [*QUICK, f"run_dir={tmp_path / 'run'}", "model.depth=3"]))
    found = analysed(f"checkpoint={tmp_path / 'run'}", "prune=true", "accuracy=true")
    (model,) = found["models"]
    pruned, removal = model["prune"], model["trained"]["averages"]["removal"]
    assert [removal[block] for block in pruned["order"]] == sorted(removal)
    assert len(pruned["top1"]) == len(pruned["loss"]) == 3
    assert pruned["top1"][0] == model["accuracy"]["calibrated"]["top1"]
    assert pruned["loss"][0] == pytest.approx(model["accuracy"]["calibrated"]["loss"])
    assert pruned["loss"][1] != pruned["loss"][0]
    html = unescape((tmp_path / "run" / "analysis" / "report.html").read_text())
    assert "How many blocks can be left out?" in html
    assert all(f"<li>{line}</li>" in html for line in model["verdict"])
    assert len(model["verdict"]) > 1
