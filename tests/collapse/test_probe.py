"""Show that the probe sees what the measures say, and leaves no trace in the model or in a run."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from deepvit_train.collapse import measure
from deepvit_train.collapse.contribution import contributions, replaceable
from deepvit_train.collapse.measurement import measure_model, similar
from deepvit_train.collapse.picture import draw_matrices
from deepvit_train.collapse.probe import Probe
from deepvit_train.commands import train
from deepvit_train.config.collapse import Axis, Metric
from deepvit_train.config.compose import compose_command
from deepvit_train.error import Collapsed, ConfigError
from deepvit_train.models import DeepViT, record_maps
from tests.collapse.test_measurement import DEFINITION, build
from tests.conftest import QUICK


@pytest.mark.parametrize("attn", ["self", "reattention_vit_pytorch"])
def test_a_look_is_what_the_measures_say(attn: str) -> None:
    model, images = build(attn), torch.randn(11, 3, 16, 16)
    classes = torch.arange(11) % 3
    look = Probe(images, classes, DEFINITION).look(model)
    expected = measure_model(model, [images]) | contributions(model, [(images, classes)])
    ratio = measure.similar_ratio(similar(expected, DEFINITION))
    assert look.scalars["collapse/similar_ratio"] == pytest.approx(ratio)
    assert look.replaceable == replaceable(expected["map_swap"], DEFINITION.swap_rise)
    for name, value in {
        "map_swap": expected["map_swap"].mean(),
        "branch_share": expected["branch_share"].mean(),
        "branch_share_least": expected["branch_share"].min(),
        "deviation_pre_mix": expected["deviation/pre_mix"].mean(),
    }.items():
        assert look.scalars[f"collapse/{name}"] == pytest.approx(float(value), abs=1e-5)
    for maps in ("pre_mix", "post_norm") if attn != "self" else ("pre_mix",):
        for metric in Metric:
            matrix = expected[f"similarity/{maps}/{metric}/column"]
            found = look.scalars[f"collapse/similarity_{maps}_{metric}"]
            assert found == pytest.approx(float(matrix.diagonal(1).mean()), abs=1e-5)
        heads = float(expected[f"heads/{maps}/raw/column"].mean())
        assert look.scalars[f"collapse/head_similarity_{maps}"] == pytest.approx(heads, abs=1e-5)
    assert ("collapse/similarity_post_norm_raw" in look.scalars) == (attn != "self")
    to_last = float(expected["features"][:, -1].mean())
    assert look.scalars["collapse/feature_cosine_to_last"] == pytest.approx(to_last, abs=1e-5)
    shown = {
        f"{maps} maps, {metric} cosine": expected[f"similarity/{name}/{metric}/column"]
        for maps, name in [(DEFINITION.maps.label, str(DEFINITION.maps))]
        for metric in (Metric.centred, Metric.raw)
    }
    assert torch.equal(look.picture, draw_matrices(shown))


def test_batchnorm_uses_the_statistics_of_the_images_and_keeps_none() -> None:
    model, images = build("reattention"), torch.randn(5, 3, 16, 16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    look = Probe(images, torch.zeros(5, dtype=torch.int64), DEFINITION).look(model.train())
    assert torch.equal(torch.get_rng_state(), generator)
    assert model.training
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in after.items())

    # The same by other means: the model's own training mode, which normalises by the batch.
    maps = _maps_in_training_mode(model, images)
    expected = float(measure.similarity_matrix(maps, Axis.column, Metric.raw).diagonal(1).mean())
    assert look.scalars["collapse/similarity_post_norm_raw"] == pytest.approx(expected, abs=1e-4)
    in_evaluation = [record.after for record in record_maps(model, images)]
    otherwise = float(measure.similarity_matrix(in_evaluation, Axis.column, Metric.raw).diagonal(1).mean())
    assert otherwise != pytest.approx(expected, abs=1e-4)


def _maps_in_training_mode(model: DeepViT, images: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        x, maps = model.embed(images), []
        for block in model.blocks:
            x, _, after = block.forward_with_maps(x)
            maps.append(after)
    return maps


def start(folder: Path, *overrides: str) -> None:
    quickly = [*QUICK, "trainer.limit_batches=4", "collapse.images=9", f"run_dir={folder}"]
    train.run(compose_command("train", [*quickly, *overrides]))


def digest(folder: Path) -> str:
    files = sorted((folder / "checkpoints" / "last").glob("*.safetensors"))
    assert len(files) >= 2
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


@pytest.mark.parametrize("attn", ["self", "reattention"])
def test_weights_are_the_same_to_the_bit_with_the_probe_and_without(
    digits: Path, tmp_path: Path, attn: str
) -> None:
    same = [f"attn={attn}", "model.dropout=0.1", "model.drop_path=0.1", "augment.mixup=0.8"]
    start(tmp_path / "off", *same, "trainer.probe_every_steps=null")
    start(tmp_path / "on", *same, "trainer.probe_every_steps=1")
    assert digest(tmp_path / "on") == digest(tmp_path / "off")
    events = EventAccumulator(str(tmp_path / "on" / "tb"))
    events.Reload()
    assert [event.step for event in events.Images("collapse/similarity")][-1] == 8
    assert [event.step for event in events.Scalars("collapse/similar_ratio")] == list(range(9))
    assert "collapse" not in (tmp_path / "off" / "metrics.jsonl").read_text()


def test_the_alarm_warns_or_ends_the_run_and_a_higher_bound_goes_on(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Nearly untrained: no block's own maps matter.
    alarmed = ["trainer.probe_every_steps=3", "model.depth=2", "attn=self", "collapse.warn_above=0.2"]
    alarmed += ["collapse.alarm_from=0.3"]
    with pytest.raises(
        Collapsed, match=r"step 3: .* above collapse\.stop_above=0\.4 .*step_0000003"
    ) as error:
        start(tmp_path / "run", *alarmed, "collapse.stop_above=0.4")
    assert error.value.exit_code == 7
    assert "step 3: warning: 1.00 of the blocks are replaceable" in capsys.readouterr().out
    start(tmp_path / "run", *alarmed, "collapse.stop_above=null")
    assert "resumed from" in capsys.readouterr().out
    start(tmp_path / "whole", *alarmed)
    assert digest(tmp_path / "run") == digest(tmp_path / "whole")
    steps = [
        line["step"]
        for line in map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
        if "collapse/similar_ratio" in line
    ]
    assert steps == [0, 3, 6]
    with pytest.raises(ConfigError, match=r"nearest: collapse\.warn_above=0\.1"):
        compose_command("train", ["collapse.warn_above=0.2", "collapse.stop_above=0.1"])
    with pytest.raises(ConfigError, match=r"no share is above 1; nearest: collapse\.stop_above=0\.99"):
        compose_command("train", ["collapse.stop_above=1"])
