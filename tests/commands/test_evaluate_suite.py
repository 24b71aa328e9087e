"""`deepvit-eval suite=`: each set is read as it is published, counted by hand, and evaluated once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from deepvit_train.commands import evaluate, evaluate_suite, train
from deepvit_train.commands.evaluate_suite_result import SuiteFile, tell
from deepvit_train.config.compose import compose_command
from deepvit_train.config.preset import model_preset
from deepvit_train.data.imagenet import imagenet_classes
from deepvit_train.error import ConfigError, DataError
from deepvit_train.evaluation.loaded import load
from deepvit_train.evaluation.real_label import real_labels
from deepvit_train.evaluation.robustness import ALEXNET_ERRORS
from deepvit_train.models import DeepViT
from tests.conftest import QUICK, Command
from tests.data.test_imagenet import put

NAMES = imagenet_classes()
OPTIONS = ["threads=1", "data.workers=0", "preset=digits", "batch_size=4"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 1,000 classes whose answers differ from image to image."""
    torch.manual_seed(0)
    model = DeepViT(model_preset("digits"), 1000)
    with torch.no_grad():
        model.head.weight.mul_(50)
    file = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file(model.state_dict(), file)
    return file


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, weights: Path) -> Path:
    """Each of ImageNet's test sets, a few images in the layout that it is published in."""
    root = tmp_path_factory.mktemp("sets")
    few = [NAMES[place] for place in (1, 400, 999)]
    put(root / "val", *(f"{few[each % 3]}/ILSVRC2012_val_{each:08d}.JPEG" for each in range(1, 13)))
    put(root / "imagenetv2", *(f"{place}/{each}.jpeg" for place in (0, 7, 10, 400) for each in "abc"))
    put(root / "imagenet-a", *(f"{name}/{each}.jpg" for name in few[:2] for each in "abcd"))
    put(root / "imagenet-r", *(f"{name}/{each}.jpg" for name in few for each in "ab"))
    put(root / "sketch", *(f"{name}/sketch_{each}.JPEG" for name in few for each in "ab"))
    for group, corruption, severities in (("noise/", "shot_noise", (1, 2, 3, 4, 5)), ("", "fog", (2,))):
        for severity in severities:
            put(root / "c" / f"{group}{corruption}" / str(severity), *(f"{name}/a.JPEG" for name in few))
    # The classes that the model answers with, so that some of its answers are right.
    model = _model(weights)
    for file in sorted((root / "val").rglob("*.JPEG"))[:4]:
        guess = NAMES[int(_logits(model, file).argmax())]
        (root / "val" / guess).mkdir(exist_ok=True)
        file.rename(root / "val" / guess / file.name)
    for folder in (root / "val").iterdir():
        if not list(folder.iterdir()):
            folder.rmdir()
    return root


def _model(weights: Path) -> DeepViT:
    return load(str(weights), "auto", "digits").model.eval()


def _logits(model: DeepViT, file: Path) -> torch.Tensor:
    with torch.no_grad():
        return model(model.transform(file)[None])[0]


def _folders(root: Path, *names: str) -> list[str]:
    places = {"v2": "imagenetv2", "a": "imagenet-a", "r": "imagenet-r"}
    return [f"suite.{name}={root / places.get(name, name)}" for name in names]


def evaluated(weights: Path, *overrides: str) -> dict[str, Any]:
    return evaluate.run(compose_command("eval", [f"checkpoint={weights}", *OPTIONS, *overrides]))


def _by_hand(model: DeepViT, folder: Path, name_of: Callable[[Path], str]) -> float:
    """The accuracy of a set, of the outputs whose classes it has."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    targets = [NAMES.index(name_of(file)) for file in files]
    present = torch.tensor(sorted(set(targets)))
    guesses = [int(present[_logits(model, file)[present].argmax()]) for file in files]
    return sum(map(int.__eq__, guesses, targets)) / len(files)


def _class_folder(file: Path) -> str:
    return file.parent.name


def test_every_set_is_what_is_counted_by_hand(weights: Path, published: Path, tmp_path: Path) -> None:
    copy = shutil.copy(weights, tmp_path)
    every = _folders(published, "val", "v2", "a", "r", "sketch", "c")
    report = evaluated(copy, "suite=imagenet", *every)
    model, top1 = _model(weights), report["top1"]
    assert top1["val"] == _by_hand(model, published / "val", _class_folder) > 0.2
    for name, folder in (("a", "imagenet-a"), ("r", "imagenet-r"), ("sketch", "sketch")):
        assert top1[name] == _by_hand(model, published / folder, _class_folder)
    by_number = _by_hand(model, published / "imagenetv2", lambda file: NAMES[int(file.parent.name)])
    assert top1["v2"] == by_number
    assert {name for name in top1 if "/" in name} == {f"c/shot_noise/{each}" for each in range(1, 6)} | {
        "c/fog/2"
    }
    files = sorted((published / "val").rglob("*.JPEG"))
    labelled = [(file, found) for file, found in zip(files, real_labels(list(map(str, files))), strict=True)]
    right = [int(_logits(model, file).argmax()) in found for file, found in labelled if found]
    assert top1["real"] == sum(right) / len(right)
    assert report["left_out"] == {}
    assert report["mce"] is None
    stored = json.loads(Path(report["file"]).read_text())["sets"]
    assert {name: each["top1"] for name, each in stored.items()} == top1
    assert stored["real"]["unlabelled"] == len(files) - len(right)
    assert stored["a"]["labels"]["classes"] == 2


def test_images_of_c_are_taken_whole(weights: Path, tmp_path: Path) -> None:
    """They were cropped when the set was made: a second crop would leave out what AlexNet saw."""
    put(tmp_path / "c" / "fog" / "1", *(f"{NAMES[place]}/{place}.JPEG" for place in range(40)))
    copy = shutil.copy(weights, tmp_path)
    loss: dict[str, float] = {}
    for share in ("0.5", "1.0"):
        report = evaluated(copy, "suite=imagenet", *_folders(tmp_path, "c"), f"crop_pct={share}")
        loss[share] = json.loads(Path(report["file"]).read_text())["sets"]["c/fog/1"]["loss"]
    assert loss["0.5"] == loss["1.0"]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The images of each evaluation that is made."""
    made: list[int] = []
    real = evaluate_suite.evaluate

    def count(model: Any, batches: Any, *rest: Any) -> Any:
        result = real(model, batches, *rest)
        made.append(result.images)
        return result

    monkeypatch.setattr(evaluate_suite, "evaluate", count)
    return made


def test_what_is_finished_is_not_evaluated_again(
    weights: Path, published: Path, tmp_path: Path, counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, sets = Path(shutil.copy(weights, tmp_path)), shutil.copytree(published, tmp_path / "sets")
    first = evaluated(copy, "suite=imagenet", *_folders(sets, "v2", "a"))
    assert counted == [12, 8]
    assert set(first["left_out"]) == {"val", "real", "r", "sketch", "c"}
    assert first["left_out"]["r"] == "no folder is given: suite.r=FOLDER"
    second = evaluated(copy, "suite=imagenet", *_folders(sets, "v2", "a", "r"))
    assert counted == [12, 8, 6]
    assert {name: second["top1"][name] for name in ("v2", "a")} == first["top1"]
    # Another list of images, another precision and other weights are other results.
    next((sets / "imagenetv2").rglob("*.jpeg")).unlink()
    evaluated(copy, "suite=imagenet", *_folders(sets, "v2", "a"))
    assert counted == [12, 8, 6, 11]
    evaluated(copy, "suite=imagenet", "precision=bf16", *_folders(sets, "a"))
    assert counted == [12, 8, 6, 11, 8]
    changed = _model(weights)
    with torch.no_grad():
        changed.head.weight.mul_(1.5)
    save_file(changed.state_dict(), copy)
    evaluated(copy, "suite=imagenet", *_folders(sets, "a"))
    assert counted == [12, 8, 6, 11, 8, 8]


def test_a_stopped_suite_goes_on(
    weights: Path, published: Path, tmp_path: Path, counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, counting = Path(shutil.copy(weights, tmp_path)), evaluate_suite.evaluate

    def stopped(*given: Any) -> Any:
        if len(counted) == 2:
            raise KeyboardInterrupt
        return counting(*given)

    monkeypatch.setattr(evaluate_suite, "evaluate", stopped)
    sets = ["suite=imagenet", *_folders(published, "v2", "a", "r", "sketch")]
    with pytest.raises(KeyboardInterrupt):
        evaluated(copy, *sets)
    monkeypatch.setattr(evaluate_suite, "evaluate", counting)
    report = evaluated(copy, *sets)
    assert counted == [12, 8, 6, 6]
    assert list(report["top1"]) == ["v2", "a", "r", "sketch"]


def test_sets_that_are_not_there_are_named(
    weights: Path, published: Path, tmp_path: Path, call: Command
) -> None:
    copy = shutil.copy(weights, tmp_path)
    (tmp_path / "bad" / NAMES[0]).mkdir(parents=True)
    (tmp_path / "bad" / NAMES[0] / "a.jpg").write_bytes(b"no image")
    given = [*_folders(published, "a"), "suite.r=nowhere", f"suite.sketch={tmp_path / 'bad'}"]
    done = call("eval", f"checkpoint={copy}", *OPTIONS, "suite=imagenet", *given)
    assert done.returncode == 0
    report = json.loads(done.stdout.splitlines()[-1])
    assert "no such folder" in report["left_out"]["r"]
    assert "can't be read" in report["left_out"]["sketch"]
    rows = [line for line in done.stdout.splitlines() if "left out" in line and line.startswith("│")]
    assert [row.split()[1] for row in rows] == ["validation", "ReaL", "V2", "C", "R", "Sketch"]
    assert set(json.loads(Path(report["file"]).read_text())["sets"]) == {"a"}
    none = call("eval", f"checkpoint={copy}", *OPTIONS, "suite=imagenet", "suite.a=nowhere")
    assert none.returncode == 4
    assert "no set is there" in none.stderr


@pytest.fixture(scope="module")
def trained(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    train.run(compose_command("train", [*QUICK, f"run_dir={folder}"]))
    return folder


@pytest.mark.runs
def test_corruptions_of_a_run_of_its_own_images(trained: Path, counted: list[int]) -> None:
    few = ["suite.corruptions=[jpeg,gaussian_noise]", "suite.severities=[5,1]", "threads=1"]
    options = [f"checkpoint={trained}", "suite=corruptions", *few]

    def run(*overrides: str) -> dict[str, Any]:
        return evaluate.run(compose_command("eval", [*options, *overrides]))

    report = run()
    names = ["clean", "jpeg/1", "jpeg/5", "gaussian_noise/1", "gaussian_noise/5"]
    assert list(report["top1"]) == names
    plain = evaluate.run(compose_command("eval", [f"checkpoint={trained}", "threads=1"]))
    assert report["top1"]["clean"] == plain["top1"]
    assert counted == [364] * 5
    Path(report["file"]).rename(trained / "first.json")
    again = run("data.workers=2", "batch_size=50")
    first, second = (
        json.loads(Path(each).read_text())["sets"] for each in (trained / "first.json", again["file"])
    )
    for name in names:
        assert second[name]["top1"] == first[name]["top1"]
        assert second[name]["loss"] == pytest.approx(first[name]["loss"], rel=1e-5)
    # Another seed draws other noise, and only what depends on it is evaluated.
    other = json.loads(Path(run("suite.seed=1")["file"]).read_text())["sets"]
    assert counted == [364] * 14
    assert other["gaussian_noise/5"]["loss"] != first["gaussian_noise/5"]["loss"]
    assert other["jpeg/5"]["loss"] == pytest.approx(first["jpeg/5"]["loss"], rel=1e-5)


def test_a_model_of_other_classes_is_told_what_to_do(trained: Path) -> None:
    with pytest.raises(ConfigError, match="are not ImageNet's WordNet ids; nearest: suite=corruptions"):
        evaluate.run(compose_command("eval", [f"checkpoint={trained}", "suite=imagenet", "suite.a=x"]))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("suite=imagnet", "did you mean 'imagenet'"),
        ("suite.corruptions=[jpg]", "jpg is unknown; did you mean 'jpeg'"),
        ("suite.severities=[0]", "must be at least 1"),
        ("suite.severities=[1,1]", "each once"),
        ("suite.corruptions=[]", "needs one value or more"),
    ],
)
def test_mistakes(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose_command("eval", ["checkpoint=x", override])


def test_the_table_ends_with_the_mean_corruption_error(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = {"outputs": 1000, "classes": 1000}
    results = {
        f"c/{name}/{severity}": {"top1": 1 - error / 2, "top5": 0.9, "images": 50_000, "labels": whole}
        for name, error in ALEXNET_ERRORS.items()
        for severity in range(1, 6)
    }
    config = compose_command("eval", [f"checkpoint={weights}", "suite=imagenet"])
    file = SuiteFile(tmp_path / "x.json", {})
    loaded = load(str(weights), "auto", "digits")
    assert tell(config, loaded, file, results, {}, True)["mce"] == pytest.approx(50)
    said = capsys.readouterr().out
    assert "C, mCE" in said
    assert "50.00 (AlexNet: 100; lower is better)" in said
    results["c/fog/1"]["labels"] = {"outputs": 1000, "classes": 200}
    assert tell(config, loaded, file, results, {}, False)["mce"] is None
    with pytest.raises(DataError, match="no set is there"):
        evaluated(weights, "suite=imagenet")
