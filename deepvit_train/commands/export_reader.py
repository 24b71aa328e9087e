"""Run an exported file without this project, and write its logits. This file is run alone, never imported.

    python -P export_reader.py FORMAT FILE IMAGES LOGITS BATCH_SIZE THREADS

IMAGES holds normalised pixels, (images, C, height, width) float32, and LOGITS gets (images, classes) float32.
Importing what the file must do without is an error. The last line on stdout is a JSON object.
"""

import json
import sys
import time
from importlib.abc import MetaPathFinder

import numpy as np

WITHOUT = {
    "onnx": ("deepvit_train", "torch", "torchvision", "timm"),
    "pt2": ("deepvit_train", "torchvision", "timm", "einops"),
    "timm": ("deepvit_train",),
}


class Refusal(MetaPathFinder):
    """Lets no package of these names be imported."""

    def __init__(self, names):
        self.names = names

    def find_spec(self, fullname, path=None, target=None):
        """Raise ImportError for a package of these names, and leave others to the finders after this one."""
        if fullname.partition(".")[0] in self.names:
            raise ImportError(f"{fullname} is not to be had here")


def onnx_runner(file, threads):
    """Return the program's name and what runs a batch, by ONNX Runtime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return f"onnxruntime {onnxruntime.__version__}", lambda batch: session.run(None, {"images": batch})[0]


def pt2_runner(file, threads):
    """Return the program's name and what runs a batch, by torch alone."""
    import torch

    torch.set_num_threads(threads)
    model = torch.export.load(file).module()
    return f"torch {torch.__version__}", _by_torch(torch, model)


def timm_runner(folder, threads):
    """Return the program's name and what runs a batch, by timm."""
    import timm
    import torch

    torch.set_num_threads(threads)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    return f"timm {timm.__version__}", _by_torch(torch, model)


def _by_torch(torch, model):
    def run(batch):
        with torch.no_grad():
            return model(torch.from_numpy(batch)).numpy()

    return run


def main(form, file, images, logits, batch_size, threads):
    """Run all images, one of them alone first: the file must take any batch size."""
    sys.meta_path.insert(0, Refusal(WITHOUT[form]))
    runner = {"onnx": onnx_runner, "pt2": pt2_runner, "timm": timm_runner}[form]
    program, run = runner(file, int(threads))
    pixels = np.load(images, mmap_mode="r")
    batches = range(0, len(pixels), int(batch_size))
    alone = run(np.array(pixels[:1]))
    run(np.array(pixels[: int(batch_size)]))
    found, seconds = [], 0.0
    for start in batches:
        batch = np.array(pixels[start : start + int(batch_size)])
        began = time.perf_counter()
        found.append(run(batch))
        seconds += time.perf_counter() - began
    np.save(logits, np.concatenate(found).astype(np.float32))
    alone_differs = float(np.abs(alone[0] - found[0][0]).max())
    print(json.dumps({"program": program, "seconds": seconds, "alone_differs": alone_differs}))


if __name__ == "__main__":
    main(*sys.argv[1:])
