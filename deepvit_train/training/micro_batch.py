"""Find into how many parts a batch is cut, so that a step fits the memory: trainer.accumulate=auto.

It is found once, when a run begins. The run keeps the number in its config.yaml, because BatchNorm and
rounding depend on it: a run that goes on computes as before, whatever is free then.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace

import torch
from torch import Tensor

from deepvit_train.config.preset import Architecture
from deepvit_train.config.train import TrainConfig
from deepvit_train.console import amount
from deepvit_train.data.kept import free_memory
from deepvit_train.determinism import seeded
from deepvit_train.distributed.agreement import together
from deepvit_train.distributed.launch import local_size
from deepvit_train.distributed.world import World
from deepvit_train.error import ConfigError
from deepvit_train.models import DeepViT
from deepvit_train.precision import autocast
from deepvit_train.run.checkpoint import checkpoints_in, read_state
from deepvit_train.run.folder import RunFolder
from deepvit_train.training.optimizer import build_optimizer
from deepvit_train.training.optimizer_state import make_state

CLASSES = 1000  # the head of a trial; the data is not open yet
CUDA_SHARE = 0.9  # of the card's memory that a step may take: evaluations and fragments need the rest
CPU_SHARE = 0.5  # of the free memory, for what a step keeps: an estimate, and loaders need memory too


def settle_accumulate(
    config: TrainConfig, folder: RunFolder, world: World, say: Callable[[str], None]
) -> None:
    """Find trainer.accumulate where it is to be found. All ranks must call this, and get the same.

    Raises ConfigError if not even the smallest part of a batch fits.
    """
    if config.trainer.accumulate is not None:
        return
    choices = possible_parts(config, world.size)
    if folder.begun:
        parts = together(world, lambda: _parts_before(config, folder, choices, world.size))
        config.trainer = replace(config.trainer, accumulate=world.first(parts))
        return
    place = together(world, lambda: _first_that_fits(config, choices, world))
    (place,) = world.largest(place)  # the rank with the least memory decides
    if place == len(choices):
        raise ConfigError(
            f"trainer.accumulate=auto: a step needs more memory than there is, even in {choices[-1]} parts; "
            "nearest: trainer.grad_checkpointing=true, trainer.precision=bf16 or a smaller model"
        )
    config.trainer = replace(config.trainer, accumulate=choices[place])
    micro = config.trainer.batch_size // (choices[place] * world.size)
    say(
        f"trainer.accumulate=auto: {choices[place]}, with {amount(micro, 'image')} at a time on each rank; "
        "the run keeps it"
    )


def _parts_before(config: TrainConfig, folder: RunFolder, choices: list[int], ranks: int) -> int:
    """Return the parts that the run began with. On another number of ranks each has as many images at a time.

    So a run that goes on with fewer GPUs still fits their memory.
    """
    parts = int(folder.stored_config()["trainer"]["accumulate"])
    newest = checkpoints_in(folder.checkpoints)[-1:]
    before = read_state(newest[0]).get("rounding", {}).get("ranks", ranks) if newest else ranks
    if before == ranks:
        return parts
    micro = config.trainer.batch_size / (parts * before)
    return next(
        (each for each in choices if config.trainer.batch_size / (each * ranks) <= micro), choices[-1]
    )


def possible_parts(config: TrainConfig, ranks: int) -> list[int]:
    """Return the numbers of parts that a batch can be cut into, rising. Mixup needs an even number of images.

    Raises ConfigError if the ranks can't share the batch.
    """
    batch = config.trainer.batch_size
    if batch % ranks:
        raise ConfigError(
            f"trainer.batch_size={batch} is not divisible by {amount(ranks, 'rank')}; nearest: "
            f"trainer.batch_size={max(1, round(batch / ranks)) * ranks}"
        )
    mine, pairs = batch // ranks, bool(config.augment.mixup or config.augment.cutmix)
    found = [parts for parts in range(1, mine + 1) if mine % parts == 0]
    return [parts for parts in found if not (pairs and mine // parts % 2)] or [1]


def _first_that_fits(config: TrainConfig, choices: list[int], world: World) -> int:
    """Return the place of the first number of parts with which a step fits, or len(choices)."""
    sizes = [config.trainer.batch_size // (parts * world.size) for parts in choices]
    with seeded(config.seed):  # the run draws as it would without trials
        if world.device.type == "cuda":
            return next(
                (place for place, size in enumerate(sizes) if _fits_on_card(config, size, world.device)),
                len(sizes),
            )
        budget = CPU_SHARE * free_memory() / local_size()
        need = bytes_of_an_image(config)
        return next((place for place, size in enumerate(sizes) if size * need <= budget), len(sizes))


def bytes_of_an_image(config: TrainConfig) -> int:
    """Return the bytes that a step keeps for its backward pass for each image, beside the weights."""
    model = _model(config)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def kept(images: int) -> int:
        tensors: list[Tensor] = []  # all stay alive: a freed address could be given to another
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda each: tensors.append(each), lambda each: each)
        with hooks:
            _loss(model, config, images, torch.device("cpu"))
        storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
        return sum(size for place, size in storages.items() if place not in weights)

    return max(1, (kept(4) - kept(2)) // 2)


def _fits_on_card(config: TrainConfig, images: int, device: torch.device) -> bool:
    """Try a step with so many images, with all that a run holds beside: optimizer and averaged weights."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    try:
        model = _model(config)
        model.to(device)
        average = None if config.trainer.ema_decay is None else deepcopy(model)
        optimizer = build_optimizer(model, config.optim)
        make_state(optimizer)
        _loss(model, config, images, device).backward()
        torch.cuda.synchronize(device)
        free, total = torch.cuda.mem_get_info(device)
        taken = total - free + torch.cuda.max_memory_reserved(device) - torch.cuda.memory_reserved(device)
        del average
        return taken <= CUDA_SHARE * total
    except torch.OutOfMemoryError:
        return False
    finally:
        torch.cuda.empty_cache()


def _model(config: TrainConfig) -> DeepViT:
    model = DeepViT(Architecture(config.model, config.attn), CLASSES)
    model.freeze(config.optim.freeze_blocks, config.optim.head_only)
    model.set_grad_checkpointing(config.trainer.grad_checkpointing)
    model.train()
    return model


def _loss(model: DeepViT, config: TrainConfig, images: int, device: torch.device) -> Tensor:
    """Return a loss of so many black images."""
    size = config.model.image_size
    with autocast(device, config.trainer.precision):
        logits = model(torch.zeros(images, 3, size, size, device=device))
    return logits.float().logsumexp(dim=1).mean()
