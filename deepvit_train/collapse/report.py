"""Write the report of an analysis: one HTML file that needs no other file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deepvit_train.collapse import depth
from deepvit_train.collapse.evidence import read_findings, told_forecast
from deepvit_train.collapse.gallery import by_block, mixes
from deepvit_train.config.collapse import CollapseConfig, Maps, Metric
from deepvit_train.console import amount
from deepvit_train.report.page import inline, natural_width, render

LEAST = 0.8  # of its own width that a figure is shown with, where the page has room: its labels stay readable
# The sections in reading order: name of the figure, heading, and what the figure shows.
SECTIONS = [
    (
        "contribution",
        "Does the attention of each block matter?",
        "Branch share is the length of what attention adds to a token, over the token's own. The other two "
        "say how much the loss on these images rises when a block uses the softmax maps of the block "
        "before, and when it is left out. A block whose loss does not rise in the second figure has maps "
        "that do nothing of their own.",
    ),
    (
        "prune",
        "How many blocks can be left out?",
        "The blocks that are missed least go first, and nothing is trained again. Re-attention's BatchNorm "
        "is calibrated after each cut.",
    ),
    (
        "similarity",
        "Do maps repeat from block to block?",
        "All softmax maps share the uniform part 1/N, so small logits alone make them look alike. Compare "
        "with the untrained model, and with the centred cosine, which leaves that part out. Where the "
        "deviation is near 0, maps are nearly uniform, and a centred cosine says little.",
    ),
    ("matrix", "Which blocks are alike?", "Each cell compares two blocks."),
    (
        "similar_blocks",
        "How many blocks are similar?",
        "The bars show the ratio under each definition. Post-norm maps are those that multiply the values.",
    ),
    (
        "head_similarity",
        "Do the heads of a block differ?",
        "Re-attention builds new maps by mixing heads, so it needs heads that differ.",
    ),
    (
        "features",
        "Do features stop changing?",
        "Where the cosine to the last block's features nears 1, later blocks change little. Where the cosine "
        "between tokens nears 1, the tokens of an image have become alike (over-smoothing).",
    ),
    (
        "depth",
        "Where do features stop getting better?",
        "Images are classified by the features that leave each block: by their nearest neighbours among "
        "training images, and by a linear classifier that is fitted to those. Where a curve stays flat, the "
        "blocks after add nothing that tells classes apart.",
    ),
    (
        "maps",
        "How wide is the attention?",
        "Entropy is log N for a uniform map. Distance says how far a patch looks, in patches.",
    ),
    (
        "class_attention",
        "What does the class token look at?",
        "Bright patches have a large weight in the class token's attention. Above each image stand its class "
        "and the class that the model takes it for, with its probability.",
    ),
    ("attention_maps", "What do the maps look like?", "Rows are queries, columns are keys."),
    (
        "mixed_maps",
        "What do the maps look like after mixing?",
        "These maps multiply the values: heads are mixed, and normalised. Rows are queries, columns "
        "are keys.",
    ),
    ("theta", "How are heads mixed?", "Each matrix is the Theta of a block that mixes its heads."),
]


def write_html(analysis: dict[str, Any], drawn: list[dict[str, Path]], config: CollapseConfig) -> str:
    """Return the report as HTML.

    Args:
        analysis: the content of analysis.json.
        drawn: for each of its models the files of the figures, by name.
        config: how collapse was measured.
    """
    sections = [
        {
            "name": name,
            "title": title,
            "text": text,
            "figures": [
                {
                    "label": model["label"],
                    "image": inline(figures[name], f"{title} {model['label']}"),
                    "width": round(LEAST * natural_width(figures[name])),
                }
                for model, figures in zip(analysis["models"], drawn, strict=True)
                if name in figures
            ],
        }
        for name, title, text in SECTIONS
        if any(name in figures for figures in drawn)
    ]
    conclusions = [conclude(model, analysis["data"], config) for model in analysis["models"]]
    findings = [find(model, config) for model in analysis["models"]]
    return render(
        "deepvit_train.collapse",
        "report.html.j2",
        analysis=analysis,
        conclusions=conclusions,
        findings=findings,
        sections=sections,
        definition=config.legend,
    )


def conclude(model: dict[str, Any], data: dict[str, Any], config: CollapseConfig) -> str:
    """Say how good a model is, how alike its tokens are, and in how many blocks the maps matter."""
    trained, untrained = _alike(model)
    lines = [
        _accuracy(model, data),
        f"The tokens that leave the last block have a mean cosine of {trained:.3f} to each other, untrained "
        f"{untrained:.3f}. {told_forecast(read_findings())}",
    ]
    if "map_swap" in model["trained"]["averages"]:
        found = [by_block(model[state], "map_swap").values() for state in ("trained", "untrained")]
        matter, before = (sum(rise >= config.swap_rise for rise in rises) for rises in found)
        lines.append(
            f"{_collapsed(len(found[0]) - matter, len(found[0]))} "
            f"The attention maps of {matter} of the {len(found[0])} blocks after the first matter, untrained "
            f"those of {before}: the loss rises by {config.swap_rise:g} or more when a block uses the maps "
            "of the block before."
            if found[0]
            else "There is one block, so no block before it whose maps it could use."
        )
    else:
        name = f"{config.maps}/{config.metric}/{config.axis}"
        counts = [model[state]["similar_blocks"][name]["count"] for state in ("trained", "untrained")]
        after_first = len(model["trained"]["averages"]["features"]) - 1
        lines.append(
            f"{counts[0]} of the {after_first} blocks after the first are similar to those before them, "
            f"{counts[1]} untrained."
        )
    return " ".join(lines)


def _alike(model: dict[str, Any]) -> list[float]:
    """Return the mean cosine of the last block's tokens, trained and untrained."""
    cosines = [by_block(model[state], "tokens") for state in ("trained", "untrained")]
    return [found[max(found)] for found in cosines]


def _collapsed(replaceable: int, blocks: int) -> str:
    """Say whether maps have collapsed: how many blocks do as well with those of the block before."""
    if not replaceable:
        return "These maps have not collapsed: no block is replaceable."
    if replaceable == blocks:
        return "These maps have collapsed: every block after the first is replaceable."
    return f"These maps have collapsed in part: {amount(replaceable, 'block is', 'blocks are')} replaceable."


def _accuracy(model: dict[str, Any], data: dict[str, Any]) -> str:
    """Say the accuracy that was measured for this report, or else the one that the checkpoint knows."""
    if model["accuracy"]:
        return f"Top-1 is {model['accuracy']['calibrated']['top1']:.4f} on {data['split']} of {data['name']}."
    known = model["evaluated"]
    if known is None:
        return "Its accuracy is not known (accuracy=true measures it)."
    partial = "" if known["images"] is None else f", on {known['images']:.0f} of {known['of']:.0f} images"
    return f"Top-1 was {known['top1']:.4f} on its own validation images at step {known['step']}{partial}."


def find(model: dict[str, Any], config: CollapseConfig) -> list[str]:
    """Say in sentences what an analysis found about one model, compared with the same model untrained."""
    blocks = len(model["trained"]["averages"]["features"])
    name = f"{config.maps}/{config.metric}/{config.axis}"
    trained, untrained = (model[state]["similar_blocks"][name] for state in ("trained", "untrained"))
    lines = [
        *_contribution(model, config),
        f"{trained['count']} of the {blocks - 1} blocks after the first are similar to those before them "
        f"({config.legend}); in the same model untrained it is {untrained['count']}.",
        _from_which(trained["blocks"], blocks),
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
            "The untrained model has as many similar blocks or more, so this number does not show collapse "
            "caused by training; see the centred cosine."
        )
    lines.append(_features(model))
    lines += depth.describe(model["depth"]) if model.get("depth") else []
    if model["accuracy"]:
        calibrated, running = (model["accuracy"][key]["top1"] for key in ("calibrated", "running"))
        lines.append(f"Top-1 is {calibrated:.4f} with calibrated and {running:.4f} with running statistics.")
    return [line for line in lines if line]


def _contribution(model: dict[str, Any], config: CollapseConfig) -> list[str]:
    """Say which blocks' maps do not matter, and where attention adds least."""
    lines, limit = [], config.swap_rise
    shares = by_block(model["trained"], "branch_share")
    if "map_swap" in model["trained"]["averages"]:
        found = {
            state: [block for block, rise in by_block(model[state], "map_swap").items() if rise < limit]
            for state in ("trained", "untrained")
        }
        listed = f": blocks {', '.join(map(str, found['trained']))}" if found["trained"] else ""
        lines.append(
            f"{len(found['trained'])} of the {len(shares) - 1} blocks after the first are replaceable "
            f"({config.swap_legend}){listed}. In the same model untrained it is {len(found['untrained'])}."
        )
        removal = by_block(model["trained"], "removal")
        least = min(removal, key=lambda block: removal[block])
        lines.append(f"Block {least} is missed least: without it the loss changes by {removal[least]:+.4f}.")
    least, most = (choose(shares, key=lambda block: shares[block]) for choose in (min, max))
    lines.append(
        f"Attention adds least in block {least} ({shares[least]:.3f} of a token's length) and most in block "
        f"{most} ({shares[most]:.3f})."
    )
    return lines


def _from_which(blocks: list[int], depth: int) -> str:
    """Say from which block on all are similar, or else which blocks are."""
    start = depth
    while start - 1 in blocks:
        start -= 1
    if start < depth:
        return f"From block {start} on, every block is similar to those before it (blocks count from 0)."
    if not blocks:
        return "No block is similar."
    return f"These blocks are similar, counted from 0: {', '.join(map(str, blocks))}."


def _features(model: dict[str, Any]) -> str:
    to_last = by_block(model["trained"], "features")
    near = next(block for block, value in to_last.items() if value > 0.9)
    return f"Features reach a cosine of 0.9 to the last block's at block {near}."
