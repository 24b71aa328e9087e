"""Whole commands: their typed configuration, composed from configs/*.yaml and the command line by Hydra."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from typing import Any, cast, get_args, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from deepvit_train.error import ConfigError, nearest
from deepvit_train.schema.bench import BenchConfig
from deepvit_train.schema.collapse import CollapseConfig
from deepvit_train.schema.data import AugmentConfig, DataConfig
from deepvit_train.schema.model import AttentionConfig, Interpolation, ModelConfig, Pool, check_architecture
from deepvit_train.schema.option import Choice, Section, option
from deepvit_train.schema.preset import choices, config_dir
from deepvit_train.schema.recipe import (
    Device,
    LossConfig,
    OptimConfig,
    Precision,
    ScheduleConfig,
    TrainerConfig,
)
from deepvit_train.schema.study import StudyConfig


class Weights(Choice):
    auto = "auto"  # the averaged weights where there are any
    live = "live"
    ema = "ema"


@dataclass(kw_only=True, slots=True)
class TrainConfig(Section):
    """Everything that `deepvit-train` can be told."""

    model: ModelConfig
    attn: AttentionConfig
    data: DataConfig
    augment: AugmentConfig
    optim: OptimConfig
    schedule: ScheduleConfig
    loss: LossConfig
    trainer: TrainerConfig
    collapse: CollapseConfig
    seed: int = option("seed of weights, order, augmentation and dropout", low=0, high=2**31 - 1)
    name: str = option("name of the run")
    run_dir: str = option("folder of the run; the same folder again continues it")
    resume: str = option(
        "auto: continue run_dir if it was begun; never; or a run or checkpoint to start from"
    )

    def check(self) -> None:
        check_architecture(self.model, self.attn)
        if self.optim.freeze_blocks > self.model.depth:
            raise ConfigError(
                f"optim.freeze_blocks={self.optim.freeze_blocks} is more than "
                f"model.depth={self.model.depth}; nearest: optim.freeze_blocks={self.model.depth}"
            )
        if self.loss.cosine_weight and self.model.depth < 2:
            raise ConfigError("loss.cosine_weight compares blocks, and model.depth=1; nearest: model.depth=2")
        if self.data.name is None:
            raise ConfigError(f"data.name is not given; choices: data={', data='.join(choices('data'))}")
        if self.schedule.warmup_epochs >= self.trainer.epochs and self.schedule.warmup_epochs:
            raise ConfigError(
                f"schedule.warmup_epochs={self.schedule.warmup_epochs:g} leaves nothing of "
                f"trainer.epochs={self.trainer.epochs}; nearest: "
                f"schedule.warmup_epochs={self.trainer.epochs - 1}"
            )
        for name in ("name", "run_dir"):
            value = getattr(self, name)
            if not value.strip() or "=" in value or any(ord(letter) < 32 for letter in value):
                raise ConfigError(f"{name}={value!r}: must not be empty, nor hold '=' or control characters")
        if "/" in self.name:
            raise ConfigError(f"name={self.name!r}: must not hold '/'; use run_dir= for a folder elsewhere")


@dataclass(kw_only=True, slots=True)
class ForeignKeys(Section):
    """What the tensors of a weights file of other code do not show; files of our own say it themselves."""

    preset: str | None = option("model preset that a foreign weights file follows; null: none")
    heads: int | None = option(
        "attention heads of a foreign weights file; null: its Theta or preset says", low=1
    )
    transform_scale: bool | None = option("attn.transform_scale of a foreign weights file; null: as preset")
    residual_scale: float | None = option(
        "model.residual_scale of a foreign weights file; null: as preset", above=0, high=100
    )
    pool: Pool | None = option("model.pool of a foreign weights file; null: as preset, else cls")
    mean: list[float] | None = option("model.mean for a foreign weights file; null: as preset, else 0.5")
    std: list[float] | None = option("model.std for a foreign weights file; null: as preset, else 0.5")
    crop_pct: float | None = option(
        "model.crop_pct for a foreign weights file; null: as preset, else 0.9", above=0, high=1
    )
    interpolation: Interpolation | None = option(
        "model.interpolation for a foreign weights file; null: as preset, else bicubic"
    )

    def said(self) -> dict[str, Any]:
        """What is given, besides the preset."""
        names = {key.name for key in fields(ForeignKeys)} - {"preset"}
        return {name: value for name in sorted(names) if (value := getattr(self, name)) is not None}

    def check(self) -> None:
        known = choices("model")
        if self.preset is not None and self.preset not in known:
            raise ConfigError(
                f"preset={self.preset}: unknown{nearest(self.preset, known)} (choices: {', '.join(known)})"
            )


@dataclass(kw_only=True, slots=True)
class EvalConfig(ForeignKeys):
    """Everything that `deepvit-eval` can be told."""

    checkpoint: str = option(
        "a run folder (its best checkpoint, else its newest), a checkpoint folder, or a weights file"
    )
    data: DataConfig
    weights: Weights = option("which weights to evaluate; auto: the averaged ones where there are any")
    batch_size: int = option("images a batch and rank", low=1)
    precision: Precision = option("autocast type; softmax, norms and weights stay fp32")
    device: Device = option("where to evaluate; auto: CUDA if there is any")
    threads: int | None = option("CPU threads of torch; null: torch's choice", low=1, high=4096)
    timeout_s: float = option("seconds that a rank waits for the others before it gives up", above=0)
    limit_batches: int | None = option("batches to evaluate, for trials; null: all", low=1)


@dataclass(kw_only=True, slots=True)
class ConvertConfig(ForeignKeys):
    """Everything that `deepvit-convert` can be told."""

    source: str = option("weights file of any known layout, or a checkpoint or run of this project")
    out: str = option("new folder that model.safetensors is written into")
    weights: Weights = option("which weights to take; auto: the averaged ones where there are any")


@dataclass(kw_only=True, slots=True)
class DataCheckConfig(Section):
    """Everything that `deepvit-data check` can be told."""

    root: str = option("folder that holds the split folders")
    data: DataConfig
    model: ModelConfig
    attn: AttentionConfig
    augment: AugmentConfig
    timing: bool = option("whether to measure where a training step's time goes")
    batch_size: int | None = option(
        "images a timed forward pass; null: 64 on CUDA, 4 on the CPU", low=1, high=65536
    )
    precision: Precision = option("autocast type of the timed step")
    device: Device = option("where the timed step runs; auto: CUDA if there is any")
    threads: int | None = option("CPU threads of torch; null: torch's choice", low=1, high=4096)

    def check(self) -> None:
        check_architecture(self.model, self.attn)


@dataclass(kw_only=True, slots=True)
class AnalyzeConfig(ForeignKeys):
    """Everything that `deepvit-analyze` can be told."""

    checkpoint: str | None = option("as in deepvit-eval; with model=timm:NAME that model's weights file")
    model: str | None = option("timm:NAME for any of timm's vision transformers; null: what checkpoint says")
    compare: str | None = option("a second checkpoint, or timm:NAME untrained, to put beside the first")
    out: str | None = option("folder for analysis.json, figures/ and report.html; null: RUN/analysis")
    data: DataConfig
    collapse: CollapseConfig
    weights: Weights = option("which weights to analyse; auto: the averaged ones where there are any")
    accuracy: bool = option("also evaluate on the whole split, with calibrated and with running statistics")
    report: bool = option("also draw figures and write report.html")
    batch_size: int = option("images whose maps are held at a time", low=1)
    eval_batch_size: int = option("images a batch when accuracy is evaluated", low=1)
    device: Device = option("where to run; auto: CUDA if there is any")
    threads: int | None = option("CPU threads of torch; null: torch's choice", low=1, high=4096)

    def check(self) -> None:
        ForeignKeys.check(self)
        if self.model is not None and not self.model.startswith("timm:"):
            raise ConfigError(
                f"model={self.model}: not of the form timm:NAME; nearest: model=timm:{self.model}"
            )
        if self.checkpoint is None and self.model is None:
            raise ConfigError("checkpoint is not given: add checkpoint=RUN, or model=timm:NAME")
        if self.model is not None and self.data.name is None:
            raise ConfigError(
                f"data is not given: model={self.model} needs data=imagefolder data.root=FOLDER"
            )
        if self.model is not None and self.checkpoint is None and self.out is None:
            raise ConfigError(f"out is not given: model={self.model} without a checkpoint needs out=FOLDER")


@dataclass(kw_only=True, slots=True)
class DataDemoConfig(Section):
    """Everything that `deepvit-data demo` can be told."""

    out: str = option("new folder to write train/ and val/ into")


@dataclass(kw_only=True, slots=True)
class DataFashionMnistConfig(Section):
    """Everything that `deepvit-data fashion-mnist` can be told."""

    out: str = option("new folder to write train/ and val/ into")
    source: str | None = option(
        "folder of the four idx files, gzipped or not; null: the Debian package dataset-fashion-mnist"
    )


COMMANDS: dict[str, type[Section]] = {
    "train": TrainConfig,
    "eval": EvalConfig,
    "convert": ConvertConfig,
    "bench": BenchConfig,
    "data-check": DataCheckConfig,
    "analyze": AnalyzeConfig,
    "study": StudyConfig,
    "data-demo": DataDemoConfig,
    "data-fashion-mnist": DataFashionMnistConfig,
}


def console_name(command: str) -> str:
    """A command as it is typed: `deepvit-data demo` for data-demo."""
    return f"deepvit-{command.replace('-', ' ', 1)}"


def compose_command(command: str, overrides: Sequence[str]) -> Any:
    """The checked configuration of a command, as dataclasses.

    Raises ConfigError naming the key, the value and the nearest valid one.
    """
    composed = compose_tree(command, overrides)
    missing = sorted(str(key) for key in OmegaConf.missing_keys(composed))
    if missing:
        raise ConfigError(f"{missing[0]} is not given: add {missing[0]}=VALUE")
    try:
        return OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise _explained(command, overrides, error) from None


def compose_tree(command: str, overrides: Sequence[str]) -> DictConfig:
    """The configuration as Hydra composes it, typed but not yet checked. Raises ConfigError."""
    _check_overrides(command, overrides)
    store = ConfigStore.instance()
    for name, schema in COMMANDS.items():
        store.store(name=f"{name}_schema", node=schema)
    texts = _texts_named_as_groups(command, overrides)
    try:
        with initialize_config_dir(config_dir=str(config_dir()), version_base="1.3"):
            tree = compose(command, overrides=[each for each in overrides if each not in texts])
        for name, value in (text.split("=", 1) for text in texts):
            OmegaConf.update(tree, name, None if value == "null" else value)
        OmegaConf.resolve(tree)
        return tree
    except (HydraException, OmegaConfBaseException) as error:
        raise _explained(command, overrides, error) from None


def _texts_named_as_groups(command: str, overrides: Sequence[str]) -> list[str]:
    """Overrides such as deepvit-analyze's model=timm:NAME, which Hydra takes for one of configs/model."""
    keys = {key.name for key in keys_of(COMMANDS[command])}
    folders = {folder.name for folder in config_dir().iterdir() if folder.is_dir()} - set(groups_of(command))
    return [each for each in overrides if (name := each.partition("=")[0]) in keys and name in folders]


def as_yaml(tree: Any) -> str:
    """A composed or checked configuration as YAML text."""
    config = tree if isinstance(tree, DictConfig) else OmegaConf.create(plain(tree))
    return OmegaConf.to_yaml(config)


def plain(value: Any) -> Any:
    """A configuration as nested dicts, lists and scalars."""
    if is_dataclass(value):
        return {key.name: plain(getattr(value, key.name)) for key in fields(value)}
    return value.value if isinstance(value, Enum) else value


def flat_values(tree: DictConfig, prefix: str = "") -> dict[str, Any]:
    """A composed configuration's values by dotted key, without those that must be given."""
    flat: dict[str, Any] = {}
    for name in tree:
        if OmegaConf.is_missing(tree, name):
            continue
        value, key = tree[name], f"{prefix}{name}"
        if isinstance(value, DictConfig):
            flat |= flat_values(value, f"{key}.")
        else:
            flat[key] = "null" if value is None else value
    return flat


@dataclass(frozen=True)
class Key:
    """One configuration key, for help and suggestions."""

    name: str
    type: str
    help: str


def keys_of(section: type[Any], prefix: str = "") -> Iterator[Key]:
    """Every key of a command's schema, in order, with dotted names."""
    hints = get_type_hints(section)
    for key in fields(section):
        hint = hints[key.name]
        if is_dataclass(hint):
            yield from keys_of(cast(type, hint), f"{prefix}{key.name}.")
        else:
            yield Key(f"{prefix}{key.name}", _type_name(hint), key.metadata["help"])


def groups_of(command: str) -> dict[str, list[str]]:
    """The configuration groups of a command and their choices."""
    text = (config_dir() / f"{command}.yaml").read_text()
    named = re.findall(r"^  - (?:optional )?(\w+):", text, flags=re.MULTILINE)
    return {group: choices(group) for group in named}


def _type_name(hint: Any) -> str:
    if get_args(hint) and type(None) in get_args(hint):
        return f"{_type_name(next(part for part in get_args(hint) if part is not type(None)))} or null"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return "|".join(hint.__members__)
    return str(hint) if get_args(hint) else hint.__name__


def _check_overrides(command: str, overrides: Sequence[str]) -> None:
    """Raise ConfigError for an override that names no key or choice, with the nearest that exists."""
    groups, keys = groups_of(command), [key.name for key in keys_of(COMMANDS[command])]
    sections = {name.rsplit(".", 1)[0] for name in keys if "." in name}
    for override in overrides:
        name, equals, value = override.lstrip("+~").partition("=")
        if not equals and not override.startswith("~"):
            raise ConfigError(f"{override}: not of the form key=value")
        if name in groups and value not in groups[name] and (name, value) != ("experiment", "null"):
            known = groups[name]
            raise ConfigError(f"{name}={value}: unknown{nearest(value, known)} (choices: {', '.join(known)})")
        if name not in {*keys, *groups, *sections}:
            tails = {key.rsplit(".", 1)[-1]: key for key in reversed([*keys, *groups])}
            guess = nearest(name, [*keys, *groups])
            if not guess and (tail := difflib.get_close_matches(name.rsplit(".", 1)[-1], tails, n=1)):
                guess = f"; did you mean '{tails[tail[0]]}'?"
            raise ConfigError(f"{name}: no such key{guess} ({console_name(command)} --help lists all)")


def _explained(command: str, overrides: Sequence[str], error: Exception) -> ConfigError:
    """Hydra's error in one line: the override it is about, and what that key takes."""
    if isinstance(error, OverrideParseException):
        return ConfigError(f"{error.override!r}: can't be read as key=value")
    cause = error.__cause__ or error
    types = {key.name: key.type for key in keys_of(COMMANDS[command])}
    name = getattr(error, "full_key", None) or getattr(cause, "full_key", None)
    if name not in types:
        return ConfigError(f"{' '.join(overrides)}: {str(cause).strip().splitlines()[0]}")
    given = next((override for override in overrides if override.lstrip("+").startswith(f"{name}=")), name)
    return ConfigError(
        f"{given}: must be {types[name]}{nearest(given.partition('=')[2], types[name].split('|'))}"
    )
