"""The report of an analysis: one HTML file that needs nothing else."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup  # jinja2's own type of text that is HTML already

from deepvit_train.collapse.gallery import by_block, mixes
from deepvit_train.config.collapse import CollapseConfig, Maps, Metric

# The sections in reading order: figure, heading, what to see in it.
SECTIONS = [
    (
        "similarity",
        "Do maps repeat from block to block?",
        "Softmax maps all share the uniform part 1/N, so small logits alone make them look alike: compare "
        "with the untrained model, and with the centred cosine, which leaves that part out.",
    ),
    ("matrix", "Which blocks are alike?", "Every block against every other."),
    (
        "similar_blocks",
        "How many blocks are similar?",
        "The same count under each definition; post-norm maps are those that read the values.",
    ),
    (
        "head_similarity",
        "Do the heads of a block differ?",
        "Re-attention rests on heads that differ: it builds new maps by mixing them.",
    ),
    (
        "features",
        "Do features stop changing?",
        "Cosine to the last block's features near 1 from some block on: later blocks change little. Cosine "
        "between tokens near 1: the tokens of an image have become alike (over-smoothing).",
    ),
    (
        "maps",
        "How wide is the attention?",
        "Entropy is log N for a uniform map; distance is how far a patch looks, in patches.",
    ),
    ("class_attention", "What does the class token look at?", "The weights over the patches of real images."),
    ("attention_maps", "What do the maps look like?", "Rows are queries, columns are keys."),
    ("theta", "How are heads mixed?", "Theta of each block that mixes."),
]


def write_html(analysis: dict[str, Any], drawn: list[dict[str, Path]], config: CollapseConfig) -> str:
    """The report of analysis.json's content. `drawn`: the figures' files of each of its models, by name."""
    environment = Environment(
        loader=PackageLoader("deepvit_train.collapse", "."), autoescape=True, undefined=StrictUndefined
    )
    sections = [
        {
            "name": name,
            "title": title,
            "text": text,
            "figures": [
                {"label": model["label"], "image": _inline(figures[name], f"{title} {model['label']}")}
                for model, figures in zip(analysis["models"], drawn, strict=True)
                if name in figures
            ],
        }
        for name, title, text in SECTIONS
        if any(name in figures for figures in drawn)
    ]
    findings = [find(model, config) for model in analysis["models"]]
    template = environment.get_template("report.html.j2")
    return template.render(analysis=analysis, findings=findings, sections=sections, definition=config.legend)


def find(model: dict[str, Any], config: CollapseConfig) -> list[str]:
    """What an analysis says about one model, in sentences: what, from which block on, compared with what."""
    depth = len(model["trained"]["averages"]["features"])
    name = f"{config.maps}/{config.metric}/{config.axis}"
    trained, untrained = (model[state]["similar_blocks"][name] for state in ("trained", "untrained"))
    lines = [
        f"{trained['count']} of {depth} blocks are similar to those before them ({config.legend}); in the "
        f"same model untrained it is {untrained['count']}.",
        _from_which(trained["blocks"], depth),
    ]
    for maps in Maps if mixes(model) else [Maps.pre_mix]:
        for metric in Metric:
            name = f"{maps}/{metric}/{config.axis}"
            pair = [model[state]["similar_blocks"][name]["to_previous"] for state in ("trained", "untrained")]
            if None not in pair:
                lines.append(
                    f"Mean {metric} {config.axis} cosine of {maps.label} maps to the block "
                    f"before: {pair[0]:.3f}, untrained {pair[1]:.3f}."
                )
    if untrained["count"] >= trained["count"] and untrained["count"]:
        lines.append(
            "The untrained model counts as many similar blocks or more, so this count does not show collapse "
            "caused by training; see the centred cosine."
        )
    lines.append(_features(model))
    if model["accuracy"]:
        calibrated, running = (model["accuracy"][key]["top1"] for key in ("calibrated", "running"))
        lines.append(f"Top-1 {calibrated:.4f} with calibrated and {running:.4f} with running statistics.")
    return [line for line in lines if line]


def _from_which(blocks: list[int], depth: int) -> str:
    """From which block on all are similar."""
    start = depth
    while start - 1 in blocks:
        start -= 1
    if start < depth:
        return f"From block {start} on, every block is similar to those before it (blocks count from 0)."
    return f"Similar are blocks {', '.join(map(str, blocks))} (from 0)." if blocks else "No block is similar."


def _features(model: dict[str, Any]) -> str:
    to_last = by_block(model["trained"], "features")
    near = next(block for block, value in to_last.items() if value > 0.9)
    tokens = [by_block(model[state], "tokens")[len(to_last) - 1] for state in ("trained", "untrained")]
    return (
        f"Features reach a cosine of 0.9 to the last block's at block {near}; the tokens that leave the last "
        f"block have a mean cosine of {tokens[0]:.3f} to each other, untrained {tokens[1]:.3f}."
    )


def _inline(file: Path, description: str) -> Markup:
    """A figure's file as part of the page."""
    if file.suffix == ".png":
        encoded = base64.b64encode(file.read_bytes()).decode()
        return Markup('<img alt="{}" src="data:image/png;base64,{}">').format(description, encoded)
    text = file.read_text()
    label = Markup('<svg role="img" aria-label="{}" ').format(description)
    return label + Markup(text[text.index("<svg ") + len("<svg ") :])
