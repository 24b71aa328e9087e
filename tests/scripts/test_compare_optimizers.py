"""The comparison of optimizers: equal searches, the best rate of each, and no cell trained twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from deepvit_train.config.train import TrainConfig
from deepvit_train.error import NotFiniteError
from scripts import compare_optimizers


def test_each_optimizer_gets_its_best_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained: list[tuple[str, str, float, int]] = []

    def train(config: TrainConfig) -> dict[str, Any]:
        Path(config.run_dir).mkdir(parents=True)
        name = config.optim.name
        trained.append((name, config.attn.kind, config.optim.lr, config.seed))
        searched = config.data.val_share == 0.1
        assert searched == (config.seed == compare_optimizers.SEARCH_SEED)
        assert str(config.data.root).endswith("/train") == searched
        if name == "sgd" and config.optim.lr > 0.5:
            raise NotFiniteError("too fast")
        # The usual rate of AdamW is the best, three times the others' is.
        best = 1e-3 if name == "adamw" else 3 * compare_optimizers.USUAL[config_name(name)]
        top1 = 0.9 if config.optim.lr == pytest.approx(best) else 0.5
        averaged = {"val_ema/top1": 0.8} if name.startswith("schedulefree") and top1 == 0.9 else {}
        return {"val/top1": top1, **averaged}

    monkeypatch.setattr(compare_optimizers.train, "run", train)
    usual = {name: compare_optimizers.USUAL[name] for name in ("adamw", "sgd", "schedulefree")}
    monkeypatch.setattr(compare_optimizers, "USUAL", usual)
    monkeypatch.setattr(compare_optimizers, "ATTENTIONS", ("reattention",))
    monkeypatch.setattr("sys.argv", ["compare_optimizers", "data", str(tmp_path / "out")])
    compare_optimizers.main()
    assert len(trained) == 3 * (4 + 3)
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["search-reattention-sgd-1"] == 0
    assert [found[f"reattention-sgd-0.3-s{seed}"] for seed in range(3)] == [0.9] * 3
    assert found["reattention-schedulefree-0.0075-s2"] == 0.8
    shown = capsys.readouterr().out
    assert shown.count("90.00 90.00 90.00") == 2
    assert shown.count("-10.00 (-10.00 to -10.00)") == 1

    trained.clear()
    compare_optimizers.main()
    assert trained == []


def config_name(optimizer: str) -> str:
    """Return the choice in configs/optim/ of an optimizer's name in timm or schedulefree."""
    return "schedulefree" if optimizer.startswith("schedulefree") else optimizer
