"""Declare the keys of `deepvit-bench`."""

from __future__ import annotations

from dataclasses import dataclass, fields

from deepvit_train.config.alias import current
from deepvit_train.config.model import AttentionConfig, ModelConfig, check_architecture
from deepvit_train.config.option import Section, option
from deepvit_train.config.preset import attention_preset, choices
from deepvit_train.config.recipe import Compile, Device, Precision
from deepvit_train.error import ConfigError, OutputError, nearest

FORMULA = "_formula"


@dataclass(kw_only=True, slots=True)
class BenchConfig(Section):
    """Compare the time and memory that a training step takes with each form of attention."""

    model: ModelConfig
    attn: AttentionConfig
    contenders: list[str] = option(
        "models to measure; the others are compared with the first. A name is timm (its ViT), vit_pytorch "
        "(its DeepViT), configured (attn.* as given) or a choice of attn=. A form of re-attention with "
        "_formula after its name is computed as the formula reads, which keeps all maps in memory"
    )
    classes: int = option("classes that the model tells apart", low=1)
    batch_size: int = option("images in a step", low=1)
    repeats: int = option("times that every model is measured, in turn; the medians are printed", low=1)
    vary: str | None = option(
        "key of model.* that is set to each of `values` in turn, such as model.depth; null: none"
    )
    values: list[int] = option("whole numbers that `vary` is set to", low=1)
    precision: Precision = option(
        "number format of matrix products (autocast); softmax, norms and weights stay fp32"
    )
    device: Device = option("where to measure; auto: on CUDA if there is any")
    threads: int | None = option("CPU threads; null: as torch chooses", low=1, high=4096)
    compile: Compile = option("how torch.compile compiles every contender; true: default, false: none")
    out: str | None = option("JSON file that the results are written to; null: none", path=OutputError)
    plot: str | None = option(
        "figure of cost over `values` that is written, .png or .svg; null: none", path=OutputError
    )

    def check(self) -> None:
        check_architecture(self.model, self.attn)
        names = ["timm", "vit_pytorch", "configured", *choices("attn")]
        names += [f"{name}{FORMULA}" for name in choices("attn") if attention_preset(name).kind != "self"]
        if not self.contenders:
            raise ConfigError("contenders=[]: name at least one")
        for name in self.contenders:
            form = name.removesuffix(FORMULA)
            if current("attn", form) + name.removeprefix(form) not in names:
                raise ConfigError(
                    f"contenders: {name!r} is unknown{nearest(name, names)} (choices: {', '.join(names)})"
                )
        numbers = [f"model.{key.name}" for key in fields(ModelConfig) if "int" in str(key.type)]
        if self.vary is not None and self.vary not in numbers:
            raise ConfigError(
                f"vary={self.vary}: not a whole number of the model{nearest(self.vary, numbers)} "
                f"(choices: {', '.join(numbers)})"
            )
        if bool(self.values) != (self.vary is not None):
            raise ConfigError("vary and values go together: vary=model.depth values=[4,8,16]")
        if self.plot is not None and not (self.vary and self.plot.endswith((".png", ".svg"))):
            raise ConfigError(f"plot={self.plot}: needs vary and values, and a name ending in .png or .svg")
