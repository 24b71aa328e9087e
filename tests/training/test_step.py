"""Compare one optimizer step with what it should equal."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from timm.data import Mixup
from torch import Tensor

from deepvit_train.config.compose import compose_command
from deepvit_train.config.recipe import Precision
from deepvit_train.config.shipped import choices
from deepvit_train.data.dataset import Batch
from deepvit_train.data.order import TrainOrder
from deepvit_train.determinism import derive_seed, seeded
from deepvit_train.distributed.world import World
from deepvit_train.error import NotFiniteError
from deepvit_train.models import DeepViT
from deepvit_train.training.finite import FiniteGuard
from deepvit_train.training.optimizer import build_optimizer
from deepvit_train.training.recipe import build_ema, build_mixup
from deepvit_train.training.schedule import build_schedule
from deepvit_train.training.state import TrainState
from deepvit_train.training.step import StepOptions, StepResult, train_step

WORLD = World(rank=0, size=1, device=torch.device("cpu"))
SHAPE = {"image_size": 8, "patch_size": 4, "num_classes": 3, "dim": 12, "depth": 2, "heads": 3, "mlp_dim": 16}


def state_of(
    precision: Precision = Precision.fp32, attn: str = "self", lr: float = 1e-2, **shape: float | str
) -> TrainState:
    torch.manual_seed(0)
    config = compose_command("train", [f"optim.lr={lr}", "schedule.warmup_epochs=0"])
    model = DeepViT(**{**SHAPE, **shape}, attn=attn, init="vit").train()
    optimizer = build_optimizer(model, config.optim)
    return TrainState(
        model=model,
        ema=build_ema(model, 0.9),
        optimizer=optimizer,
        schedule=build_schedule(optimizer, config.schedule, 10, 10),
        scaler=torch.amp.GradScaler("cpu", enabled=precision == Precision.fp16),
    )


def options(precision: Precision = Precision.fp32, **changes: object) -> StepOptions:
    values = {"label_smoothing": 0.1, "mixup": None, "clip_grad": None, "max_scaler_skips": 2}
    return StepOptions(seed=0, precision=precision, **{**values, **changes})


def advance(
    state: TrainState, forward: Callable[[Tensor], Tensor], batches: list[Batch], how: StepOptions
) -> StepResult:
    guard = FiniteGuard(WORLD, scaled=how.precision == Precision.fp16)
    return train_step(state, forward, batches, WORLD, how, guard)


def batch(size: int = 8, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(3, (size,), generator=generator)
    return Batch(torch.randn(size, 3, 8, 8, generator=generator), targets, [])


def parts(whole: Batch, count: int) -> list[Batch]:
    pairs = zip(whole.images.chunk(count), whole.targets.chunk(count), strict=True)
    return [Batch(images, targets, []) for images, targets in pairs]


def test_accumulated_gradients_equal_those_of_the_whole_batch() -> None:
    one, four = state_of(), state_of()
    for state in (one, four):  # AdamW divides rounding by its own size: in float64 there is next to none
        state.model.double()
        state.ema.double()
    for step in range(3):
        whole = batch(seed=step)
        whole = whole._replace(images=whole.images.double())
        first = advance(one, one.model, [whole], options())
        second = advance(four, four.model, parts(whole, 4), options())
        torch.testing.assert_close(first.loss, second.loss)
        torch.testing.assert_close(first.grad_norm, second.grad_norm)
    for left, right in zip(one.model.parameters(), four.model.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("precision", list(Precision))
@pytest.mark.parametrize("attn", choices("attn"))
def test_each_precision_learns(precision: Precision, attn: str) -> None:
    state = state_of(precision, attn)
    losses = [advance(state, state.model, [batch()], options(precision)).loss.item() for _ in range(25)]
    assert losses[-1] < 0.7 * losses[0]
    assert all(parameter.dtype == torch.float32 for parameter in state.model.parameters())
    assert state.step == 25


def test_half_precision_gives_nearly_the_gradients_of_full_precision() -> None:
    norms = {}
    for precision in Precision:
        state = state_of(precision, "reattention")
        norms[precision] = advance(state, state.model, [batch(32)], options(precision)).grad_norm.item()
    assert norms[Precision.bf16] == pytest.approx(norms[Precision.fp32], rel=0.05)
    assert norms[Precision.fp16] == pytest.approx(norms[Precision.fp32], rel=0.01)


def test_gradients_are_clipped() -> None:
    state = state_of()
    seen = []
    state.optimizer.register_step_pre_hook(
        lambda *_: seen.append(torch.nn.utils.get_total_norm([p.grad for p in state.model.parameters()]))
    )
    norm = advance(state, state.model, [batch()], options(clip_grad=0.01)).grad_norm
    assert norm > 0.01
    assert seen[0].item() == pytest.approx(0.01, rel=1e-3)


def test_dropout_is_a_function_of_the_step() -> None:
    first, second = (state_of(attn="reattention", dropout=0.3) for _ in range(2))
    for step in range(3):
        advance(first, first.model, [batch(seed=step)], options())
    for step in range(3):
        torch.rand(step)
        advance(second, second.model, [batch(seed=step)], options())
    for left, right in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(left, right)


def test_mixup_is_a_function_of_the_step_and_its_targets_add_up() -> None:
    mixup = build_mixup(compose_command("train", ["augment=deit"]).augment, 0.1, 3, 8)
    losses = []
    for _ in range(2):
        state = state_of()
        losses.append(advance(state, state.model, [batch()], options(mixup=mixup)).loss)
    assert torch.equal(losses[0], losses[1])
    assert losses[0].isfinite()


@pytest.mark.parametrize(("ranks", "accumulate"), [(1, 2), (2, 1), (2, 2), (4, 1)])
def test_mixup_does_not_depend_on_ranks_or_micro_batches(ranks: int, accumulate: int) -> None:
    mixup = build_mixup(compose_command("train", ["augment=deit"]).augment, 0.1, 3, 2)
    whole = batch()

    def mixed(rank: int, ranks: int, accumulate: int) -> tuple[list[Tensor], Tensor]:
        """The images that reach a rank's model in six steps, and its loss in each."""
        state, seen, losses = state_of(lr=0), [], []
        world = World(rank=rank, size=1, device=torch.device("cpu"))  # no other process is asked
        order = TrainOrder(
            8,
            batch_size=8,
            accumulate=accumulate,
            steps_per_epoch=1,
            steps=range(1),
            seed=0,
            world=World(rank, ranks, torch.device("cpu")),
            mirrored=True,
        )
        places = [[key.image for key in keys] for keys in order]

        def forward(images: Tensor) -> Tensor:
            seen.append(images.clone())
            return state.model(images)

        for _ in range(6):
            # Each time anew, because images are mixed in place.
            batches = [Batch(whole.images[micro], whole.targets[micro], []) for micro in places]
            guard = FiniteGuard(world, scaled=False)
            losses.append(train_step(state, forward, batches, world, options(mixup=mixup), guard).loss)
        return seen, torch.stack(losses)

    def by_content(seen: list[Tensor]) -> set[bytes]:
        return {image.numpy().tobytes() for images in seen for image in images}

    alone, loss = mixed(0, 1, 1)
    found = [mixed(rank, ranks, accumulate) for rank in range(ranks)]
    assert len(by_content(alone)) == 48
    assert by_content([images for seen, _ in found for images in seen]) == by_content(alone)
    torch.testing.assert_close(torch.stack([each for _, each in found]).mean(dim=0), loss)


def failing(forward: Callable[[Tensor], Tensor], at: int) -> Callable[[Tensor], Tensor]:
    """A forward pass whose result is NaN from call `at` on."""
    calls = iter(range(1000))
    return lambda images: forward(images) * (float("nan") if next(calls) >= at else 1.0)


def test_a_step_that_is_not_finite_is_named_and_leaves_the_weights_alone() -> None:
    state = state_of()
    forward = failing(state.model, at=2)
    for _ in range(2):
        advance(state, forward, [batch()], options())
    before = [parameter.clone() for parameter in state.model.parameters()]
    with pytest.raises(NotFiniteError, match="step 3: the loss is nan"):
        advance(state, forward, [batch()], options())
    assert all(torch.equal(left, right) for left, right in zip(before, state.model.parameters(), strict=True))


def test_the_loss_scaler_skips_so_many_steps_and_no_more() -> None:
    state = state_of(Precision.fp16)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=1)
    before = [parameter.clone() for parameter in state.model.parameters()]
    for _ in range(2):
        advance(state, state.model, [batch()], options(Precision.fp16))
    assert state.scaler_skips == 2
    assert all(torch.equal(left, right) for left, right in zip(before, state.model.parameters(), strict=True))
    with pytest.raises(NotFiniteError, match=r"3 steps in a row.*trainer\.max_scaler_skips=2"):
        advance(state, state.model, [batch()], options(Precision.fp16))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("mixes", [False, True])
def test_the_cross_entropy_has_no_smoothing(smoothing: float, mixes: bool) -> None:
    """The oracle is the mixture of the two classes' log-likelihoods, with the share that mixup drew."""
    mixup = Mixup(0.8, 0.0, label_smoothing=smoothing, num_classes=3) if mixes else None
    state, images = state_of(lr=0), batch()
    seen: list[Tensor] = []

    def forward(pictures: Tensor) -> Tensor:
        seen.append(logits := state.model(pictures))
        return logits

    found = advance(state, forward, [images], options(label_smoothing=smoothing, mixup=mixup))
    likelihoods = -seen[0].detach().log_softmax(dim=1)
    share = 1.0
    if mixes:
        with seeded(derive_seed("mixup", 0, 0, 0, 0)):
            share = Mixup(0.8, 0.0, label_smoothing=0.0, num_classes=3)._params_per_batch()[0]
        assert 0 < share < 1
    rows = torch.arange(len(images.targets))
    first, second = likelihoods[rows, images.targets], likelihoods[rows, images.targets.flip(0)]
    expected = (share * first + (1 - share) * second).mean()
    torch.testing.assert_close(found.cross_entropy, expected)
    uniform = likelihoods.mean()
    torch.testing.assert_close(found.loss, (1 - smoothing) * expected + smoothing * uniform)


def test_channels_last_images_give_the_same_step() -> None:
    losses: list[float] = []
    for channels_last in (False, True):
        state, seen = state_of(stem="cnn"), list[Tensor]()

        def forward(images: Tensor, model: DeepViT = state.model, seen: list[Tensor] = seen) -> Tensor:
            seen.append(images)
            return model(images)

        losses.append(advance(state, forward, [batch()], options(channels_last=channels_last)).loss.item())
        assert seen[0].is_contiguous(memory_format=torch.channels_last) == channels_last
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
