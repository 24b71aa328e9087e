"""Run a study over tiny models: it resumes, a broken cell stops no other, and seeds are averaged."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from deepvit_train.commands import study
from deepvit_train.commands.study_cell import CellProcesses
from deepvit_train.commands.study_grid import best_rate
from deepvit_train.commands.study_result import _digest
from deepvit_train.commands.study_table import table
from deepvit_train.config.compose import compose_command
from deepvit_train.config.listing import typed_list
from deepvit_train.config.preset import choices
from deepvit_train.error import ConfigError, DataError, OutputError, UserError
from tests.conftest import Command

TINY = [
    "study.depths=[2]",
    "study.seeds=[0,1]",
    "study.dim=16",
    "study.widths=[8,16]",
    "study.width_depth=2",
    "collapse.images=2",
    "train=[model.image_size=8,model.patch_size=4,model.heads=2,augment=none,trainer.epochs=1,"
    "trainer.batch_size=10,schedule.warmup_epochs=0,trainer.calibrate_images=10,data.workers=0]",
    "study.rates=[]",
    "study.attentions=[self,reattention]",
    "train_images=40",
    "val_images=20",
    "threads=1",
]

# A study of one cell that is not trained: its folder, its images and its settings alone.
ONE_UNTRAINED = ["limit_cells=0", "study.seeds=[0]", "study.attentions=[self]", "study.widths=[]"]


def configure(digits: Path, out: Path, *overrides: str) -> study.StudyConfig:
    return compose_command("study", [*TINY, f"root={digits}", f"out={out}", *overrides])


def names(config: study.StudyConfig) -> list[str]:
    return [cell.name for cell in study.cells_of(config.study)]


def test_the_cells_come_seed_by_seed_each_once(digits: Path, tmp_path: Path) -> None:
    found = names(configure(digits, tmp_path))
    assert found[:3] == ["self-d02-w16-s0", "reattention-d02-w16-s0", "self-d02-w8-s0"]
    assert found[3:] == [name.replace("s0", "s1") for name in found[:3]]


@pytest.mark.parametrize("name", choices("study"))
def test_every_arm_of_the_shipped_studies_composes(name: str, digits: Path, tmp_path: Path) -> None:
    config = compose_command(
        "study", [f"study={name}", f"root={digits}", f"out={tmp_path}", "study.seeds=[0]"]
    )
    config.study.depths, config.study.rates = config.study.depths[-1:], config.study.rates[:1]
    for cell in study.cells_of(config.study):
        overrides = study.commands_of(cell, config)["train"]
        composed = compose_command("train", overrides)
        assert (composed.model.depth, composed.model.dim) == (cell.depth, cell.dim)
        assert composed.data.root == str(tmp_path / ("data" if cell.rate is None else "search"))
        assert cell.rate in (None, composed.optim.lr)
        assert composed.seed == (0 if cell.rate is None else 100)


def test_arms_are_typed_without_quotes(digits: Path, tmp_path: Path) -> None:
    arms = "self,scaled: attn=self model.layer_scale=0.1,far: model.mean=[0, 0.5,1] loss.cosine_weight=0"
    typed = f"study.attentions=[{arms}]"
    config = configure(digits, tmp_path, typed, "study.widths=[]", "study.seeds=[3]")
    found = {
        cell.name: compose_command("train", study.commands_of(cell, config)["train"])
        for cell in study.cells_of(config.study)
    }
    assert list(found) == ["self-d02-w16-s3", "scaled-d02-w16-s3", "far-d02-w16-s3"]
    assert [str(each.attn.kind) for each in found.values()] == ["self", "self", "reattention"]
    assert [each.model.layer_scale for each in found.values()] == [None, 0.1, None]
    assert found["far-d02-w16-s3"].model.mean == [0.0, 0.5, 1.0]
    assert found["far-d02-w16-s3"].model.patch_size == 4


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ("[self,self: attn=self]", "another arm has the name self"),
        ("[a b: attn=self]", "an arm is a name in attn="),
        ("[far: model.mean=0]", "model.mean"),
    ],
)
def test_an_arm_that_can_not_be_read_is_named(
    entries: str, message: str, digits: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        study.run(configure(digits, tmp_path / "out", f"study.attentions={entries}", "limit_cells=0"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[]", []),
        ("[a=1]", ["a=1"]),
        ("[a=1,b=[2,3], c=x y]", ["a=1", "b=[2,3]", "c=x y"]),
        ("['a=1',\"b=2,3\"]", ["a=1", "b=2,3"]),
        ("[name='a,b',c=1]", ["name='a,b'", "c=1"]),
        ("[a=(1,2),b={x: 1, y: 2}]", ["a=(1,2)", "b={x: 1, y: 2}"]),
        ("[a=[1]", None),
        ("[a='1]", None),
        ("a", None),
    ],
)
def test_a_typed_list(text: str, expected: list[str] | None) -> None:
    assert typed_list(text) == expected


SEARCH = [
    "study.attentions=[plain: attn=self]",
    "study.widths=[]",
    "study.seeds=[0]",
    "study.rates=[1e-3,3e-3]",
    "search_images=10",
]


def test_the_rate_with_the_best_accuracy_is_chosen() -> None:
    def outcome(rate: float, top1: float | None) -> dict[str, Any]:
        if top1 is None:
            return {"rate": rate, "status": "failed", "exit_code": 5}
        return {"rate": rate, "status": "done", "top1": top1}

    assert best_rate([outcome(1e-3, 0.5), outcome(3e-3, 0.6)]) == 3e-3
    assert best_rate([outcome(3e-3, 0.6), outcome(1e-3, 0.6)]) == 1e-3
    assert best_rate([outcome(1e-3, 0.5), outcome(3e-3, None)]) == 1e-3
    means = [outcome(1e-3, 0.5), outcome(1e-3, 0.7), outcome(3e-3, 0.8), outcome(3e-3, None)]
    assert best_rate(means) == 1e-3
    assert best_rate([outcome(1e-3, 0.5), {}]) is None
    assert best_rate([outcome(1e-3, 0.5), {"rate": 3e-3, "status": "failed", "exit_code": 6}]) is None


@pytest.mark.runs
def test_a_study_searches_for_its_rate_on_images_of_their_own_and_is_repeated(
    digits: Path, tmp_path: Path
) -> None:
    """Two folders get the same bits, and one that begins with their cells trains none of them again.

    Side by side too, where a cell waits until the search of its rate is over.
    """
    cells = {}
    for name, many in (("a", 1), ("b", 3)):
        study.run(configure(digits, tmp_path / name, *SEARCH, f"cells_at_a_time={many}"))
        cells[name] = {file.name: file.read_bytes() for file in (tmp_path / name / "cells").glob("*.json")}
    assert cells["a"] == cells["b"]
    found = {name: json.loads(content) for name, content in cells["a"].items()}
    final = found.pop("plain-d02-w16-s0.json")
    assert sorted(cell["rate"] for cell in found.values()) == [1e-3, 3e-3]
    assert final["rate"] == best_rate(list(found.values()))
    run = tmp_path / "a" / "runs" / final["name"]
    assert final["accuracy"]["calibrated"]["images"] == 20
    assert f"lr: {final['rate']}" in (run / "config.yaml").read_text()

    def images(folder: str, split: str) -> set[str]:
        return {file.read_bytes().hex() for file in (tmp_path / "a" / folder / split).glob("*/*")}

    assert images("search", "train") == images("data", "train")
    held_out = images("search", "val")
    assert len(held_out) == 10
    assert not held_out & images("data", "train")

    (tmp_path / "c" / "cells").mkdir(parents=True)
    for name, content in cells["a"].items():
        (tmp_path / "c" / "cells" / name).write_bytes(content)
    assert study.run(configure(digits, tmp_path / "c", *SEARCH))["finished"] == 3
    assert not list((tmp_path / "c" / "runs").iterdir())


def test_a_search_needs_images_and_seeds_of_its_own(digits: Path, tmp_path: Path) -> None:
    for override, message in (
        ("search_images=null", "give search_images="),
        ("study.search_seeds=[0]", "0 is one of study.seeds"),
        ("study.search_seeds=[]", "at least one seed"),
        ("study.widths=[8]", "searched at one width"),
    ):
        with pytest.raises(ConfigError, match=message):
            configure(digits, tmp_path, *SEARCH, override)


@pytest.mark.runs
def test_a_study_goes_on_where_it_stopped_and_past_a_broken_cell(digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "study"
    first = study.run(configure(digits, out, "limit_cells=1", "study.seeds=[0]"))
    assert (first["finished"], first["cells"]) == (1, 3)
    finished = out / "cells" / "self-d02-w16-s0.json"
    before = finished.stat().st_mtime_ns
    # A folder of something else stands where a cell's run would go.
    broken = out / "runs" / "reattention-d02-w16-s0"
    broken.mkdir()
    (broken / "stranger").write_text("")
    with pytest.raises(UserError, match="cells failed: 1; the first is reattention-d02-w16-s0") as failure:
        study.run(configure(digits, out, "study.seeds=[0]"))
    assert failure.value.exit_code == 6
    assert finished.stat().st_mtime_ns == before
    second = json.loads((out / "study.json").read_text())
    assert second["finished"] == 2
    assert list(second["failed"]) == ["reattention-d02-w16-s0"]
    assert "holds stranger but no run" in second["failed"]["reattention-d02-w16-s0"]
    drawn = {file.name for file in (out / "figures").iterdir()}
    figures = ("accuracy", "similar_blocks", "similarity", "head_similarity", "feature_cosine", "width")

    assert drawn == {f"{name}.svg" for name in (*figures, "depths")}
    (broken / "stranger").unlink()
    third = study.run(configure(digits, out, "study.seeds=[0]"))
    assert (third["finished"], third["failed"]) == (3, {})

    # What a cell says is what its run and its analysis said.
    cell = json.loads((out / "cells" / "reattention-d02-w16-s0.json").read_text())
    run = out / "runs" / cell["name"]
    result = json.loads((run / "result.json").read_text())
    assert cell["accuracy"]["calibrated"]["top1"] == result["val/top1"]
    assert cell["accuracy"]["calibrated"]["images"] == 20
    assert cell["accuracy"]["running"]["loss"] != cell["accuracy"]["calibrated"]["loss"]
    for state in ("trained", "untrained"):
        curve = cell[state]["by_block"]["similarity/pre_mix/raw/column"]
        assert curve[0] is None
        assert curve[1] == pytest.approx(cell[state]["similar_blocks"]["pre_mix/raw/column"]["to_previous"])
    text = (out / "table.md").read_text().splitlines()
    assert len(text) == 2 + 3
    assert all(line.count("|") == text[0].count("|") for line in text)


@pytest.mark.slow
@pytest.mark.runs
def test_an_error_of_the_study_ends_its_other_cells(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OutputError("the disk is full")

    monkeypatch.setattr(study, "_finish", fail)
    arms = "study.attentions=[short: attn=self, long: attn=self trainer.epochs=20000]"
    config = configure(digits, tmp_path, arms, "study.widths=[]", "study.seeds=[0]", "cells_at_a_time=2")
    with pytest.raises(OutputError, match="the disk is full"):
        study.run(config)
    assert multiprocessing.active_children() == []
    assert (tmp_path / "runs" / "long-d02-w16-s0" / "checkpoints" / "last" / "state.json").is_file()


def test_a_change_of_what_a_file_says_is_no_change_of_weights(tmp_path: Path) -> None:
    file = tmp_path / "checkpoints" / "last" / "model.safetensors"
    file.parent.mkdir(parents=True)
    digests = []
    for value, said in ((1.0, "a"), (1.0, "b"), (2.0, "a")):
        save_file({"head.bias": torch.full((2,), value)}, file, {"deepvit_train": said})
        digests.append(_digest(tmp_path))
    assert digests[0] == digests[1] != digests[2]


def test_cells_side_by_side_share_the_cores(digits: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cells_at_a_time=2: needs threads=.*nearest: threads=1"):
        configure(digits, tmp_path, "cells_at_a_time=2", "threads=null")


def test_a_study_is_not_continued_with_other_settings(digits: Path, tmp_path: Path) -> None:
    study.run(configure(digits, tmp_path, *ONE_UNTRAINED))
    study.run(
        configure(digits, tmp_path, *ONE_UNTRAINED, "study.attentions=[self,reattention]", "threads=null")
    )
    with pytest.raises(ConfigError, match=r"collapse\.k=\d \(now 3\)"):
        study.run(configure(digits, tmp_path, *ONE_UNTRAINED, "collapse.k=3"))
    with pytest.raises(ConfigError, match=r"train_images=40 \(now 20\)"):
        study.run(configure(digits, tmp_path, *ONE_UNTRAINED, "train_images=20"))


def test_two_studies_do_not_share_a_folder(tmp_path: Path) -> None:
    held = pytest.raises(OutputError, match=f"the study of process {os.getpid()}, or its last cell")
    with CellProcesses(tmp_path), held:
        CellProcesses(tmp_path).__enter__()
    with CellProcesses(tmp_path):
        pass
    (tmp_path / ".lock").unlink()
    (tmp_path / ".lock").symlink_to("elsewhere")
    with pytest.raises(OutputError, match=r"\.lock: is a link to 'elsewhere'; nothing is written there"):
        CellProcesses(tmp_path).__enter__()
    assert not (tmp_path / "elsewhere").exists()


def test_without_a_finished_cell_no_table_is_announced(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study.run(configure(digits, tmp_path, *ONE_UNTRAINED))
    assert capsys.readouterr().out.splitlines()[-1] == "0 of 1 cells finished"
    assert not (tmp_path / "table.md").exists()


def test_the_images_are_shared_evenly_by_the_classes(digits: Path, tmp_path: Path) -> None:
    study.run(configure(digits, tmp_path, *ONE_UNTRAINED))
    for split, each in (("train", 4), ("val", 2)):
        folders = sorted((tmp_path / "data" / split).iterdir())
        assert [len(list(folder.iterdir())) for folder in folders] == [each] * 10
    with pytest.raises(DataError, match="41 images can't be shared evenly by 10 classes"):
        study.run(configure(digits, tmp_path / "other", *ONE_UNTRAINED, "train_images=41"))
    study.run(configure(digits, tmp_path / "all", *ONE_UNTRAINED, "train_images=null"))
    assert (tmp_path / "all" / "data" / "train").resolve() == (digits / "train").resolve()


def test_a_mistake_in_a_cell_comes_out_before_the_first_is_trained(digits: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="attn=reatention: unknown; did you mean 'reattention'"):
        study.run(configure(digits, tmp_path / "a", "study.attentions=[self,reatention]"))
    with pytest.raises(ConfigError, match=r"model\.dim=15 is not divisible by model\.heads=2"):
        study.run(configure(digits, tmp_path / "b", "study.dim=15"))
    assert not (tmp_path / "a").exists()


def test_a_study_for_a_gpu_does_not_begin_without_one(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    on_gpu = configure(digits, tmp_path / "a", *ONE_UNTRAINED)
    on_gpu.train.append("trainer.device=cuda")
    study.run(on_gpu)  # its tables can be written anywhere
    on_gpu.limit_cells = None
    with pytest.raises(ConfigError, match=r"trainer\.device=cuda: torch finds no CUDA GPU"):
        study.run(on_gpu)


def test_the_table_holds_means_and_deviations_over_seeds() -> None:
    cells = []
    for seed, top1 in enumerate((0.5, 0.6, 0.8)):
        measured = {"count": seed, "ratio": 0.5, "to_previous": 0.1 * seed}
        state = {"similar_blocks": dict.fromkeys(_definitions(), measured)}
        accuracy = {"calibrated": {"top1": top1}, "running": {"top1": top1 / 2}}
        cells.append(
            {"attn": "self", "depth": 8, "dim": 64, "seed": seed, "accuracy": accuracy, "train_loss": 1.0}
            | {"trained": state, "untrained": state}
        )
    row = table(cells).splitlines()[2]
    assert row.startswith("| 8 | 64 | self | 3 |")
    assert f"| {mean((0.5, 0.6, 0.8)):.4g} ± {stdev((0.5, 0.6, 0.8)):.2g} |" in row
    assert "| 1 ± 1 |" in row
    assert " ± " not in table(cells[:1])


def _definitions() -> list[str]:
    return [f"{maps}/{metric}/column" for maps in ("pre_mix", "post_norm") for metric in ("raw", "centred")]


def test_the_command_needs_a_folder_of_images(call: Command) -> None:
    done = call("study")
    assert done.returncode == 2
    assert "root is not given" in done.stderr
