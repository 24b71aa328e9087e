"""What deepvit-train says and writes at the end of a run: its metrics, its best checkpoint, where all is."""

from __future__ import annotations

from typing import Any

from deepvit_train.commands.train_job import Job
from deepvit_train.config.compose import compose_command, plain
from deepvit_train.console import amount, console
from deepvit_train.error import ConfigError
from deepvit_train.run.change import FREE_KEYS, flatten
from deepvit_train.run.tracking import Tracker
from deepvit_train.training.validation import COUNTS, phrase, phrase_best
from deepvit_train.training.watch import CollapseWatch


def report(job: Job, watch: CollapseWatch, tracker: Tracker, lines: list[str]) -> dict[str, Any]:
    """Log the outcome, write result.json and the run's page, and say how the run ended.

    Args:
        lines: what was said of the run at its start.
    """
    state, say, result = job.run.state, job.run.say, result_of(job)
    if (probe := watch.probe) is not None and probe.looks:
        say(f"attention maps: looked at {amount(probe.looks, 'time')}, {probe.seconds:.2f} s in all")
    job.folder.write_result(result)
    config = flatten(plain(job.run.config))
    notable = _notable(config)
    tracker.outcome(config, notable, state.metrics, state.step)
    tracker.raise_failure()
    if state.step < job.run.plan.total_steps:
        waited = amount(state.worse, "evaluation")
        say(f"ended by trainer.patience: none of the last {waited} was better than the best one")
    if job.run.config.trainer.report:
        _write_page(job, lines, {key: config[key] for key in notable})
    say(f"done at step {state.step}: {phrase(state.metrics, job.labels.present)}")
    tell_where(job)
    return result


def _write_page(job: Job, lines: list[str], notable: dict[str, Any]) -> None:
    """Write the run's page. The run is done and saved, so a page that can't be written is no failure."""
    from deepvit_train.commands.train_page import write_page  # matplotlib takes a second at a run's start

    if not job.run.world.is_main:
        return
    try:
        job.run.say(f"report: {write_page(job, lines, notable)}")
    except Exception as error:  # a damaged line of an older start, for example
        job.run.say(f"warning: the report was not written: {error}")


def rest(job: Job) -> dict[str, Any]:
    """Say that the hours of this start are over, and how the run goes on."""
    state, limit = job.run.state, job.run.config.trainer.max_hours
    job.run.say(
        f"stopped by trainer.max_hours={limit:g} at step {state.step} of {job.run.plan.total_steps}, after "
        f"{state.hours:.2f} hours in all; saved {job.folder.checkpoints / 'last'}; the same command goes on"
    )
    tell_where(job)
    return result_of(job)


def _notable(config: dict[str, Any]) -> set[str]:
    """Return the keys that tell a run from others: they affect its result and have not their default.

    Where the files of configs/ were broken while the run went on, no default is known and all keys tell.
    """
    try:
        usual = flatten(plain(compose_command("train", [])))
    except ConfigError:
        usual = {}
    chosen = {key for key, value in config.items() if value != usual.get(key) and key not in FREE_KEYS}
    return {"attn.kind", *chosen}


def tell_where(job: Job) -> None:
    """Say which checkpoint is the best and where it lies, how to see the curves, and where all is."""
    folder, best = job.folder.path, job.run.state.best
    if best:
        job.run.say(
            f"best: {phrase_best(best, job.run.config.trainer.select_by)}: {job.folder.checkpoints / 'best'}"
        )
    if job.run.world.is_main:
        console.print(f"watch: tensorboard --logdir {folder.parent}", soft_wrap=True)
    job.run.say(f"run folder: {folder}")


def result_of(job: Job) -> dict[str, Any]:
    """Return the run's folder, the metrics of the last evaluation, and of which images it was."""
    metrics = {name: value for name, value in job.run.state.metrics.items() if name not in COUNTS}
    images, of = (job.run.state.metrics.get(name) for name in COUNTS)
    partial = {} if images is None else {"partial": True, "images": images, "of": of}
    labels = {"labels": job.labels.summary()} if job.labels.absent else {}
    return {"run_dir": str(job.folder.path), **metrics, **partial, **labels}
