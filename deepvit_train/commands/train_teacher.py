"""Open the teacher that a run learns from, and place it where the run computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import nn

from deepvit_train.classes import ORDERS, TORCHVISION, read_names
from deepvit_train.classes import TIMM as TIMM_ORDER
from deepvit_train.commands.train_job import Job
from deepvit_train.config.distill import TIMM, DistillConfig
from deepvit_train.config.preprocessing import Preprocessing
from deepvit_train.config.train import TrainConfig
from deepvit_train.console import amount
from deepvit_train.data.index import ImageIndex
from deepvit_train.data.loaders import Loaders
from deepvit_train.error import CheckpointError, ConfigError, DataError
from deepvit_train.evaluation.loaded import LoadedModel, load, measure_statistics
from deepvit_train.evaluation.outputs import Outputs
from deepvit_train.models.importer import timm_cache
from deepvit_train.models.importer.file import read_source
from deepvit_train.models.importer.timm_model import build_timm_model, check_name, preprocessing_of_timm
from deepvit_train.run.description import is_described
from deepvit_train.run.found import find
from deepvit_train.run.tensor import digest_of_tensors
from deepvit_train.training.distillation import Distillation, Teacher


def open_teacher(config: TrainConfig, train: ImageIndex, say: Callable[[str], None]) -> Teacher | None:
    """Open the teacher that the configuration names, or return None if it names none.

    Raises CheckpointError, ConfigError and DataError, which name the key.
    """
    distill = config.distill
    if distill.teacher is None:
        return None
    try:
        of_timm = distill.teacher.startswith(TIMM)
        teacher, outputs = (_of_timm if of_timm else _of_checkpoint)(distill, config.download)
        data = replace(config.data, allow_subset=True)
        index, labels = outputs.labelled(train, data)
        for line in labels.notes:
            if line.startswith("warning"):
                say(line)
        names = index.classes
    except (CheckpointError, ConfigError, DataError) as error:
        error.args = (f"distill.teacher={distill.teacher}: {error}",)
        raise
    columns = [names.index(name) for name in train.classes]
    unused = f", of which {len(columns)} are classes here" if len(columns) < outputs.count else ""
    told = (
        f"teacher: {teacher.told}; {amount(outputs.count, 'output')}{unused}; {distill.kind}, "
        f"{distill.share:g} of the loss"
    )
    return replace(teacher, columns=columns, told=told)


def place_teacher(job: Job, loaders: Loaders) -> Distillation | None:
    """Bring the teacher to the run's device, and calibrate it if its file holds no calibrated statistics.

    Args:
        loaders: those of the run.
    """
    config, teacher = job.run.config, job.opened.teacher
    if teacher is None:
        return None
    teacher.model.to(job.run.world.device)
    if teacher.loaded is not None and teacher.loaded.needs_calibration:
        job.run.say("teacher: calibrated on training images, because its file holds no calibrated statistics")
        data = replace(loaders.data, allow_subset=True)
        theirs = replace(loaders, preprocessing=teacher.preprocessing, data=data)
        batch = config.trainer.eval_batch_size
        found = measure_statistics(teacher.loaded, theirs, batch, config.trainer.precision, job.run.say)
        teacher.model.load_state_dict(found, strict=False)
    return Distillation(
        teacher=teacher,
        of_student=config.model.preprocessing,
        kind=config.distill.kind,
        share=config.distill.share,
        temperature=config.distill.temperature,
        precision=config.distill.precision or config.trainer.precision,
        device=job.run.world.device,
    )


def _of_checkpoint(distill: DistillConfig, download: bool) -> tuple[Teacher, Outputs]:
    """Load a teacher that this project can build: a run, a checkpoint or a weights file."""
    assert distill.teacher is not None
    found = find(distill.teacher, distill.weights.value, key="distill.teacher", download=download)
    if not is_described(found.file):
        raise CheckpointError(
            f"{found.file} does not say what its model is; nearest: distill.teacher=DIR after "
            f"deepvit-convert source={distill.teacher} out=DIR, or distill.teacher=timm:NAME "
            f"distill.file={distill.teacher}"
        )
    said = {} if distill.classes is None else {"classes": distill.classes}
    loaded = load(distill.teacher, distill.weights.value, key="distill.teacher", download=download, **said)
    loaded.model.load_state_dict(loaded.statistics or {}, strict=False)
    shape, attn = loaded.architecture.model, loaded.architecture.attn
    told = f"{loaded.found.file}, {attn.kind}, {amount(shape.depth, 'block')}, {shape.image_size} pixels"
    outputs = Outputs(
        count=loaded.model.num_classes,
        names=loaded.description.classes,
        order=loaded.description.class_order or TORCHVISION,
        file=str(loaded.found.file),
        key="distill.classes",
    )
    return _frozen(loaded.model, told, shape.preprocessing, loaded), outputs


def _of_timm(distill: DistillConfig, download: bool) -> tuple[Teacher, Outputs]:
    """Build a teacher of timm, with weights from the file that is given or from timm's cache."""
    assert distill.teacher is not None
    name = distill.teacher.removeprefix(TIMM)
    check_name(name, "no teacher")
    file = distill.file or str(timm_cache.weights_file(name, download))
    found = find(file, key="distill.file", download=download)
    tensors = read_source(found, distill.weights.value).tensors
    model = build_timm_model(name, tensors)
    preprocessing = preprocessing_of_timm(model)
    count = getattr(model, "num_classes", 0)
    named = distill.classes is not None and distill.classes not in ORDERS
    outputs = Outputs(
        count=count,
        names=read_names(distill.classes, count) if named and distill.classes else None,
        order=distill.classes if distill.classes in ORDERS else TIMM_ORDER,
        file=str(found.file),
        key="distill.classes",
    )
    return _frozen(
        model, f"timm's {name} ({found.file}), {preprocessing.image_size} pixels", preprocessing
    ), outputs


def _frozen(
    model: nn.Module, told: str, preprocessing: Preprocessing, loaded: LoadedModel | None = None
) -> Teacher:
    """Return a model as a teacher, whose outputs are not matched to classes yet."""
    model.eval().requires_grad_(False)
    return Teacher(model, preprocessing, [], digest_of_tensors(model.state_dict()), told, loaded)
