"""Which sets `deepvit-eval suite=` evaluates a model on, one after the other."""

from __future__ import annotations

from dataclasses import dataclass

from deepvit_train.config.option import Choice, Section, option
from deepvit_train.error import ConfigError, DataError, nearest

# What an image can be corrupted by while it is read, in the order of a table.
CORRUPTIONS = (
    "gaussian_noise",
    "gaussian_blur",
    "elastic",
    "pixelate",
    "jpeg",
    "brightness",
    "darkness",
    "contrast",
    "saturation",
)
SEVERITIES = (1, 2, 3, 4, 5)


class SuiteName(Choice):
    imagenet = "imagenet"  # ImageNet's validation images, ReaL, V2, A, R, Sketch and C, by folder
    corruptions = "corruptions"  # the images of data, corrupted while they are read


@dataclass(kw_only=True, slots=True)
class SuiteConfig(Section):
    name: SuiteName | None = option("which suite; null: none, only the set that data says")
    val: str | None = option(
        "folder of ImageNet's validation images, for their own labels and for ReaL's; null: the set that "
        "data says, if its classes are ImageNet's",
        path=DataError,
    )
    v2: str | None = option("folder of ImageNet-V2, with class folders 0 to 999; null: none", path=DataError)
    a: str | None = option("folder of ImageNet-A; null: none", path=DataError)
    r: str | None = option("folder of ImageNet-R; null: none", path=DataError)
    sketch: str | None = option("folder of ImageNet-Sketch; null: none", path=DataError)
    c: str | None = option(
        "folder of ImageNet-C, with CORRUPTION/SEVERITY/CLASS in it, or noise/, blur/, weather/, digital/; "
        "null: none",
        path=DataError,
    )
    corruptions: list[str] = option(f"corruptions of suite=corruptions: {', '.join(CORRUPTIONS)}")
    severities: list[int] = option("severities of suite=corruptions", low=1, high=5)
    seed: int = option("seed of the draws of suite=corruptions", low=0, high=2**31 - 1)

    @classmethod
    def prefix(cls) -> str:
        return "suite."

    def check(self) -> None:
        for each in self.corruptions:
            if each not in CORRUPTIONS:
                raise ConfigError(
                    f"suite.corruptions: {each} is unknown{nearest(each, CORRUPTIONS)} "
                    f"(choices: {', '.join(CORRUPTIONS)})"
                )
        for name in ("corruptions", "severities"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ConfigError(f"suite.{name}={values}: needs one value or more, each once")

    @property
    def needs_data(self) -> bool:
        """Whether the suite reads the set that data says."""
        return self.name == SuiteName.corruptions

    def folders(self) -> dict[str, str | None]:
        """Return the folder of each set that has one of its own."""
        return {"v2": self.v2, "a": self.a, "r": self.r, "sketch": self.sketch, "c": self.c}
