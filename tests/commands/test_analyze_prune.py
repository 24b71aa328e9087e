"""Leave blocks out of a model, and compare with a model that never had them."""

from __future__ import annotations

from dataclasses import replace

import torch

from deepvit_train.commands.analyze_prune import prune
from deepvit_train.config.preset import Architecture, attention_preset, model_preset
from deepvit_train.evaluation.accuracy import EvalResult
from deepvit_train.models import DeepViT


def test_each_cut_is_the_model_without_those_blocks() -> None:
    torch.manual_seed(0)
    shape = replace(model_preset("digits").model, depth=4)
    model = DeepViT(Architecture(shape, attention_preset("self")), num_classes=5).eval()
    images, logits = torch.randn(2, 3, 16, 16), []

    def measure() -> EvalResult:
        logits.append(model(images))
        return EvalResult(0.5, 1.0, float(len(model.blocks)), 2, 1.0, [], [])

    before = dict(model.named_parameters())
    found = prune(model, [0.3, -0.1, 0.3, 0.0], measure)
    assert found["order"] == [1, 3, 0, 2]
    assert found["loss"] == [4.0, 3.0, 2.0, 1.0]
    blocks = list(model.blocks)
    for number, kept in enumerate(([0, 1, 2, 3], [0, 2, 3], [0, 2], [2])):
        x = model.embed(images)
        for index in kept:
            x = blocks[index](x)
        torch.testing.assert_close(logits[number], model.forward_head(model.normalise(x)))
    assert dict(model.named_parameters()).keys() == before.keys()
