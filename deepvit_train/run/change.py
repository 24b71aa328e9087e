"""Which changes of its configuration a run allows, and what differs between two configurations."""

from __future__ import annotations

from typing import Any

from deepvit_train.config.alias import BEFORE

# These may change when a run goes on. They say where it runs and what it tells, not what it computes.
FREE_KEYS = {
    "distill.teacher",  # the teacher's weights are compared themselves
    "distill.file",
    "download",
    "tracker",
    "data.root",
    "data.class_map",
    "data.classes",  # the names of a model's outputs are compared themselves
    "data.empty_classes",
    "data.allow_subset",
    "data.workers",
    "data.cache",
    "data.max_bad",
    "data.max_bytes",
    "data.max_pixels",
    "data.follow_links",
    "trainer.eval_batch_size",
    "trainer.eval_every_epochs",
    "trainer.select_by",
    "trainer.patience",
    "trainer.max_hours",
    "trainer.calibrate_images",
    "trainer.accumulate",
    "trainer.channels_last",
    "trainer.compile",
    "trainer.deterministic",
    "trainer.device",
    "trainer.threads",
    "trainer.report",
    "trainer.shard",
    "trainer.grad_checkpointing",
    "trainer.log_every_steps",
    "trainer.save_every_steps",
    "trainer.probe_every_steps",
    "collapse.maps",
    "collapse.metric",
    "collapse.axis",
    "collapse.threshold",
    "collapse.k",
    "collapse.images",
    "collapse.warn_above",
    "collapse.stop_above",
    "collapse.swap_rise",
    "collapse.alarm_from",
    "trainer.keep_last",
    "trainer.max_scaler_skips",
    "trainer.timeout_s",
    "trainer.requeue",
    "name",
    "run_dir",
    "resume",
}
# What some of them do change. It is said when a run goes on with another value.
EFFECTS = {
    "trainer.accumulate": "sums round differently; BatchNorm and dropout see other parts of a batch",
    "trainer.channels_last": "results round differently",
    "trainer.compile": "results round differently",
    "trainer.deterministic": "on a GPU results round differently",
    "trainer.eval_batch_size": "training does not change; statistics are calibrated on batches of this size",
    "trainer.calibrate_images": "training does not change; evaluations do",
    "trainer.select_by": "training does not change; coming evaluations are compared with the best one so far",
    "data.max_bytes": "training changes only if images become readable or unreadable",
    "data.max_pixels": "training changes only if images become readable or unreadable",
}
# These may grow, to train the same run for longer.
GROWING_KEYS = {"trainer.epochs", "trainer.max_steps"}


def differences(before: dict[str, Any], after: dict[str, Any]) -> dict[str, str]:
    """Return the keys in which two configurations differ, with a line for each: `model.depth=6 (now 8)`.

    A key that only `before` has is left out: this version does not know it any more. So is a key that only
    `after` has and that asks for what a version without it did: nothing, or what `BEFORE` says.
    """
    old, new = BEFORE | flatten(before), flatten(after)
    return {
        key: f"{key}={old.get(key, 'not set')} (now {value})"
        for key, value in sorted(new.items())
        if old.get(key) != value and (key in old or value not in (None, False))
    }


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested configuration as a flat one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def may_change(key: str, before: dict[str, Any], after: dict[str, Any]) -> bool:
    """Return whether a run may go on with what the configuration `after` says of a key."""
    if key in GROWING_KEYS:
        old, new = flatten(before).get(key), flatten(after).get(key)
        return new is None or (type(old) in (int, float) and new >= old)
    return key in FREE_KEYS


def unchanging(config: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a configuration that stays as it is while a run goes on, with dotted keys."""
    free = FREE_KEYS | GROWING_KEYS
    return {key: value for key, value in flatten(config).items() if key not in free}
