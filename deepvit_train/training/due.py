"""What is to be done after a step: as planned, or as a signal, an alarm or a failure asks for."""

from __future__ import annotations

from dataclasses import dataclass

from deepvit_train.training.run import Run


@dataclass(frozen=True)
class Due:
    """What is to be done after a step."""

    logs: bool
    evaluates: bool
    saves: bool
    stops: bool
    alarms: bool
    fails: bool
    rests: bool


def agree_on_due(run: Run, alarm: bool, lost: bool) -> Due:
    """Find out what is due after this step. All ranks must call this, and agree on what any of them asks for.

    Args:
        alarm: this rank's attention maps have collapsed.
        lost: this rank can't write its curves any more.
    """
    plan, step, signals = run.plan, run.state.step, run.signals
    limit = run.config.trainer.max_hours
    late = limit is not None and run.hours >= limit
    agreed = run.world.largest(signals.stop, signals.take_save(), alarm, lost, late)
    stops, asked, alarms, fails, rests = map(bool, agreed)
    return Due(
        logs=plan.logs(step),
        evaluates=plan.evaluates(step) and not stops,
        saves=stops or asked or alarms or fails or rests or plan.saves(step),
        stops=stops,
        alarms=alarms,
        fails=fails,
        rests=rests,
    )
