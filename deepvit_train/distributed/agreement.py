"""Ranks agree: what one of them finds wrong ends all of them, and what must be equal on all is compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any, TypeVar

from deepvit_train.distributed.world import World
from deepvit_train.error import UserError, explained

Result = TypeVar("Result")


def together(world: World, work: Callable[[], Result]) -> Result:
    """Do a piece of work on every rank, and return its result. All ranks must call this.

    Where it raises a UserError on any rank, all ranks raise that of the lowest such rank, so that none waits
    for one that has ended, and all end with one exit code. It is named if others did not fail in this way.
    """
    error, results = None, []
    try:
        with explained("train"):  # an error of the system too must not leave the other ranks waiting
            results.append(work())
    except UserError as caught:
        error = caught
    if world.size > 1 and world.any(error is not None):
        errors: list[UserError | None] = world.gather(error)
        rank, first = next((rank, each) for rank, each in enumerate(errors) if each is not None)
        if len({str(each) for each in errors}) > 1:
            first.args = (f"rank {rank}: {first}", *first.args[1:])
        error = first
    if error is not None:
        raise error
    return results[0]


def differing(world: World, facts: dict[str, Any]) -> dict[str, list[Any]]:
    """Return the facts that are not equal on all ranks, with the value of each rank.

    All ranks must call this. They exchange one digest, and the facts themselves only where digests differ.

    Args:
        facts: plain data by name.
    """
    if world.size == 1:
        return {}
    text = json.dumps(facts, sort_keys=True, default=str)
    if world.equal(hashlib.sha256(text.encode(errors="surrogatepass")).digest()):
        return {}
    every = world.gather(facts)
    values = {name: [each.get(name) for each in every] for name in sorted(set().union(*every))}
    return {name: each for name, each in values.items() if any(value != each[0] for value in each)}


def told(name: str, values: list[Any]) -> str:
    """Say how the first rank with another value differs from rank 0: `seed=0 on rank 0, seed=1 on rank 1`."""
    other = next(rank for rank, value in enumerate(values) if value != values[0])
    return f"{name}={values[0]} on rank 0, {name}={values[other]} on rank {other}"
