"""What `deepvit-bench` can be told."""

from __future__ import annotations

from dataclasses import dataclass, fields

from deepvit_train.config.alias import current
from deepvit_train.config.model import AttentionConfig, AttentionKind, ModelConfig, check_architecture
from deepvit_train.config.option import Section, option
from deepvit_train.config.preset import attention_preset, choices
from deepvit_train.config.recipe import Device, Precision
from deepvit_train.error import ConfigError, nearest

FORMULA = "_formula"


@dataclass(kw_only=True, slots=True)
class BenchConfig(Section):
    """Everything that `deepvit-bench` can be told."""

    model: ModelConfig
    attn: AttentionConfig
    contenders: list[str] = option(
        "what is measured, all in one run; the first is what the others are compared with: timm (its ViT), "
        "vit_pytorch (its DeepViT), configured (attn.* as given), or the name of an attn=; a name of "
        "re-attention followed by _formula: written as the formula reads, all maps kept"
    )
    classes: int = option("width of the classifier", low=1)
    batch_size: int = option("images a step", low=1)
    repeats: int = option("rounds in which every contender has its turn; medians are over these", low=1)
    vary: str | None = option("a key of model.* that takes whole numbers, to measure at several `values`")
    values: list[int] = option("what `vary` is set to, one after the other", low=1)
    precision: Precision = option("autocast type; softmax, norms and weights stay fp32")
    device: Device = option("where to measure; auto: CUDA if there is any")
    threads: int | None = option("CPU threads of torch; null: torch's choice", low=1, high=4096)
    compile: bool = option("compile every contender with torch.compile")
    out: str | None = option("JSON file to write besides the table; null: none")
    plot: str | None = option("figure to write when `vary` is given, .png or .svg; null: none")

    def check(self) -> None:
        check_architecture(self.model, self.attn)
        names = ["timm", "vit_pytorch", "configured", *choices("attn")]
        names += [f"{name}{FORMULA}" for name in names if name in mixing_presets()]
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


def mixing_presets() -> list[str]:
    """The names of attn= whose blocks go through the re-attention operator."""
    kinds = (AttentionKind.reattention, AttentionKind.reattention_vit_pytorch)
    return [name for name in choices("attn") if attention_preset(name).kind in kinds]
