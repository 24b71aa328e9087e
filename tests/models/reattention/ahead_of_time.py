"""Compile the GPU kernels of a call for a GPU that is not here, and read what they need of it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.float64: "*fp64"}
OPTIONS = ("num_warps", "num_stages")
WARP = 32  # threads


@dataclass(frozen=True)
class Need:
    """What a program of a kernel takes of a streaming multiprocessor."""

    registers: int  # of a thread
    threads: int
    shared_bytes: int
    spills: int  # instructions that move registers to memory of the thread, or back


class Launch:
    """A launch of a kernel, specialised as Triton would: launches that are equal compile to the same code."""

    def __init__(self, kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
        self.kernel = kernel
        self.options = {name: value for name, value in constants.items() if name in OPTIONS}
        self.constants = {name: value for name, value in constants.items() if name not in OPTIONS}
        self.types: dict[str, str] = {}
        self.divisible: list[int] = []  # numbers of the arguments that are multiples of 16
        names = [name for name in kernel.arg_names if name not in self.constants]
        for name, value in zip(names, arguments, strict=True):
            fixed = name in (kernel.do_not_specialize or ())
            if isinstance(value, Tensor):
                self.types[name] = TYPES[value.dtype]
                self.divisible.append(kernel.arg_names.index(name))
            elif isinstance(value, float):
                self.types[name] = "fp32"
            elif value == 1 and not fixed:
                self.constants[name] = 1
            else:
                self.types[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                if value % 16 == 0 and not fixed:
                    self.divisible.append(kernel.arg_names.index(name))

    @property
    def key(self) -> Hashable:
        """Equal for launches of the same code."""
        parts = (self.options, self.constants, self.types)
        return self.kernel.__name__, *self.divisible, *[tuple(sorted(each.items())) for each in parts]

    def __str__(self) -> str:
        values = ", ".join(f"{name}={value}" for name, value in (self.constants | self.options).items())
        return f"{self.kernel.__name__}({values}) of {', '.join(sorted(set(self.types.values())))}"

    def compiled_for(self, capability: int) -> Need:
        """Compile for a compute capability, 90 for sm_90."""
        kernel, types = self.kernel, self.types | dict.fromkeys(self.constants, "constexpr")
        source = ASTSource(
            kernel,
            {name: types[name] for name in kernel.arg_names},
            {(kernel.arg_names.index(name),): value for name, value in self.constants.items()},
            {(number,): [["tt.divisibility", 16]] for number in self.divisible},
        )
        target = GPUTarget("cuda", capability, WARP)
        found: Any = triton.compile(source, target=target, options=self.options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(found.asm["cubin"])
            file.flush()
            usage = _said_by("cuobjdump", "-res-usage", file.name)
            code = _said_by("nvdisasm", "-c", file.name)
        registers = re.search(r"REG:(\d+)", usage)
        assert registers is not None, usage
        # A stack alone is no spill, since a kernel that calls a function has one: so count instructions.
        spills = len(re.findall(r"\b(?:LDL|STL)\b", code))
        metadata = found.metadata
        return Need(int(registers[1]), metadata.num_warps * WARP, metadata.shared, spills)


def _said_by(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout
