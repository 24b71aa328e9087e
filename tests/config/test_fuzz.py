"""Type overrides that nobody would type on purpose: each is harmless, or refused by name."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

import pytest
from omegaconf import OmegaConf

from deepvit_train.config.command import keys_of
from deepvit_train.config.compose import compose_command, flat_values, plain
from deepvit_train.config.train import TrainConfig
from deepvit_train.error import ConfigError, UserError
from tests.conftest import Command

VALUES = (
    "nan", "-nan", "inf", "-inf", "-1", "0", "1e400", "-1e30", "1e-400", str(10**30), "0x7f", "1_000", "1.5",
    "", "null", "true", "no", "''", '""', "[]", "[1,2", "[nan,inf]", "{}", "{a:b}", "{a:", "a=b", "a,b", ",",
    "${oc.env:HOME}", "${seed}", "${nowhere}", "${", "$(touch SENTINEL)", "`id`", "; rm -rf x", "../../etc",
    "/dev/null", "\x00", "\x1b[31m", "\n", " ", "\t", "é", "\U0001f701", "a" * 5000, "???", "_target_",
    "choice(1,2)", "range(1,3)", "glob(*)", "int(3)", "sweep", "\\", "'", '"', "@", "%", "#", "~", "None",
)  # fmt: skip


def hostile(count: int, seed: int) -> Iterator[str]:
    rng = random.Random(seed)
    keys = [key.name for key in keys_of(TrainConfig)] + [
        "attn",
        "model",
        "data",
        "experiment",
        "hydra.run.dir",
    ]
    for _ in range(count):
        key = rng.choice(keys)
        if rng.random() < 0.2:  # a slip of the hand
            place = rng.randrange(len(key))
            key = key[:place] + rng.choice(["", "x", ".", "=", " "]) + key[place + 1 :]
        prefix = rng.choice(["", "", "", "+", "++", "~"])
        yield f"{prefix}{key}={rng.choice(VALUES)}"


def check(override: str) -> bool:
    """Compose; whether it was refused, in one or two lines. What is taken has finite numbers only."""
    told, config = None, None
    try:
        config = compose_command("train", [override])
    except UserError as error:  # of another kind for a path that no system could follow
        told = str(error)
    if told is not None:
        assert 1 <= len(told.splitlines()) <= 2, override
        name = override.lstrip("+~").split("=")[0]
        assert name.split(".")[-1] in told or name.split(".")[0] in told, (override, told)
        return True
    for value in flat_values(OmegaConf.create(plain(config))).values():
        for number in value if isinstance(value, list) else [value]:
            assert not isinstance(number, float) or math.isfinite(number), override
            assert not isinstance(number, int) or abs(number) <= 2**31, override
    return False


def test_fuzzed_overrides() -> None:
    refused = sum(check(override) for override in hostile(50, seed=1))
    assert refused > 30


@pytest.mark.slow
def test_a_thousand_fuzzed_overrides() -> None:
    refused = sum(check(override) for override in hostile(1000, seed=2))
    assert refused > 700


@pytest.mark.slow
def test_sixty_fuzzed_overrides_through_the_real_command(command: Command) -> None:
    refused = 0
    for override in hostile(200, seed=3):
        if "\x00" in override:
            continue  # no process can be given one
        try:
            compose_command("train", [override])
        except ConfigError:
            refused += 1
        except UserError:
            continue  # a path, whose exit code is that of what it is for
        else:
            continue  # it would train
        result = command("train", override)
        assert result.returncode == 2, (override, result.stderr)
        assert "Traceback" not in result.stderr, override
        if refused == 60:
            return
    raise AssertionError(f"only {refused} overrides were refused")
