"""Write a model as ONNX or as a torch.export archive, with its description inside."""

from __future__ import annotations

import importlib.util
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from deepvit_train.commands.export_model import plain_model, traced
from deepvit_train.config.export import NumberType
from deepvit_train.error import ConfigError
from deepvit_train.models import DeepViT

NEEDED = ("onnx", "onnxscript", "onnxruntime")
INSTALL = "pip install 'deepvit-train[export]'"
DESCRIPTION = "deepvit_train"  # the key of the description in a file's metadata
OPSET = 20  # ONNX Runtime reads it since 1.17, of 2024


def check_onnx() -> None:
    """Raise ConfigError that says how to install what is missing to write and to read ONNX."""
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise ConfigError(
            f"format=onnx needs {', '.join(missing)}: {INSTALL}; or format=pt2, which needs torch alone"
        )


def write_pt2(model: DeepViT, description: dict[str, Any], file: Path) -> None:
    """Write what torch.export.load reads without this project. Its extra file model.json says what it is."""
    with _quiet():
        torch.export.save(
            traced(plain_model(model)), file, extra_files={"model.json": json.dumps(description)}
        )


def write_onnx(model: DeepViT, description: dict[str, Any], numbers: NumberType, file: Path) -> None:
    """Write an ONNX file from 'images' to 'logits', for any batch size. Its metadata hold the description."""
    import onnx

    with _quiet():
        exported = torch.onnx.export(
            traced(plain_model(model)),
            dynamo=True,
            opset_version=OPSET,
            input_names=["images"],
            output_names=["logits"],
            verbose=False,
        )
        assert exported is not None
        whole = exported.model_proto
        _name_batch(whole)
        if numbers == NumberType.fp16:
            whole = _halved(whole)
        if numbers == NumberType.int8:
            whole = _quantised(whole, file.with_suffix(".fp32.onnx"), file)
    for node in whole.graph.node:
        del node.metadata_props[:]
    onnx.helper.set_model_props(whole, {DESCRIPTION: json.dumps(description)})
    onnx.checker.check_model(whole)
    onnx.save(whole, file)


def _name_batch(whole: Any) -> None:
    """Call the first dimension of input and output 'batch'."""
    for value in (*whole.graph.input, *whole.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"


def _halved(whole: Any) -> Any:
    """Return the model in fp16, with inputs and outputs in fp32."""
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    halved = OnnxModel(convert_float_to_float16(whole, keep_io_types=True))
    halved.topological_sort()  # the converter puts its casts of the input last
    return halved.model


def _quantised(whole: Any, single: Path, file: Path) -> Any:
    """Return the model with the weights of its linear layers in 8 bits, a scale for each output."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    del whole.graph.value_info[:]  # onnxruntime 1.22 finds torch's shapes at odds with its own
    onnx.save(whole, single)
    try:
        quantize_dynamic(
            single,
            file,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            weight_type=QuantType.QInt8,
        )
    finally:
        single.unlink()
    return onnx.load(file)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' warnings and advice to themselves: the check that follows tells what matters."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
