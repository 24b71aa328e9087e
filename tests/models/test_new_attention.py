"""Add the attention of docs/add-an-attention.md to a copy of the package, by its two files, and use it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deepvit_train.config.model import AttentionKind
from deepvit_train.config.shipped import attention_kinds, choices, config_dir
from deepvit_train.models.attention import FORMS, attention_class
from tests.conftest import QUICK

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "add-an-attention.md"
NAME = "gated_reattention"

# What is run beside the new form: every line of it is what the page promises.
USE = """
import sys, timm, torch
from dataclasses import replace
from deepvit_train.config.compose import compose_command
from deepvit_train.config.preset import Architecture, attention_preset, model_preset
from deepvit_train.commands.bench import build_contender
from deepvit_train.models import DeepViT, load_model, start_from
from deepvit_train.models.attention import attention_class

torch.manual_seed(0)
shape = replace(model_preset("digits").model, depth=2)
attn = attention_preset("gated_reattention")
model = DeepViT(Architecture(shape, attn), num_classes=5).double().eval()
assert type(model.blocks[0].attn) is attention_class("gated_reattention")

# maps and attend agree, gradients reach the gate, and a closed gate is plain attention.
x = torch.randn(2, 17, 64, dtype=torch.float64)
attention = model.blocks[0].attn
torch.testing.assert_close(attention(x), attention.forward_with_maps(x)[0])
attention(x).sum().backward()
assert attention.gate.grad.abs().min() > 0
plain = DeepViT(Architecture(shape, attention_preset("self")), num_classes=5).double().eval()
closed = DeepViT(Architecture(shape, attn), num_classes=5).double().eval()
closed.load_state_dict(plain.state_dict(), strict=False)
for block in closed.blocks:
    torch.nn.init.constant_(block.attn.gate, -1e9)
images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
torch.testing.assert_close(closed(images), plain(images))

# A file without a description is known by its tensors, and a plain one starts the rest.
torch.save(model.state_dict(), "gated.pth")
options = dict(heads=4, transform_scale=False)
assert load_model("gated.pth", preset="digits", **options).attn.kind == "gated_reattention"
assert torch.equal(load_model("gated.pth", preset="digits", **options)(images), model(images))
torch.save(timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=64, depth=2,
                             num_heads=4, mlp_ratio=2.0, num_classes=5).state_dict(), "vit.pth")
(note,) = start_from(model.float(), "vit.pth").notes
assert note.startswith("fresh in 2 blocks: attn.theta, attn.theta_bias, attn.gate, attn.norm.weight"), note

# It is in timm's registry, and a contender of the bench, which has no formula for it.
assert timm.create_model("vit_16b", attn="gated_reattention", depth=1).blocks[0].attn.gate.shape == (12,)
config = compose_command("bench", ["model=digits", "contenders=[self,gated_reattention]"])
assert build_contender("gated_reattention", config, config.model).blocks[0].attn.gate.shape == (4,)
"""


def blocks() -> tuple[str, str]:
    """The module and the YAML file of the page."""
    module, *_ = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    choice, *_ = re.findall(r"^```yaml\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    return module, choice


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package and its configuration, with the YAML file of the page and no class for it."""
    folder = tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT / "deepvit_train", folder / "deepvit_train", ignore=shutil.ignore_patterns("__pyc*"))
    shutil.copytree(config_dir(), folder / "configs")
    (folder / "configs" / "attn" / f"{NAME}.yaml").write_text(blocks()[1])
    return folder


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_example_is_two_short_files() -> None:
    module, choice = blocks()
    assert len(module.splitlines()) < 40
    assert len(choice.splitlines()) <= 5
    assert all(len(line) <= 110 for line in [*module.splitlines(), *choice.splitlines()])


@pytest.mark.runs
def test_the_example_of_the_page_works(package: Path, digits: Path) -> None:
    train = ["-m", "deepvit_train.cli", "train", *QUICK, f"attn={NAME}", "run_dir=run", "trainer.epochs=1"]
    train += ["schedule.warmup_epochs=0"]
    module = package / "deepvit_train" / "models" / f"attention_{NAME}.py"
    module.unlink(missing_ok=True)
    refused = python(package, *train)
    assert refused.returncode == 2
    assert f"attn.kind={NAME}: no class has @form('{NAME}')" in refused.stderr
    assert not (package / "run").exists()

    module.write_text(blocks()[0])
    used = python(package, "-c", USE)
    assert used.returncode == 0, used.stderr
    trained = python(package, *train)
    assert trained.returncode == 0, trained.stderr
    assert f"model: {NAME}, 2 blocks" in trained.stdout
    evaluated = python(package, "-m", "deepvit_train.cli", "eval", "run", "threads=1")
    assert evaluated.returncode == 0, evaluated.stderr
    assert f"attn={NAME}" not in evaluated.stderr
    assert NAME in python(package, "-m", "deepvit_train.cli", "train", "--help").stdout


def test_every_choice_has_a_class() -> None:
    assert attention_kinds() == sorted(kind.value for kind in AttentionKind)
    for kind in attention_kinds():
        assert attention_class(kind) is FORMS[kind]
    assert {"self", "reattention"} <= set(choices("attn"))
