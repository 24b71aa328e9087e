"""Train, and die by SIGKILL at a given moment of a save: kill_driver.py MOMENT OVERRIDES...

The moment is a number: the how-manieth file operation of checkpoints does not return.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

import safetensors.torch

from deepvit_train import checkpoint
from deepvit_train.cli import main


def _dying(moment: int) -> None:
    """Count the operations that a save is made of, and kill this process before the given one."""
    done = 0

    def counted(operation):
        def before(*arguments, **options):
            nonlocal done
            done += 1
            if done == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(*arguments, **options)

        return before

    checkpoint.save_file = counted(safetensors.torch.save_file)
    checkpoint._write_json = counted(checkpoint._write_json)
    checkpoint._digest = counted(checkpoint._digest)
    checkpoint._flush_folder = counted(checkpoint._flush_folder)
    for name in ("rename", "replace", "symlink_to", "mkdir"):
        setattr(Path, name, counted(getattr(Path, name)))
    shutil.rmtree = counted(shutil.rmtree)


if __name__ == "__main__":
    _dying(int(sys.argv[1]))
    main(["train", *sys.argv[2:]])
