"""Which weights of a file are taken, and what a file of another project does not say."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from deepvit_train.config.model import Act, Interpolation, Pool
from deepvit_train.config.option import Choice, Section, option
from deepvit_train.config.preset import choices
from deepvit_train.error import ConfigError, DataError, nearest

CLASSES = (
    "text file with the class names of the outputs, in order, one a line; or torchvision or timm, for that "
    "program's order of the folders; null: as the weights file says, else the order of the program it is from"
)


class Weights(Choice):
    auto = "auto"  # the averaged weights where there are any
    live = "live"
    ema = "ema"


@dataclass(kw_only=True, slots=True)
class ForeignKeys(Section):
    """What the tensors of another project's weights file do not show. Files of this project say it."""

    preset: str | None = option(
        "name in model= of the preset that the file follows, or timm:NAME for a model of timm; null: none"
    )
    heads: int | None = option("attention heads; null: as its Theta or preset says", low=1)
    transform_scale: bool | None = option("value for attn.transform_scale; null: as preset says")
    residual_scale: float | None = option(
        "value for model.residual_scale; null: as preset says", above=0, high=100
    )
    act: Act | None = option("value for model.act; null: as preset says, else gelu")
    pool: Pool | None = option("value for model.pool; null: as preset says, else cls")
    mean: list[float] | None = option("value for model.mean; null: as preset says, else 0.5")
    std: list[float] | None = option("value for model.std; null: as preset says, else 0.5")
    crop_pct: float | None = option(
        "value for model.crop_pct; null: as preset says, else 0.9", above=0, high=1
    )
    interpolation: Interpolation | None = option(
        "value for model.interpolation; null: as preset says, else bicubic"
    )
    classes: str | None = option(CLASSES, path=DataError)
    download: bool = option("whether hf:ORG/NAME is fetched where it is not in the hub's cache")

    def said(self) -> dict[str, Any]:
        """What is given, besides the preset."""
        names = {key.name for key in fields(ForeignKeys)} - {"preset", "download"}
        return {name: value for name in sorted(names) if (value := getattr(self, name)) is not None}

    def check(self) -> None:
        known = choices("model")
        # timm's names are looked up later: that takes seconds.
        if self.preset is not None and not self.preset.startswith("timm:") and self.preset not in known:
            raise ConfigError(
                f"preset={self.preset}: unknown{nearest(self.preset, known)} "
                f"(choices: {', '.join(known)}, timm:NAME)"
            )
