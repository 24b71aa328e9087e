"""The model card of a pushed model: what it is, how it was trained, what it is worth, how to load it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scipy.stats import binomtest

from deepvit_train.commands.evaluate_result import readable
from deepvit_train.console import amount, first_of
from deepvit_train.error import CheckpointError
from deepvit_train.evaluation.loaded import LoadedModel
from deepvit_train.models.summary import count_parameters
from deepvit_train.reading import read_json_lines
from deepvit_train.run.checkpoint import read_state

METRICS = "metrics.jsonl"
CLASSES = 50  # that a card lists; model.json has all
# What a card says of attention collapse, in words.
COLLAPSE = {
    "collapse/token_similarity_last": "mean cosine between the tokens that leave the last block",
    "collapse/replaceable_ratio": "share of blocks that do as well with the maps of the block before",
    "collapse/similar_ratio": "share of blocks whose maps are like those of the block before",
    "collapse/similarity_pre_mix_raw": "cosine of softmax maps to the block before",
    "collapse/similarity_pre_mix_centred": "the same without the uniform part",
    "collapse/similarity_post_norm_raw": "cosine of the maps that read the values to the block before",
    "collapse/head_similarity_pre_mix": "cosine between the heads of a block",
    "collapse/feature_cosine_to_last": "cosine of features to the last block's",
}
# Keys of the configuration that are no part of a recipe: the model's own stand in the file.
PATHS = ("classes", "loss.class_weight")  # keys that may hold the path of a file
LEFT_OUT = ("model.", "attn.", "collapse.", "trainer.limit_batches")


def card(loaded: LoadedModel, report: dict[str, Any], name: str, on_hub: bool) -> str:
    """Return README.md of a repository, with the header that the hub reads.

    Args:
        report: the content of model.json.
        name: 'ORG/NAME' on the hub, else a folder.
    """
    folder = loaded.found.folder
    state = {} if folder is None else read_state(folder)
    parts = [
        _header(name, report),
        _what(loaded, report),
        _worth(loaded, report, state),
        _collapse(loaded, state),
        _recipe(state),
        _use(name, report, on_hub),
        _digests(report),
    ]
    return "\n".join(part for part in parts if part)


def interval(right: int, images: int) -> tuple[float, float]:
    """Return the 95 % Wilson interval of an accuracy."""
    found = binomtest(right, images).proportion_ci(0.95, method="wilson")
    return float(found.low), float(found.high)


def _header(name: str, report: dict[str, Any]) -> str:
    tags = ["image-classification", "timm", "deepvit"]
    lines = [*(f"- {tag}" for tag in tags), "library_name: timm", "pipeline_tag: image-classification"]
    return "\n".join(["---", "tags:", *lines, "---", f"# {_plain(name)}", ""])


def _what(loaded: LoadedModel, report: dict[str, Any]) -> str:
    shape, attn = loaded.architecture.model, loaded.architecture.attn
    mixing = f", from block {attn.first} on" if attn.kind != "self" and attn.first else ""
    names = [_plain(readable(each)) for each in report["classes"]]
    how = report["preprocessing"]
    return f"""\
A vision transformer that tells {amount(len(names), "class", "classes")} of images apart.

| | |
|---|---|
| attention | {attn.kind}{mixing} (norm: {attn.norm}) |
| shape | {amount(shape.depth, "block")}, width {shape.dim}, {amount(shape.heads, "head")}, patches of \
{shape.patch_size} pixels |
| parameters | {count_parameters(loaded.model):,} |
| images | {how["image_size"]} x {how["image_size"]} pixels, of {how["resized"]} on the shorter side \
({how["interpolation"]}) |
| mean, std | {how["mean"]}, {how["std"]} |

Classes, in order: {first_of(names, CLASSES)}
"""


def _worth(loaded: LoadedModel, report: dict[str, Any], state: dict[str, Any]) -> str:
    """Say the accuracy of the run's evaluation, if the checkpoint has one, and of the exported file."""
    data = loaded.description.data
    rows = []
    prefix, metrics = "val" if loaded.weights == "live" else "val_ema", state.get("metrics", {})
    top1, step = metrics.get(f"{prefix}/top1"), state.get("step")
    validation = {key: each for key, each in state.get("images", {}).items() if key != "train"}
    images = metrics.get("val/images") or next((each["images"] for each in validation.values()), None)
    if top1 is not None and images and state.get("evaluated_step") == step:
        rows.append((f"the run, at step {step}", float(top1), int(images)))
    chosen = []
    if rows and state.get("best", {}).get("step") == step:
        chosen = ["The run chose this step by these images, so its figure is a little too high.", ""]
    check = report["check"]
    rows.append((f"this export ({check['program_exported']})", check["top1_exported"], check["images"]))
    lines = [
        f"| {what} | {top1:.4f} | {low:.4f} to {high:.4f} | {count:,} |"
        for what, top1, count in rows
        for low, high in [interval(round(top1 * count), count)]
    ]
    return "\n".join(
        [
            "## Accuracy",
            f"On validation images of the data set (kind: {data or 'not known'}).",
            "",
            "| evaluation | top-1 | 95 % interval (Wilson) | images |",
            "|---|---|---|---|",
            *lines,
            "",
            *chosen,
        ]
    )


def _collapse(loaded: LoadedModel, state: dict[str, Any]) -> str:
    """Say the last measurement of collapse up to the checkpoint's step, if its run has one."""
    found: dict[str, Any] = {}
    if loaded.found.run is not None:
        for _, line in _lines(loaded.found.run / METRICS):
            if isinstance(line, dict) and _number(line.get("step")) and line["step"] <= state.get("step", 0):
                found |= {key: line[key] for key in COLLAPSE if _number(line.get(key))}
    if not found:
        return ""
    rows = [f"| {COLLAPSE[key]} | {found[key]:.3f} |" for key in COLLAPSE if key in found]
    return "\n".join(["## Attention maps and tokens", "| | |", "|---|---|", *rows, ""])


def _lines(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        yield from read_json_lines(file)
    except (OSError, CheckpointError):
        return  # a card without these figures is as true


def _number(value: Any) -> bool:
    return type(value) in (int, float)


def _recipe(state: dict[str, Any]) -> str:
    """List what the run was configured with, as its checkpoint says."""
    config = state.get("identity", {}).get("config", {})
    keys = [key for key in config if not key.startswith(LEFT_OUT)]
    if not keys:
        return ""
    lines = [f"{key}: {json.dumps(_without_folder(key, config[key]))}" for key in sorted(keys)]
    return "\n".join(
        [f"## Recipe\nTrained for {amount(state['step'], 'step')}.\n", "```yaml", *lines, "```", ""]
    )


def _without_folder(key: str, value: Any) -> Any:
    """Return a value; of a path its last part alone, because the folders are of somebody's machine."""
    return Path(value).name if key in PATHS and value is not None else value


def _use(name: str, report: dict[str, Any], on_hub: bool) -> str:
    here, timm = (f"hf:{name}", f"hf-hub:{name}") if on_hub else (name, f"local-dir:{name}")
    fetched, download = (" download=true", ", download=True") if on_hub else ("", "")
    ours = "" if report["format"] == "timm" else "import deepvit_train.models  # pip install deepvit-train\n"
    onnx = (
        ""
        if report["format"] != "onnx"
        else f"""
`{report["file"]}` needs ONNX Runtime alone; its metadata has the classes and the preprocessing.
"""
    )
    return f"""\
## Use
In timm:

```python
import timm
{ours}
model = timm.create_model("{timm}", pretrained=True).eval()
```

With this project (`pip install deepvit-train`):

    deepvit-eval checkpoint={here}{fetched} data=imagefolder data.root=FOLDER
    deepvit-predict images=FOLDER checkpoint={here}{fetched}

```python
import deepvit_train

model = deepvit_train.load_model("{here}"{download})
```
{onnx}"""


def _digests(report: dict[str, Any]) -> str:
    digests = report["digests"]
    return f"""\
## Digests
| | |
|---|---|
| {report["file"]} (SHA-256) | {digests["file"]} |
| checkpoint that it was made from (SHA-256) | {digests["checkpoint"]} |
| list of validation images | {digests["data"]} |
"""


def _plain(text: str) -> str:
    """Return text that stands in a table of Markdown as it is."""
    text = "".join(" " if letter < " " else letter for letter in text)
    return re.sub(r"([|<>\[\]`*_\\])", r"\\\1", text)
