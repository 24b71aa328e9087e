"""What a run logs, and the trackers that it goes to. A tracker that fails costs no step of the training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from torchvision.utils import make_grid

from deepvit_train.config.train import TrackerName
from deepvit_train.error import OutputError
from deepvit_train.run.curves import MetricsFile, TensorBoard
from deepvit_train.run.elsewhere import Elsewhere, open_tracker


class Tracker:
    """Logs scalars, texts and images: to metrics.jsonl, TensorBoard, and each further tracker that is named.

    On a resume it first removes what was logged after the step to go on from. Without a folder it logs
    nothing: only the first rank has one.

    Where the run's own curves can't be written, the error is kept in `failure` and nothing more is logged, so
    that the state can be saved before the run ends. Where another tracker fails, it is left out from then on.

    Args:
        evaluated: whether that step's evaluation is a part of what the run goes on from. If not, a kill came
            after its metrics were logged and before they were saved, and they will be logged again.
        check: raises OutputError where the folder may not be written any more. Called before every write.
        others: names of the trackers besides.
        run: the run's number, by which a tracker elsewhere knows it again.
        say: prints a line.
    """

    def __init__(
        self,
        folder: Path | None,
        resumed_step: int,
        evaluated: bool = True,
        check: Callable[[], None] = lambda: None,
        others: Sequence[TrackerName] = (),
        run: str = "",
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.failure: OutputError | None = None
        self._folder = folder
        self._check = check
        self._say = say
        self._others: dict[TrackerName, Elsewhere] = {}
        if folder is None:
            return
        kept = resumed_step or -1  # a run that begins anew logs step 0 anew
        self._write(check, lambda: self._open(folder, kept, evaluated))
        self.raise_failure()
        for name in dict.fromkeys(others):
            if name != TrackerName.tensorboard:
                with self._trying(name):
                    self._others[name] = open_tracker(name, folder, run, kept, evaluated)

    def _open(self, folder: Path, kept: int, evaluated: bool) -> None:
        self._file = MetricsFile(folder, kept, evaluated)
        try:
            self._board = TensorBoard(folder, kept)
        except BaseException:
            self._file.close()
            raise

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Log scalars by their TensorBoard names: {'train/loss': 1.2}."""
        if self._logs:
            both = (lambda: self._file.scalars(step, values), lambda: self._board.scalars(step, values))
            self._write(self._check, *both)
            self._tell(lambda other: other.scalars(step, values))

    def text(self, name: str, text: str, step: int) -> None:
        """Log preformatted text."""
        if self._logs:
            self._write(self._check, lambda: self._board.text(name, text, step))

    def images(self, name: str, images: Tensor, step: int) -> None:
        """Log images (B, 3, height, width) with values in 0..1 as a grid."""
        if self._logs:
            grid = make_grid(images, nrow=math.ceil(len(images) ** 0.5))
            self._write(self._check, lambda: self._board.image(name, grid, step))
            self._tell(lambda other: other.image(name, grid, step))

    def configuration(self, config: dict[str, Any]) -> None:
        """Tell trackers elsewhere the configuration, with dotted keys. TensorBoard learns it at the end."""
        if self._logs:
            self._tell(lambda other: other.configuration(config))

    def outcome(
        self, config: dict[str, Any], notable: set[str], metrics: dict[str, float], step: int
    ) -> None:
        """Log hyperparameters with the final metrics, for TensorBoard's table of runs.

        Args:
            notable: the keys that come first.
        """
        if self._logs:
            self._write(self._check, lambda: self._board.outcome(config, notable, metrics, step))

    def close(self) -> None:
        """Write what is still buffered, and close the files. Raises OutputError where that fails."""
        if self._folder is not None:
            before = self.failure
            self._write(self._file.close)
            self._write(self._board.close)
            self._tell(lambda other: other.close())
            if self.failure is not before:
                self.raise_failure()

    def raise_failure(self) -> None:
        """Raise OutputError if curves could not be written."""
        if self.failure is not None:
            raise self.failure

    @property
    def _logs(self) -> bool:
        return self._folder is not None and self.failure is None

    def _write(self, *actions: Callable[[], None]) -> None:
        """Do what writes the run's own curves, and keep its error."""
        try:
            for act in actions:
                act()
        except OutputError as error:
            self.failure = error
        except OSError as error:
            self.failure = OutputError(
                f"{self._folder}: curves and metrics can't be written ({error.strerror})"
            )

    def _tell(self, log: Callable[[Elsewhere], None]) -> None:
        for name, other in list(self._others.items()):
            with self._trying(name):
                log(other)

    @contextmanager
    def _trying(self, name: TrackerName) -> Iterator[None]:
        """Leave a tracker out, with a warning, if it fails: it may be another host's fault."""
        try:
            yield
        except Exception as error:
            self._others.pop(name, None)
            reason = str(error).strip().splitlines() or [type(error).__name__]
            self._say(f"warning: tracker={name} failed and is left out from now on: {reason[0]}")
