"""Make an exported folder one that the Hugging Face hub, timm and this project read, and push it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from deepvit_train.atomic import new_folder, write_text
from deepvit_train.commands.export_card import card
from deepvit_train.commands.export_timm import PRETRAINED
from deepvit_train.config.preset import Architecture, plain_from
from deepvit_train.console import console
from deepvit_train.error import ConfigError, OutputError
from deepvit_train.evaluation.loaded import LoadedModel
from deepvit_train.models.importer.infer import channels_of
from deepvit_train.run import hub
from deepvit_train.run.saving import save_tensors

# The preset that config.json names. Every size of it is replaced by model_args.
PRESET = "deepvit_16b"
# What timm calls keys of this project, where both have one.
TIMM_NAMES = {"image_size": "img_size", "dim": "embed_dim", "heads": "num_heads"}
README = "README.md"


def check_push(push: str, out: str) -> None:
    """Raise ConfigError or OutputError for what can't be pushed to, before minutes are spent on the model."""
    try:
        repository = hub.parse(push)
    except ValueError as error:
        raise ConfigError(f"push={push}: {error}") from None
    if repository is None:
        folder = Path(push).expanduser()
        if folder.resolve() == Path(out).expanduser().resolve():
            raise ConfigError(f"push={push}: is out= itself; nearest: push={push}-pushed")
        if (folder.exists() and not folder.is_dir()) or (folder.is_dir() and any(folder.iterdir())):
            raise OutputError(f"push={push}: holds something already; name a new folder")
        return
    if repository.revision is not None:
        raise ConfigError(f"push={push}: pushes go to the main branch; nearest: push=hf:{repository.name}")
    from huggingface_hub import get_token

    if get_token() is None:
        raise OutputError(f"push={push}: the hub wants a token that may write (hf auth login, or HF_TOKEN)")


def complete(folder: Path, loaded: LoadedModel, report: dict[str, Any], push: str) -> None:
    """Add what a repository needs: weights with config.json, if the folder has none, and the model card."""
    if not (folder / hub.WEIGHTS).exists():
        description = replace(loaded.description, calibrate_images=0)  # the statistics are inside
        save_tensors(loaded.model.state_dict(), folder / hub.WEIGHTS, description.header())
        content = _config(loaded, report)
        write_text(folder / hub.CONFIG, json.dumps(content, indent=1) + "\n")
    repository = hub.parse(push)
    name = Path(push).name if repository is None else repository.name
    write_text(folder / README, card(loaded, report, name, on_hub=repository is not None))


def send(folder: Path, push: str, private: bool) -> str:
    """Copy a folder to another one, or push it to the hub. Returns where it is.

    Raises OutputError. The folder itself stays.
    """
    repository = hub.parse(push)
    if repository is None:
        target = Path(push).expanduser()
        with new_folder(target, key="push") as copied:
            shutil.copytree(folder, copied, dirs_exist_ok=True)
        return str(target)
    import huggingface_hub

    api = huggingface_hub.HfApi()
    console.print(f"pushing {folder} to {repository.name}")
    try:
        url = api.create_repo(repository.name, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository.name, folder_path=folder, commit_message="Add the model")
    except Exception as error:  # the client raises anything where there is no network
        raise OutputError(
            f"push={push}: failed ({hub.why(error)})\n"
            f"{folder} is written; `hf upload {repository.name} {folder}` pushes it"
        ) from None
    return str(url)


def _config(loaded: LoadedModel, report: dict[str, Any]) -> dict[str, Any]:
    """Return config.json: timm builds the model by it, after `import deepvit_train.models`."""
    model = loaded.model
    return {
        "architecture": PRESET,
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "model_args": arguments(loaded.architecture) | {"in_chans": channels_of(model.state_dict())},
        "pretrained_cfg": {
            **{name: model.pretrained_cfg[name] for name in PRETRAINED},
            "num_classes": model.num_classes,
            "pool_size": None,
            "label_names": report["classes"],
        },
        "deepvit_train": {name: report[name] for name in ("preprocessing", "versions")},
    }


def arguments(architecture: Architecture) -> dict[str, Any]:
    """Return the keywords with which timm builds a model of this project from any preset of it."""
    shape, attn = plain_from(architecture.model), plain_from(architecture.attn)
    return {
        **{TIMM_NAMES.get(name, name): value for name, value in shape.items() if name != "weights"},
        **{name: value for name, value in attn.items() if name != "dropout"},
        "attn_drop_rate": attn["dropout"],
    }
