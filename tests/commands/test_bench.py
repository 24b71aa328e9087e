"""Compare what deepvit-bench measures with tensors counted by hand, and check what it prints."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deepvit_train.commands import bench, bench_contender
from deepvit_train.commands import bench_cost as cost
from deepvit_train.config.compose import compose_command
from deepvit_train.config.preset import attention_preset
from deepvit_train.config.recipe import Precision
from deepvit_train.config.shipped import choices
from deepvit_train.error import ConfigError
from deepvit_train.models import ReAttention
from tests.conftest import Command

SMALL = [
    "model=digits",
    "model.depth=2",
    "model.dim=32",
    "classes=5",
    "batch_size=3",
    "repeats=2",
    "threads=1",
    "device=cpu",
]


class Squares(nn.Module):
    """(B, D) -> (B, D): keeps its input alone for the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1000))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight).square()


def test_saved_bytes_count_each_memory_once_and_no_weights() -> None:
    workload = cost.Workload(torch.randn(4, 1000), torch.zeros(4, dtype=torch.int64), Precision.fp32)
    # The input, its product with the weights, log-softmax's output, and the loss's targets and weight.
    expected = 3 * 4 * 1000 * 4 + 4 * 8 + 4
    assert cost.saved_bytes(Squares(), workload) == expected


def test_peak_bytes_are_those_held_at_once() -> None:
    held = torch.empty(1000)

    def work() -> None:
        first = torch.empty(50_000, dtype=torch.uint8)
        del first
        both = [torch.empty(40_000, dtype=torch.uint8), held + 1.0, torch.empty(30_000, dtype=torch.uint8)]
        assert len(both) == 3

    assert cost.peak_bytes(work, torch.device("cpu")) == 74_000
    assert cost.peak_bytes(work, torch.device("cpu")) == 74_000


def test_peak_bytes_count_what_the_operator_keeps() -> None:
    """Measured twice the same, although the second call finds the memory of the first."""
    config = compose_command("bench", SMALL)
    model = bench_contender.build_contender("reattention", config, config.model)
    workload = cost.Workload(torch.randn(2, 3, 16, 16), torch.zeros(2, dtype=torch.int64), Precision.fp32)
    peaks = []
    for _ in range(2):
        peaks.append(cost.peak_bytes(partial(workload.train, model), torch.device("cpu")))
        model.zero_grad(set_to_none=True)
    assert peaks[0] == peaks[1] > 0


@pytest.mark.parametrize("name", ["timm", "vit_pytorch", "configured", *choices("attn")])
def test_contenders_have_the_configured_shape(name: str) -> None:
    config = compose_command("bench", [*SMALL, "attn.norm=layer"])
    model = bench_contender.build_contender(name, config, config.model)
    with torch.no_grad():
        assert model(torch.randn(2, 3, 16, 16)).shape == (2, 5)
    widths = {module.out_features for module in model.modules() if isinstance(module, nn.Linear)}
    assert widths - {5} == {96, 32, 64}
    norms = {type(module.norm) for module in model.modules() if isinstance(module, ReAttention)}
    if name in ("self", "differential", "timm", "vit_pytorch"):
        assert norms == set()
    else:
        attn = config.attn if name == "configured" else attention_preset(name)
        classes = {"batch": nn.BatchNorm2d, "layer": nn.LayerNorm, "none": type(None)}
        assert norms == {classes[attn.norm]}


def test_an_attention_without_the_operator_has_no_formula() -> None:
    config = compose_command("bench", [*SMALL, "contenders=[talking_heads_formula]"])
    with pytest.raises(ConfigError, match="'talking_heads_formula' is unknown: talking_heads does not use"):
        bench_contender.build_contender("talking_heads_formula", config, config.model)


@pytest.mark.parametrize("name", ["reattention", "reattention_vit_pytorch"])
def test_the_formula_is_the_same_function_and_keeps_more(name: str) -> None:
    config = compose_command("bench", SMALL)
    operator, formula = (
        bench_contender.build_contender(each, config, config.model) for each in (name, f"{name}_formula")
    )
    formula.load_state_dict(operator.state_dict())
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(formula.double()(images.double()), operator.double()(images.double()))
    formula, operator = formula.float(), operator.float()
    workload = cost.Workload(images, torch.zeros(3, dtype=torch.int64), Precision.fp32)
    assert cost.saved_bytes(formula, workload) > 1.2 * cost.saved_bytes(operator, workload)


def test_run_measures_every_contender_at_every_value(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, plot = tmp_path / "bench.json", tmp_path / "depth.svg"
    config = compose_command(
        "bench",
        [
            *SMALL,
            "contenders=[timm,reattention]",
            "vary=model.depth",
            "values=[1,3]",
            f"out={out}",
            f"plot={plot}",
        ],
    )
    report = bench.run(config)
    rows = {(row["contender"], row["value"]): row for row in report["rows"]}
    assert list(rows) == [("timm", 1), ("reattention", 1), ("timm", 3), ("reattention", 3)]
    for row in rows.values():
        assert len(row["train_samples_ms"]) == len(row["infer_samples_ms"]) == 2
        assert min(row["train_samples_ms"]) <= row["train_ms"] <= max(row["train_samples_ms"])
        first = rows["timm", row["value"]]
        assert row["train_ratio"] == pytest.approx(row["train_ms"] / first["train_ms"])
        assert row["infer_ratio"] == pytest.approx(row["infer_ms"] / first["infer_ms"])
    one, three = rows["reattention", 1], rows["reattention", 3]
    assert three["parameters"] > one["parameters"]
    assert three["saved_mib_per_image"] > 2 * one["saved_mib_per_image"]
    printed = capsys.readouterr().out
    assert (
        json.loads(printed.splitlines()[-1]) == json.loads(out.read_text()) == json.loads(json.dumps(report))
    )
    assert "model.depth=3" in printed
    assert "training step" in plot.read_text()


def test_every_contender_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[object] = []
    compile_model = torch.compile

    def noting(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", lambda model, mode: compile_model(model, backend=noting))
    contenders = ["self", "reattention", "reattention_vit_pytorch", "talking_heads", "differential"]
    keys = [*SMALL, "model.heads=2", "repeats=1", "compile=default", f"contenders=[{','.join(contenders)}]"]
    # For training and for inference: more graphs of one code than torch compiles by default.
    with torch._dynamo.config.patch(recompile_limit=8):
        bench.run(compose_command("bench", keys))
    assert len(compiled) >= 2 * len(contenders) > 8


def test_the_command_as_typed(call: Command) -> None:
    result = call("bench", *SMALL, "contenders=[self]", "precision=bf16")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert json.loads(result.stdout.splitlines()[-1])["rows"][0]["contender"] == "self"


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("contenders=[tim]", "did you mean 'timm'"),
        ("contenders=[self_formula]", "unknown"),
        ("contenders=[]", "at least one"),
        ("vary=model.dept", "did you mean 'model.depth'"),
        ("vary=model.depth", "go together"),
        ("values=[1]", "go together"),
        ("plot=cost.png", "needs vary"),
    ],
)
def test_mistakes_are_named(override: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        compose_command("bench", [*SMALL, override])


def test_what_a_contender_can_not_be_is_named() -> None:
    config = compose_command("bench", [*SMALL, "model.head_dim=5"])
    with pytest.raises(ConfigError, match="take timm out"):
        bench_contender.build_contender("timm", config, config.model)
