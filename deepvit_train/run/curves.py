"""Where the curves of a run always go: TensorBoard, and metrics.jsonl with the same scalars."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import Any, cast

from tensorboard.plugins.hparams import plugin_data_pb2
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from deepvit_train.atomic import append, make_folder, open_end, write_text
from deepvit_train.reading import read_json_lines

# TensorBoard's custom scalars: what a person looks at first, then whether it runs well, then collapse. Each
# chart draws the curves whose names fit.
LAYOUT = {
    "training": {
        "loss": ["Multiline", ["^train/loss$", "^train/cross_entropy$", "^val/loss$", "^val_ema/loss$"]],
        "top-1": ["Multiline", ["^val/top1$", "^val_ema/top1$"]],
        "learning rate": ["Multiline", ["^train/lr$"]],
        "images a second": ["Multiline", ["^train/images_per_s$"]],
        "top-5": ["Multiline", ["^val/top5$", "^val_ema/top5$"]],
        "mean accuracy of classes": ["Multiline", ["^val/mean_class$", "^val_ema/mean_class$"]],
        "norm of the gradient": ["Multiline", ["^train/grad_norm$"]],
        "share of time spent waiting for data": ["Multiline", ["^train/data_wait$"]],
        "memory, MiB": ["Multiline", ["^train/memory_mib$"]],
    },
    "collapse": {
        "cosine between the tokens of the last block": ["Multiline", ["^collapse/token_similarity_last$"]],
        "share of blocks whose maps do not matter": ["Multiline", ["^collapse/replaceable_ratio$"]],
        "rise of the loss with the maps of the block before": ["Multiline", ["^collapse/map_swap$"]],
        "length of the attention branch over the token's": ["Multiline", ["^collapse/branch_share"]],
        "share of similar blocks": ["Multiline", ["^collapse/similar_ratio$"]],
        "cosine of maps to the block before": ["Multiline", ["^collapse/similarity_"]],
        "distance of maps from 1/N": ["Multiline", ["^collapse/deviation_"]],
        "cosine between the heads of a block": ["Multiline", ["^collapse/head_similarity_"]],
        "cosine of features to the last block's": ["Multiline", ["^collapse/feature_cosine"]],
        "parameters that mix heads: mean over blocks": ["Multiline", ["^mixing/.*_mean$"]],
        "parameters that mix heads: standard deviation": ["Multiline", ["^mixing/.*_std$"]],
        "gradient of queries and keys over that of values": ["Multiline", ["^train/query_key_gradient"]],
    },
}
# Shown beside the curves, because their names alone do not say what may be compared.
READING = """\
**train/loss** is what the training minimises: the cross-entropy, or what else `loss=` says, with smoothed
labels (`loss.label_smoothing`), plus the penalty on attention maps (`loss.cosine_weight`). It is a mean
over the steps since the line before.

**train/cross_entropy** is plain: without smoothing, weights of classes and penalty. It is logged where the
loss is another. Compare **val/loss** with it, and remember that training images are varied. With mixup or
cutmix the targets are mixtures of two classes, so that even a perfect model stays above 0.

**val/** is measured with the weights as they are, **val_ema/** with the averaged ones.
`checkpoints/best` is the evaluation with the highest top-1, or what else `trainer.select_by` says, of the
averaged weights if there are any. Of equal figures the one with the lower loss is the best.
**mean_class** is the mean over classes of the accuracy in each.
"""


class MetricsFile:
    """RUN/metrics.jsonl: a line of JSON for each call, with the step.

    Args:
        kept: the last step whose lines stay; later ones are removed, because the run goes on from there.
        evaluated: whether the evaluation of that step stays too.
    """

    def __init__(self, folder: Path, kept: int, evaluated: bool) -> None:
        _drop_later(folder / "metrics.jsonl", kept, evaluated)
        self._file = append(folder / "metrics.jsonl")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Write a line."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoard:
    """RUN/tb: what `tensorboard --logdir` shows. Steps after `kept` are hidden, as above."""

    def __init__(self, folder: Path, kept: int) -> None:
        curves = make_folder(folder, "tb")
        # The library opens a file whose name can be foreseen. With this ending nobody foresees it.
        ending = f".{secrets.token_hex(8)}"
        self._writer = SummaryWriter(str(curves), purge_step=kept + 1, filename_suffix=ending)
        _hold_open(self._writer)
        self._writer.add_custom_scalars(LAYOUT)
        self._writer.add_text("about the curves", READING, kept + 1)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Add a point to each curve."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def text(self, name: str, text: str, step: int) -> None:
        """Show preformatted text."""
        self._writer.add_text(name, "    " + text.replace("\n", "\n    "), step)

    def image(self, name: str, image: Tensor, step: int) -> None:
        """Show an image (3, height, width)."""
        self._writer.add_image(name, image, step)

    def outcome(
        self, config: dict[str, Any], notable: set[str], metrics: dict[str, float], step: int
    ) -> None:
        """Add the run to the table of hyperparameters, the notable ones first."""
        flat = {
            key: value if isinstance(value, (bool, int, float)) else str(value)
            for key, value in config.items()
        }
        final = {f"final/{name}": value for name, value in metrics.items()}
        # Into the same file: add_hparams would open another one, without an ending.
        assert self._writer.file_writer is not None
        experiment, *session = hparams(flat, final)
        _put_first(notable, experiment)
        for part in (experiment, *session):
            self._writer.file_writer.add_summary(part, step)
        for name, value in final.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is still buffered."""
        self._writer.close()


def _hold_open(writer: SummaryWriter) -> None:
    """Let TensorBoard write its records to a file that is opened once.

    It would open the file anew for each record, by its name: that of another run's, if the folder was removed
    and another run began in its place. This uses names that are private to TensorBoard.
    """
    writer._get_file_writer()
    for events in (writer.all_writers or {}).values():
        records: Any = events.event_writer._async_writer._writer
        records._writer = os.fdopen(open_end(Path(events.event_writer._file_name)), "ab", 0)


def _put_first(keys: set[str], experiment: Any) -> None:
    """Mark hyperparameters as those that differ between runs, which TensorBoard shows before all others."""
    plugin, messages = experiment.value[0].metadata.plugin_data, cast(Any, plugin_data_pb2)
    content = messages.HParamsPluginData.FromString(plugin.content)
    for info in content.experiment.hparam_infos:
        info.differs = info.name in keys
    plugin.content = content.SerializeToString()


def _drop_later(file: Path, step: int, evaluated: bool) -> None:
    """Remove the lines after a step, and a line that a kill cut short; the step's evaluation if asked to."""
    if not file.exists() and not file.is_symlink():
        return
    kept = []
    for line, content in read_json_lines(file):
        if not isinstance(content, dict) or not isinstance(of := content.get("step"), int):
            continue
        doomed = not evaluated and of == step and "val/top1" in content
        if of <= step and not doomed:
            kept.append(line)
    write_text(file, "".join(f"{line}\n" for line in kept))
