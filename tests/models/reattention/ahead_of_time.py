"""Compile the GPU kernels of a call for a GPU that is not here, and read what they need of it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TYPES = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32", "float64": "*fp64"}


@dataclass(frozen=True)
class Need:
    """What a kernel takes of a streaming multiprocessor."""

    registers: int  # of a thread
    spilled_bytes: int  # of a thread
    shared_bytes: int
    warps: int


def compiled_for(capability: int, kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> Need:
    """Compile a launch for a compute capability, 90 for sm_90, specialised as Triton would specialise it."""
    names = [name for name in kernel.arg_names if name not in constants]
    options = {
        name: value for name, value in constants.items() if name in ("num_warps", "num_stages", "maxnreg")
    }
    signature, constexprs = {}, {k: v for k, v in constants.items() if k not in options}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for name, value in zip(names, arguments, strict=True):
        number = kernel.arg_names.index(name)
        fixed = name in (kernel.do_not_specialize or ())
        if isinstance(value, Tensor):
            signature[name] = TYPES[str(value.dtype).removeprefix("torch.")]
            attributes[(number,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1 and not fixed:
            signature[name], constexprs[name] = "constexpr", 1
        else:
            signature[name] = "i64" if name == "seed" else "i32"
            if value % 16 == 0 and not fixed:
                attributes[(number,)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(constexprs, "constexpr")
    signature = {name: signature[name] for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constexprs.items()}
    source = ASTSource(kernel, signature, places, attributes)
    found = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(found.asm["cubin"])
        file.flush()
        said = subprocess.run(
            [CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    registers, stack = (int(re.search(rf"{what}:(\d+)", said.stdout)[1]) for what in ("REG", "STACK"))
    return Need(registers, stack, found.metadata.shared, found.metadata.num_warps)
