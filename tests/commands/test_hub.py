"""Push a model and load it back, by the hub's own cache layout and a hub that is a folder; no network."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub import constants, errors
from safetensors.torch import save_file
from timm.models import VisionTransformer

import deepvit_train
from deepvit_train.commands import export, train
from deepvit_train.commands.export_card import _recipe, interval
from deepvit_train.config.compose import compose_command
from deepvit_train.models import DeepViT
from deepvit_train.run import hub
from deepvit_train.run.checkpoint import read_state
from tests.conftest import QUICK, Command

COMMON = ["threads=1", "data.workers=0"]
COMMIT = "0123456789012345678901234567890123456789"


@pytest.fixture(scope="module")
def mixed(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with re-attention from the second block on, whose attention maps were looked at."""
    folder = tmp_path_factory.mktemp("mixed") / "run"
    options = ["attn.from_block=1", "trainer.probe_every_steps=6", "collapse.images=8", f"run_dir={folder}"]
    train.run(compose_command("train", [*QUICK, *options]))
    return folder


@pytest.fixture(scope="module")
def plain(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with plain attention and registers, whose tensors timm has in another form."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    train.run(compose_command("train", [*QUICK, "attn=self", "model.registers=2", f"run_dir={folder}"]))
    return folder


@pytest.fixture(scope="module")
def pushed(mixed: Path, plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what was pushed of both runs: `mixed` with a .pt2 file, `plain` as timm has it."""
    folder = tmp_path_factory.mktemp("pushed")
    for name, run, form in (("mixed", mixed, "pt2"), ("plain", plain, "timm")):
        options = [f"checkpoint={run}", f"out={folder / f'out-{name}'}", f"push={folder / name}"]
        export.run(compose_command("export", [*options, f"format={form}", "check_images=64", *COMMON]))
    return folder


class Hub:
    """A hub that holds what was pushed in folders, and its client's cache in the client's own layout."""

    def __init__(self, home: Path) -> None:
        self.cache, self.shelf = home / "cache", home / "shelf"
        self.token: str | None = "hf_token"
        self.asked: list[str] = []
        self.error: Exception | None = None

    def folder(self, name: str) -> Path:
        return self.shelf / name

    def _ask(self, what: str) -> None:
        self.asked.append(what)
        if self.error is not None:
            raise self.error

    def create_repo(self, name: str, private: bool, exist_ok: bool) -> str:
        self._ask(f"create private={private}")
        return f"https://hub.example/{name}"

    def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> None:
        self._ask("upload")
        shutil.copytree(folder_path, self.folder(repo_id), dirs_exist_ok=True)

    def get_paths_info(self, name: str, paths: list[str], revision: str | None) -> list[Any]:
        self._ask("sizes")
        files = [self.folder(name) / path for path in paths]
        return [SimpleNamespace(path=file.name, size=file.stat().st_size) for file in files if file.exists()]

    def download(self, name: str, file: str, revision: str | None) -> str:
        self._ask(f"download {file}")
        return str(self.keep(name, file))

    def keep(self, name: str, file: str) -> Path:
        """Put a file into the cache: a link in a snapshot to a blob, and the name of the main branch."""
        home = self.cache / f"models--{name.replace('/', '--')}"
        snapshot = home / "snapshots" / COMMIT
        for folder in (home / "blobs", home / "refs", snapshot):
            folder.mkdir(parents=True, exist_ok=True)
        (home / "refs" / "main").write_text(COMMIT)
        shutil.copy(self.folder(name) / file, home / "blobs" / f"blob-of-{file}")
        if not (snapshot / file).is_symlink():
            (snapshot / file).symlink_to(Path("../../blobs") / f"blob-of-{file}")
        return snapshot / file


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The hub in a folder, in the place of the client's network."""
    made = Hub(tmp_path / "hub")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(made.cache))
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: made)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", made.download)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: made.token)
    return made


def last(output: str) -> dict[str, Any]:
    return json.loads(output.splitlines()[-1])


def push(call: Command, run: Path, where: str) -> Any:
    """Push a run with plain attention, which takes no time."""
    options = [f"checkpoint={run}", "out=out", f"push={where}", "check_images=64", "format=timm", *COMMON]
    return call("export", *options)


def test_a_model_is_pushed(call: Command, plain: Path, shelf: Hub) -> None:
    done = push(call, plain, "hf:me/plain")
    assert (done.returncode, shelf.asked) == (0, ["create private=True", "upload"]), done.stderr
    names = {"README.md", "config.json", "model.json", "model.safetensors"}
    assert {file.name for file in shelf.folder("me/plain").iterdir()} == names


def test_it_comes_back_as_it_was(
    call: Command, mixed: Path, pushed: Path, shelf: Hub, tmp_path: Path
) -> None:
    shutil.copytree(pushed / "mixed", shelf.folder("me/digits"))
    assert (shelf.folder("me/digits") / "model.pt2").is_file()
    # It is read from the cache alone, until a download is asked for.
    missing = call("eval", "checkpoint=hf:me/digits", *COMMON)
    assert (missing.returncode, shelf.asked) == (3, [])
    assert "checkpoint=hf:me/digits: is not in the hub's cache; nearest: download=true" in missing.stderr
    fetched = call("eval", "checkpoint=hf:me/digits", "download=true", *COMMON)
    assert fetched.returncode == 0, fetched.stderr
    assert shelf.asked == ["sizes", "download model.safetensors", "download config.json"]
    again = call("eval", "checkpoint=hf:me/digits@main", *COMMON)
    own = call("eval", f"checkpoint={mixed}", *COMMON)
    for key in ("top1", "loss", "images"):
        assert last(again.stdout)[key] == last(fetched.stdout)[key] == last(own.stdout)[key]
    # Results lie in the working folder: the cache belongs to the hub's client.
    assert (tmp_path / "me--digits.live.val.json").is_file()
    assert {file.name for file in shelf.cache.rglob("*.json")} == {"config.json", "blob-of-config.json"}


def test_other_commands_take_it_too(call: Command, pushed: Path, shelf: Hub, tmp_path: Path) -> None:
    for name in ("mixed", "plain"):
        shutil.copytree(pushed / name, shelf.folder(f"me/{name}"))
        for file in ("model.safetensors", "config.json"):
            shelf.keep(f"me/{name}", file)
    source = "hf:me/mixed"
    assert call("predict", f"checkpoint={source}", "out=rows.csv", *COMMON).returncode == 0
    assert call("convert", f"source={source}", "out=converted").returncode == 0
    analyzed = call("analyze", f"checkpoint={source}", "report=false", "collapse.images=8", *COMMON)
    assert analyzed.returncode == 0, analyzed.stderr
    assert (tmp_path / "me--mixed" / "analysis" / "analysis.json").is_file()
    assert len(deepvit_train.load_model(source).class_names or []) == 10
    options = [*QUICK, "attn.from_block=1", f"model.weights={source}", "trainer.max_steps=1"]
    assert call("train", *options, "run_dir=tuned").returncode == 0
    options = ["out=again", "format=timm", "check_images=64", "data=digits", *COMMON]
    exported = call("export", "checkpoint=hf:me/plain", *options)
    assert exported.returncode == 0, exported.stderr
    assert shelf.asked == []


def test_the_card_says_what_the_run_knows(mixed: Path, pushed: Path) -> None:
    card, report = ((pushed / "mixed" / name).read_text() for name in ("README.md", "model.json"))
    metrics = read_state(mixed / "checkpoints" / "best")["metrics"]
    top1, images = metrics["val/top1"], metrics.get("val/images", 364)
    low, high = interval(round(top1 * images), images)
    step = read_state(mixed / "checkpoints" / "best")["step"]
    assert f"| the run, at step {step} | {top1:.4f} | {low:.4f} to {high:.4f} | {images} |" in card
    assert "The run chose this step by these images, so its figure is a little too high." in card
    assert "library_name: timm" in card
    assert "| attention | reattention, from block 1 on (norm: batch) |" in card
    assert "share of blocks that do as well with the maps of the block before" in card
    assert "trainer.batch_size: 32" in card
    assert json.loads(report)["digests"]["file"] in card
    assert 'timm.create_model("local-dir:mixed", pretrained=True)' in card
    assert str(mixed) not in card  # where things lay is nobody's business


def test_the_recipe_of_a_card_names_files_without_their_folders() -> None:
    config = {"classes": "/home/me/names.txt", "loss.class_weight": "balanced", "data.group_by": "(a/b)"}
    recipe = _recipe({"step": 1, "identity": {"config": config}})
    assert 'classes: "names.txt"' in recipe
    assert 'loss.class_weight: "balanced"' in recipe
    assert 'data.group_by: "(a/b)"' in recipe


@pytest.mark.parametrize(
    ("right", "images", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662)],
)
def test_the_interval_is_wilsons(right: int, images: int, low: float, high: float) -> None:
    """The third and fourth digits of the last row are those of Newcombe, Stat. Med. 17 (1998), table I."""
    assert interval(right, images) == pytest.approx((low, high), abs=6e-5)


@pytest.mark.parametrize("name", ["mixed", "plain"])
def test_timm_builds_what_was_pushed(mixed: Path, plain: Path, pushed: Path, name: str) -> None:
    found = timm.create_model(f"local-dir:{pushed / name}", pretrained=True).eval()
    ours = deepvit_train.load_model({"mixed": mixed, "plain": plain}[name])
    assert isinstance(found, VisionTransformer if name == "plain" else DeepViT)
    images = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(found(images), ours(images), rtol=0, atol=1e-5)
    assert found.pretrained_cfg["mean"] == [0.5, 0.5, 0.5]


def test_timms_tensors_are_understood_by_config_json(
    call: Command, plain: Path, pushed: Path, digits: Path, tmp_path: Path
) -> None:
    """Heads, classes and preprocessing are in no tensor of timm's."""
    shutil.copytree(pushed / "plain", tmp_path / "shelf")
    data = ["data=imagefolder", f"data.root={digits}", *COMMON]
    back = call("eval", "checkpoint=shelf", *data)
    assert back.returncode == 0, back.stderr
    own = call("eval", f"checkpoint={plain}", *data)
    assert last(back.stdout)["loss"] == pytest.approx(last(own.stdout)["loss"], abs=1e-6)
    assert last(back.stdout)["preprocessing"]["assumed"] == []
    said = call("eval", "checkpoint=shelf", "mean=[0.4,0.4,0.4]", *data)  # what is typed comes first
    assert last(said.stdout)["preprocessing"]["mean"] == [0.4, 0.4, 0.4]


def test_without_a_token_nothing_is_begun(call: Command, mixed: Path, shelf: Hub) -> None:
    shelf.token = None
    done = push(call, mixed, "hf:me/digits")
    assert (done.returncode, shelf.asked) == (6, [])
    assert done.stderr.splitlines() == [
        "error: push=hf:me/digits: the hub wants a token that may write (hf auth login, or HF_TOKEN)"
    ]


def error_of(kind: type[Exception], text: str = "first line\nsecond line") -> Exception:
    error = kind.__new__(kind)
    Exception.__init__(error, text)
    return error


FAILURES = [
    (errors.RepositoryNotFoundError, "no such repository, or a private one that needs a token"),
    (errors.GatedRepoError, "its owner must allow it first"),
    (errors.RevisionNotFoundError, "no such revision"),
    (errors.LocalEntryNotFoundError, "the hub can't be reached"),
    (ConnectionError, "(first line)"),
]


@pytest.mark.parametrize(("kind", "message"), FAILURES)
def test_failures_are_explained(
    call: Command, plain: Path, shelf: Hub, tmp_path: Path, kind: type[Exception], message: str
) -> None:
    shelf.error = error_of(kind)
    done = call("eval", "checkpoint=hf:me/digits", "download=true", *COMMON)
    assert done.returncode == 3
    assert message in done.stderr
    assert "checkpoint=hf:me/digits: can't be fetched" in done.stderr
    if kind is ConnectionError:
        pushed = push(call, plain, "hf:me/digits")
        assert pushed.returncode == 6
        assert "push=hf:me/digits: failed (first line)\n" in pushed.stderr
        assert (tmp_path / "out" / "README.md").is_file()
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["hf:", "hf:digits", "hf:me/../digits", "hf:me/digits@", "hf:/etc/passwd"])
def test_a_name_that_is_none_is_refused(call: Command, shelf: Hub, mixed: Path, name: str) -> None:
    done = call("eval", f"checkpoint={name}", "download=true", *COMMON)
    assert (done.returncode, shelf.asked) == (3, [])
    assert f"checkpoint={name}: not of the form hf:ORG/NAME" in done.stderr
    assert push(call, mixed, name).returncode == 2


def test_what_a_stranger_put_there_is_not_trusted(
    call: Command, shelf: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pickle under the name of safetensors, a file beyond the bound, and a config.json of nonsense."""
    folder = shelf.folder("bad/one")
    folder.mkdir(parents=True)
    torch.save({"head.weight": torch.zeros(2, 2)}, folder / "model.safetensors")
    done = call("eval", "checkpoint=hf:bad/one", "download=true", *COMMON)
    assert done.returncode == 3
    assert "not a weights file that can be read" in done.stderr

    model = timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=12, num_heads=2, num_classes=2)
    save_file(model.state_dict(), folder / "model.safetensors")
    for content, message in (
        ("[" * 100_000, "config.json: damaged"),
        ('{"architecture": "vit_tiny_patch16_224", "model_args": {"num_heads": -5}}', "3 x -5 heads"),
        ('{"architecture": ["x"], "model_args": {"num_heads": 2}}', "heads"),
    ):
        (folder / "config.json").write_text(content)
        shelf.keep("bad/one", "model.safetensors")
        shelf.keep("bad/one", "config.json")
        done = call("convert", "source=hf:bad/one", "out=converted")
        assert done.returncode == 3, (content, done.stderr)
        assert message in done.stderr
    shutil.rmtree(shelf.cache)
    monkeypatch.setitem(hub.LARGEST, "model.safetensors", 1000)
    shelf.asked.clear()
    done = call("convert", "source=hf:bad/one", "out=converted", "download=true")
    assert (done.returncode, shelf.asked) == (3, ["sizes"])
    assert "more than the 1,000 accepted" in done.stderr
    (folder / "model.safetensors").unlink()
    done = call("convert", "source=hf:bad/one", "out=converted", "download=true")
    assert "holds no model.safetensors, and no other file is read" in done.stderr


def test_nothing_that_lies_there_is_overwritten(call: Command, mixed: Path, tmp_path: Path) -> None:
    (tmp_path / "shelf").mkdir()
    (tmp_path / "shelf" / "photo.jpg").touch()
    done = push(call, mixed, "shelf")
    assert done.returncode == 6
    assert "push=shelf: holds something already" in done.stderr
    assert not (tmp_path / "out").exists()
    assert push(call, mixed, "./out").returncode == 2
