"""Translate command lines of timm and DeiT, and compare their meaning with what the printed ones compose."""

from __future__ import annotations

import shlex
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_loader, resolve_data_config
from timm.scheduler.cosine_lr import CosineLRScheduler

from deepvit_train.commands import train_timm
from deepvit_train.config.compose import compose_command
from deepvit_train.config.from_timm import WIDTH, from_timm
from deepvit_train.config.preset import Architecture, model_preset, plain_from
from deepvit_train.config.shipped import config_dir
from deepvit_train.config.timm_command import Command as TimmCommand
from deepvit_train.config.timm_command import read_command, table
from deepvit_train.config.timm_model import OF_FLAGS
from deepvit_train.config.train import TrainConfig
from deepvit_train.error import ConfigError
from deepvit_train.models import DeepViT
from tests.conftest import Command, slowly

LINES = (Path(__file__).parent.parent / "fixtures" / "timm_commands.txt").read_text().splitlines()
PUBLIC = [line for line in LINES if not line.startswith("#")]


# Models of public commands that can't be trained here, each with the reason that is told.
FOREIGN = {
    "efficientnet": "it is a EfficientNet",
    "mixnet": "it is a EfficientNet",
    "mobilenet": "it is a MobileNetV3",
    "res": "it is a ResNet",
    "seres": "it is a ResNet",
    "T2t_vit_t_14": "timm has no such model",
    "deit_small_pla": "timm has no such model",
}
SIZES = ("tiny", "small", "base")
TODAY = "vit_base_patch16_224.augreg_in21k"  # its name once ended in _in21k
DISTILLED = "deit_tiny_distilled_patch16_224"
VIT = "--model vit_small_patch16_224"


@cache
def asked(line: str) -> str:
    return from_timm([line], lambda: train_timm)


def translated(line: str) -> tuple[list[str], list[str]]:
    """The notes and the words of the command."""
    lines = asked(line).splitlines()
    notes = [each[2:] for each in lines if each.startswith("# ")]
    command = lines[len(notes) :]
    assert all(each.endswith(" \\") for each in command[:-1])
    assert all(len(each) <= WIDTH or " " not in each.strip(" \\") for each in command)
    return notes, shlex.split("\n".join(command).replace("\\\n", " "))


def trainable(line: str) -> str:
    """A public command, with a model that can be trained here in the place of one that can't."""
    model = read(line).text("--model")
    return line.replace(model, "vit_small_patch16_224") if model.startswith(tuple(FOREIGN)) else line


def read(line: str) -> TimmCommand:
    return read_command([line], lambda: train_timm)


def composed(line: str) -> TrainConfig:
    words = translated(line)[1]
    return compose_command("train", [word for word in words if "=" in word and not word.startswith("-")])


def test_twenty_public_commands_are_kept() -> None:
    assert len(PUBLIC) >= 20
    assert sum(line.startswith("# https://") for line in LINES) >= 10


@pytest.mark.parametrize("line", [line for line in PUBLIC if trainable(line) != line])
def test_a_model_that_can_not_be_trained_here_leaves_nothing_to_paste(line: str) -> None:
    model = read(line).text("--model")
    reason = max((name for name in FOREIGN if model.startswith(name)), key=len)
    with pytest.raises(ConfigError, match=f"--model {model}: .*{FOREIGN[reason]}"):
        asked(line)


@pytest.mark.parametrize("line", list(map(trainable, PUBLIC)))
def test_every_flag_of_a_public_command_is_mapped_or_named(line: str) -> None:
    """The printed command composes to what the flags say, and what can't be said is named."""
    config, (notes, words) = composed(line), translated(line)
    command, told = read(line), "\n".join(notes)
    for name, flag in command.flags.items():
        if name not in command.typed:
            continue
        if flag.here == "-":
            assert name in told
        elif flag.here == "!":
            assert f"missing: {name}" in told or f" {name}" in told
        elif not flag.here.startswith("~"):
            section, _, key = flag.here.rpartition(".")
            value = getattr(getattr(config, section) if section else config, key)
            assert value is True or str(value) == command.text(name) or value == float(command.text(name))
            assert any(word.startswith(f"{flag.here}=") for word in words)
    processes = command.processes * command.machines
    assert config.trainer.batch_size == command.number("--batch-size") * processes
    assert words[0] == ("torchrun" if processes > 1 else "deepvit-train")
    name = command.text("--opt").lower()
    assert config.optim.name in (name, name.removeprefix("fused"))
    assert config.schedule.name == command.text("--sched")
    assert (config.trainer.ema_decay is not None) == (
        "--model-ema" in line.split() or (command.deit and "--no-model-ema" not in line)
    )


def test_deit_is_what_its_readme_says() -> None:
    (line,) = [each for each in PUBLIC if "deit_small_patch16_224" in each and "--output_dir /path" in each]
    config = composed(line)
    assert (config.model.dim, config.model.heads, config.model.drop_path) == (384, 6, 0.1)
    assert config.model.mean == [0.485, 0.456, 0.406]
    assert (config.trainer.batch_size, config.optim.lr, config.optim.weight_decay) == (1024, 1e-3, 0.05)
    assert (config.trainer.epochs, config.schedule.warmup_epochs, config.schedule.cooldown_epochs) == (
        300,
        5,
        10,
    )
    assert (config.schedule.warmup_lr, config.schedule.min_lr, config.trainer.ema_decay) == (
        1e-6,
        1e-5,
        0.99996,
    )
    augment = config.augment
    assert (augment.mixup, augment.cutmix, augment.erase, augment.repeats) == (0.8, 1.0, 0.25, 3)
    assert (augment.auto_augment, augment.color_jitter) == ("rand-m9-mstd0.5-inc1", 0.0)


def test_timms_own_defaults_are_written_out() -> None:
    config = composed("train.py /data --model vit_small_patch16_224 --opt adamw --lr 1e-3")
    assert (config.trainer.epochs, config.trainer.batch_size, config.seed) == (300, 128, 42)
    assert config.augment.random_interpolation
    averaged = "train.py /data --model vit_tiny_patch16_224 --model-ema"
    assert not composed(averaged).trainer.ema_warmup
    assert composed(f"{averaged} --model-ema-warmup").trainer.ema_warmup
    assert not composed("main.py --data-path /data").augment.random_interpolation
    assert (config.schedule.warmup_lr, config.schedule.min_lr) == (1e-5, 0)
    assert (config.optim.weight_decay, config.model.drop_path, config.augment.color_jitter) == (2e-5, 0, 0.4)
    assert (config.augment.crop_scale, config.augment.flip, config.loss.label_smoothing) == (
        [0.08, 1.0],
        0.5,
        0.1,
    )


@pytest.mark.parametrize(
    ("flags", "rate"),
    [
        ("--opt adamw --lr-base 1e-3 -b 256", 1e-3),
        ("--opt adamw --lr-base 1e-3 -b 1024", 2e-3),  # the square root of 4
        ("--opt adamw --lr-base 1e-3 -b 1024 --lr-base-scale linear", 4e-3),
        ("--opt adamw --lr-base 5e-4 --lr-base-size 512 -b 512 --grad-accum-steps 4", 1e-3),
        ("--opt sgd -b 256", 0.1),
        ("--lr 3e-4 -b 4096", 3e-4),
    ],
)
def test_the_rate_is_worked_out_as_timm_does(flags: str, rate: float) -> None:
    assert composed(f"train.py /data --model vit_tiny_patch16_224 {flags}").optim.lr == pytest.approx(rate)


@pytest.mark.parametrize(
    ("flags", "key", "value"),
    [
        ("--model vit_base_patch16_384.augreg_in1k", "model.image_size", 384),
        ("--model vit_base_patch32_224", "model.patch_size", 32),
        ("--model vit_small_patch16_224 --input-size 3 192 192", "model.image_size", 192),
        ("--model deepvit_s", "model.dim", 396),
        ("--model vit_tiny_patch16_224 --gp avg", "model.pool", "mean_patches"),
        ("--model vit_tiny_patch16_224 --model-kwargs embed_dim=96 depth=4", "model.dim", 96),
        ("--amp --amp-dtype bfloat16", "trainer.precision", "bf16"),
        ("--torchcompile --torchcompile-mode reduce-overhead", "trainer.compile", "reduce_overhead"),
        ("--warmup-prefix --epochs 50 --warmup-epochs 10", "trainer.epochs", 60),
        ("--aa 3a --color-jitter 0.3", "augment.color_jitter", 0.3),
        ("--no-aug", "augment.crop_scale", None),
        ("--scale 0.2 1.0", "augment.crop_scale", [0.2, 1.0]),
        ("--aug-repeats 3", "augment.repeats", 3),
        ("--grad-accum-steps 2 --batch-size 8", "trainer.batch_size", 16),
        ("--data-dir '/my photos'", "data.root", "/my photos"),
        ("--dataset wds/flowers", "data.name", "tar"),
        ("--output out --experiment try", "run_dir", "out/try"),
        ("--pretrained --model deit_tiny_patch16_224", "model.weights", "timm:deit_tiny_patch16_224"),
        ("--pretrained --model vit_base_patch16_224_in21k", "model.weights", f"timm:{TODAY}"),
        ("--opt adamw --opt-betas 0.9 0.95", "optim.betas", [0.9, 0.95]),
        ("--opt lion", "optim.betas", [0.9, 0.99]),
        ("--opt sgd --momentum 0.8", "optim.options", {"momentum": 0.8, "nesterov": True}),
        ("--opt rmsproptf --opt-eps .001", "optim.name", "rmsproptf"),
        ("--opt rmsproptf --opt-eps .001", "optim.eps", 0.001),
        ("--opt adamp", "optim.betas", None),
        ("--opt fusedlamb", "optim.name", "lamb"),
        ("--sched step --decay-epochs 2.4 --decay-rate .97", "schedule.decay_epochs", 2.4),
        ("--bce-loss --bce-target-thresh 0.2", "loss.target_threshold", 0.2),
        ("--eval-metric loss", "trainer.select_by", "loss"),
        ("--log-wandb", "tracker", ["wandb"]),
        ("--val_split val2", "data.split", "val2"),  # an underscore is a dash
        ("--weight-dec 0.1", "optim.weight_decay", 0.1),  # argparse takes the beginning of a flag
        ("-b=32", "trainer.batch_size", 32),
    ],
)
def test_a_flag_sets_a_key(flags: str, key: str, value: object) -> None:
    model = "" if "--model " in flags else VIT
    config, (section, _, name) = composed(f"train.py /data {model} {flags}"), key.rpartition(".")
    assert getattr(getattr(config, section) if section else config, name) == value


@pytest.mark.parametrize(
    ("flags", "note"),
    [
        ("--sched poly", "missing: --sched poly; nearest: schedule=cosine"),
        ("--mixupp 0.2", "unknown: --mixupp 0.2: no flag of timm; did you mean '--mixup'?"),
        ("--eval-metric top5", "missing: --eval-metric top5; nearest: trainer.select_by=top1"),
        ("--model-kwargs colour=red", "missing: --model-kwargs colour=red"),
        ("/other", "unknown: /other: a second word"),
    ],
)
def test_what_has_no_counterpart_is_named(flags: str, note: str) -> None:
    assert any(each.startswith(note) for each in translated(f"train.py /data {VIT} {flags}")[0])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "give a command line"),
        ("train.py '/data", "No closing quotation"),
        ("train.py $DATA", "write its value"),
        (f"train.py /data {VIT} -b many", "--batch-size many: not a number"),
        (f"train.py /data {VIT} --lr", "--lr: needs a value"),
        ("train.py /data", "--model resnet50: it is a ResNet, not a VisionTransformer"),
        ("train.py /data --model resnet50", "25.6 million parameters: --model vit_small_patch16_224"),
        (
            "train.py /data --model hf-hub:timm/vit_small",
            "nearest: --model NAME of timm, and model.weights=hf:",
        ),
        ("train.py /d --model vit_small_patch16_224.dini", "did you mean 'vit_small_patch16_224.dino'"),
        ("train.py /data --model vit_smal_patch16_224", "did you mean 'vit_small_patch16_224'"),
        (f"train.py /data {VIT} --opt adamww", "--opt adamww: timm has no such optimizer; did you mean"),
        (f"train.py /data {VIT} --opt foo", "--opt foo: timm has no such optimizer; nearest: --opt adamw"),
        (
            f"validate.py /d {VIT} --checkpoint x.pth",
            "deepvit-eval checkpoint=x.pth data.root=/d preset=timm",
        ),
        ("python inference.py --checkpoint=x.pth", "nearest: deepvit-predict checkpoint=x.pth images=DIR"),
        ("main.py --data-path /d --resume x.pth --eval", "nearest: deepvit-eval checkpoint=FILE"),
    ],
)
def test_what_cannot_be_read_is_said(line: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("$", r"\$")):
        asked(line)


def test_the_command_prints_a_line_to_paste(call: Command) -> None:
    done = call(
        "train", "--from-timm", "train.py /data --model vit_small_patch16_224 --opt adamw --lr 1e-3 &> log"
    )
    assert (done.returncode, done.stderr) == (0, "")
    (lines,) = [done.stdout[done.stdout.index("\ndeepvit-train") :]]
    command = shlex.split(lines.replace("\\\n", " "))
    assert command[0] == "deepvit-train"
    assert call("train", *command[1:], "--cfg").returncode == 0
    more = call("train", "--from-timm", "train.py /data --model vit_small_patch16_224", "attn=reattention")
    assert more.returncode == 2
    assert "attn=reattention: --from-timm takes one command line" in more.stderr
    words = ["train.py", "/my data", "--model", "vit_small_patch16_224"]  # not quoted as a whole
    assert "'data.root=/my data'" in call("train", "--from-timm", *words).stdout


@pytest.mark.parametrize("program", ["train", "deit"])
def test_every_row_of_the_tables_is_whole(program: str) -> None:
    keys = {f"{name}" for name in _keys()}
    for flag in table(program).values():
        assert flag.values in ("0", "1", "?", "+")
        assert flag.here[0] in "~-!" or flag.here in keys, flag
        assert flag.note or flag.here[0] != "!", flag


def _keys() -> set[str]:
    from deepvit_train.config.command import keys_of

    return {key.name for key in keys_of(TrainConfig)}


def test_the_page_has_every_flag() -> None:
    """docs/from-timm.md shows the tables that the program reads."""
    page = (config_dir().parent / "docs" / "from-timm.md").read_text()
    for program in ("train", "deit"):
        for flag in table(program).values():
            default = f"`{flag.default}`" if flag.default else ""
            here = {"-": "not needed", "!": "missing"}.get(flag.here) or f"`{flag.here.removeprefix('~ ')}`"
            assert f"| `{' '.join(flag.names)}` | {default} | {here} | {flag.note} |" in page, flag


def test_the_validation_folder_that_timm_would_take_is_named(tmp_path: Path) -> None:
    (tmp_path / "validation").mkdir()
    command = f"train.py {tmp_path} {VIT}"
    assert "data.split=validation" in translated(command)[1]
    assert "data.split=test" in translated(f"{command} --val-split test")[1]
    (tmp_path / "val").mkdir()
    asked.cache_clear()
    assert "data.split" not in asked(command)


@pytest.mark.parametrize("name", [f"{kind}_{size}" for kind in ("vit", "deit") for size in SIZES])
def test_the_presets_are_what_timm_says_of_their_names(name: str) -> None:
    """So timm need not be asked, which takes seconds."""
    ours, timms = model_preset(name).model, train_timm.model_keys(f"{name}_patch16_224")
    known = plain_from(ours)
    assert {key: known[key] for key in timms if key not in OF_FLAGS} == {
        key: value for key, value in timms.items() if key not in OF_FLAGS
    }


@pytest.mark.parametrize(
    "name",
    [
        "vit_small_patch16_224.dino",
        "vit_base_patch16_224_miil",
        "vit_large_patch16_224",
        "deit3_small_patch16_224",
        slowly("vit_base_patch16_224.mae"),
        slowly("vit_base_patch32_384"),
        slowly("vit_huge_patch14_224"),
        slowly("vit_base_patch16_clip_quickgelu_224.openai"),
        slowly("vit_medium_patch16_gap_256"),
        slowly("vit_small_patch14_reg4_dinov2"),
    ],
)
def test_a_plain_vit_of_timm_is_built_as_it_is_there(name: str) -> None:
    """The model of the printed command has timm's parameters, and reads images as timm's does."""
    config = composed(f"train.py /data --model {name} --opt adamw")
    with torch.device("meta"):
        ours = DeepViT(Architecture(config.model, config.attn), num_classes=1000)
        theirs: Any = timm.create_model(name, num_classes=1000)
    own, others = (sum(map(torch.numel, model.parameters())) for model in (ours, theirs))
    assert own - others in (0, config.model.dim)  # timm may leave out the class token's position, or a bias
    expected, model = resolve_data_config({}, model=theirs), config.model
    assert (model.mean, model.std) == (list(expected["mean"]), list(expected["std"]))
    assert (model.crop_pct, model.interpolation) == (expected["crop_pct"], expected["interpolation"])
    assert model.image_size == expected["input_size"][-1]
    scale = getattr(theirs.blocks[0].ls1, "init_values", None)
    assert model.layer_scale == scale


def test_what_is_typed_wins_over_what_timm_keeps_for_a_tag() -> None:
    line = "train.py /data --model vit_small_patch16_224.dino --pretrained --opt adamw"
    notes, words = translated(line)
    assert "model.mean=[0.485,0.456,0.406]" in words
    assert "model.crop_pct" not in " ".join(words)  # equal to ours
    assert any("download=true fetches it" in note for note in notes)
    model = composed(f"{line} --mean 0.1 0.2 0.3 --crop-pct 0.8 --interpolation bilinear").model
    assert (model.mean, model.crop_pct, model.interpolation) == ([0.1, 0.2, 0.3], 0.8, "bilinear")
    assert any("no head of its own" in each for each in translated(f"main.py --model {DISTILLED}")[0])
    assert any("pip install" in note for note in translated(f"train.py /d {VIT} --log-wandb")[0])


def test_every_typed_flag_is_in_the_command_or_named() -> None:
    typed = (
        "--sched cosine --warmup-epochs 5 --warmup-lr 1e-6 --min-lr 1e-5 --weight-decay 0.05 --smoothing 0.1"
    )
    more = (
        "--hflip 0.5 --mixup 0 --drop-path 0 --train-interpolation bicubic --momentum 0.9 --eval-metric top1"
    )
    words = translated(f"train.py /data {VIT} --opt sgd {typed} {more}")[1]
    keys = {word.partition("=")[0] for word in words}
    assert {
        *("attn", "schedule", "schedule.warmup_epochs", "schedule.warmup_lr", "schedule.min_lr"),
        *("optim.weight_decay", "loss.label_smoothing", "augment.flip", "augment.mixup", "model.drop_path"),
        *("augment.random_interpolation", "optim.options", "trainer.select_by"),
    } <= keys
    notes, words = translated(f"train.py /data {VIT} --decay-epochs 9 --clip-mode norm --clip-grad 1.0")
    assert "without effect, in timm too: --decay-epochs" in notes
    assert "the same here: --clip-mode norm" in notes
    assert "trainer.clip_grad=1.0" in words


def test_a_flag_without_a_counterpart_leaves_no_key_of_another_meaning() -> None:
    for mode in ("agc", "value"):
        notes, words = translated(f"train.py /data {VIT} --clip-mode {mode} --clip-grad 0.02")
        assert "clip_grad" not in " ".join(words)
        assert f"left out: --clip-grad 0.02, which is for --clip-mode {mode}" in notes


@pytest.mark.parametrize(
    ("flags", "share", "temperature"),
    [
        ("", 0.5, 4.0),
        ("--task-loss-weight 0.3", 0.7, 4.0),
        ("--distill-loss-weight 3 --kd-temperature 2", 0.75, 2.0),
    ],
)
def test_a_teacher_of_timms_becomes_ours(flags: str, share: float, temperature: float) -> None:
    line = f"train.py /data {VIT} --kd-model-name resnet50.a1_in1k {flags}"
    found = composed(line).distill
    assert (found.teacher, found.kind) == ("timm:resnet50.a1_in1k", "soft")
    assert (found.share, found.temperature) == (share, temperature)
    notes = " ".join(translated(line)[0])
    assert ("by that factor" in notes) == ("--task" not in flags)
    assert "download=true" in notes
    alone = translated(f"train.py /data {VIT} --kd-model-name resnet50 --task-loss-weight 1")
    assert not any(word.startswith("distill.") for word in alone[1])
    features = translated(f"train.py /data {VIT} --kd-model-name resnet50 --kd-distill-type feature")
    assert not any(word.startswith("distill.") for word in features[1])
    assert any("--kd-distill-type feature" in note for note in features[0])


def test_a_teacher_of_deits_becomes_ours(tmp_path: Path) -> None:
    line = "main.py --model deit_tiny_patch16_224 --distillation-type hard --distillation-alpha 0.3"
    found = composed(f"{line} --teacher-path teacher.pth").distill
    assert (found.teacher, found.file) == ("timm:regnety_160", "teacher.pth")
    assert (found.kind, found.share) == ("hard", 0.3)
    notes = " ".join(translated(f"{line} --teacher-path https://somewhere/teacher.pth")[0])
    assert "nothing is fetched from there" in notes


def test_no_aug_varies_nothing_as_in_timm() -> None:
    notes, _ = translated(line := f"train.py /data {VIT} --no-aug --reprob 0.2 --aa rand-m9 --mixup 0.2")
    augment = composed(line).augment
    assert (augment.erase, augment.auto_augment, augment.random_interpolation) == (0, None, False)
    assert augment.mixup == 0.2
    assert "without effect, in timm too: --reprob --aa" in notes
    # timm's own loader, as train.py calls it: `bicubic` is the model's.
    dataset: Any = [(Image.new("RGB", (40, 30)), 0)] * 2
    sizes = {"input_size": (3, 16, 16), "batch_size": 2, "is_training": True, "num_workers": 0}
    options = {"no_aug": True, "re_prob": 0.2, "interpolation": "bicubic", "device": torch.device("cpu")}
    source: Any = type("Source", (list,), {"transform": None})(dataset)
    loader: Any = create_loader(source, **sizes, **options)
    assert loader.random_erasing is None
    assert [type(each).__name__ for each in source.transform.transforms] == [
        "Resize",
        "CenterCrop",
        "MaybePILToTensor",
    ]


@pytest.mark.parametrize(("epochs", "warmup"), [(3, 5), (5, 5), (6, 5)])
def test_a_warm_up_longer_than_the_run_is_told_and_shortened(epochs: int, warmup: int) -> None:
    line = f"train.py /data {VIT} --opt adamw --lr 1e-3 --epochs {epochs}"
    config, notes = composed(line), " ".join(translated(line)[0])
    # timm's own schedule, an epoch at a time.
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    schedule = CosineLRScheduler(optimizer, epochs, warmup_t=warmup, warmup_lr_init=1e-5)
    last = schedule._get_lr(epochs - 1)[0]
    if warmup < epochs:
        assert config.schedule.warmup_epochs == warmup
        assert "still warm up" not in notes
    else:
        assert config.schedule.warmup_epochs == epochs / 2
        assert f"end after {epochs}, at a rate of {last:.3g}; here" in notes
