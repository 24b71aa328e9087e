"""Translate command lines of timm and DeiT, and compare their meaning with what the printed ones compose."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from deepvit_train.config.compose import compose_command
from deepvit_train.config.from_timm import from_timm
from deepvit_train.config.shipped import config_dir
from deepvit_train.config.timm_command import read_command, table
from deepvit_train.config.train import TrainConfig
from deepvit_train.error import ConfigError
from tests.conftest import Command

LINES = (Path(__file__).parent.parent / "fixtures" / "timm_commands.txt").read_text().splitlines()
PUBLIC = [line for line in LINES if not line.startswith("#")]


def translated(line: str) -> tuple[list[str], list[str]]:
    """The notes and the words of the command."""
    *notes, command = from_timm([line]).splitlines()
    assert all(note.startswith("# ") for note in notes)
    return [note[2:] for note in notes], shlex.split(command)


def composed(line: str) -> TrainConfig:
    words = translated(line)[1]
    return compose_command("train", [word for word in words if "=" in word and not word.startswith("-")])


def test_twenty_public_commands_are_kept() -> None:
    assert len(PUBLIC) >= 20
    assert sum(line.startswith("# https://") for line in LINES) >= 10


@pytest.mark.parametrize("line", PUBLIC)
def test_every_flag_of_a_public_command_is_mapped_or_named(line: str) -> None:
    """The printed command composes to what the flags say, and what can't be said is named."""
    config, (notes, words) = composed(line), translated(line)
    command, told = read_command([line]), "\n".join(notes)
    for name, flag in command.flags.items():
        if name not in command.typed:
            continue
        if flag.here == "-":
            assert name in told
        elif flag.here == "!":
            assert f"missing: {name}" in told or command.text(name) in (flag.default, f"{flag.default}.0")
        elif not flag.here.startswith("~"):
            section, _, key = flag.here.rpartition(".")
            value = getattr(getattr(config, section) if section else config, key)
            assert value is True or str(value) == command.text(name) or value == float(command.text(name))
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
    config, (section, _, name) = composed(f"train.py /data {flags}"), key.rpartition(".")
    assert getattr(getattr(config, section) if section else config, name) == value


@pytest.mark.parametrize(
    ("flags", "note"),
    [
        ("--model resnet50", "missing: --model resnet50 is none of our shapes; nearest: model=vit_small"),
        ("--sched poly", "missing: --sched poly; nearest: schedule=cosine"),
        ("--mixupp 0.2", "unknown: --mixupp 0.2: no flag of timm; did you mean '--mixup'?"),
        ("--eval-metric top5", "missing: --eval-metric top5; nearest: trainer.select_by=top1"),
        ("--model-kwargs colour=red", "missing: --model-kwargs colour=red"),
        ("/other", "unknown: /other: a second word"),
    ],
)
def test_what_has_no_counterpart_is_named(flags: str, note: str) -> None:
    assert any(each.startswith(note) for each in translated(f"train.py /data {flags}")[0])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "give a command line"),
        ("train.py '/data", "No closing quotation"),
        ("train.py $DATA", "write its value"),
        ("train.py /data -b many", "--batch-size many: not a number"),
        ("train.py /data --lr", "--lr: needs a value"),
        ("train.py /data --epochs 3", "schedule.warmup_epochs=5 leaves nothing of trainer.epochs=3"),
    ],
)
def test_what_cannot_be_read_is_said(line: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("$", r"\$")):
        from_timm([line])


def test_the_command_prints_a_line_to_paste(call: Command) -> None:
    done = call(
        "train", "--from-timm", "train.py /data --model vit_small_patch16_224 --opt adamw --lr 1e-3 &> log"
    )
    assert (done.returncode, done.stderr) == (0, "")
    command = shlex.split(done.stdout.splitlines()[-1])
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
    command = f"train.py {tmp_path} --model vit_small_patch16_224"
    assert "data.split=validation" in from_timm([command]).split()
    assert "data.split=test" in from_timm([f"{command} --val-split test"]).split()
    (tmp_path / "val").mkdir()
    assert "data.split" not in from_timm([command])
