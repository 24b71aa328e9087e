"""Draw what a model's class token attends to over the image that the model was given.

Shapes: B batch, S the model's image size.
"""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib
import numpy as np
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from deepvit_train.collapse.gallery import take_pictures
from deepvit_train.config.preprocessing import Preprocessing
from deepvit_train.data.transform import denormalise

SIDE = 224  # pixels; a smaller image is enlarged by a whole number, so that its patches can be told apart
SHARE = 0.5  # of the colours of attention in the overlay


def draw_overlays(model: nn.Module, images: Tensor, preprocessing: Preprocessing) -> list[Image.Image]:
    """Return each image (B, 3, S, S), overlaid with the attention of the last block's class token.

    That are its softmax maps, averaged over heads. The colours (inferno) go from the image's least attended
    patch to its most attended one.
    """
    attention = take_pictures(model, images).attention[-1]
    low, high = attention.amin(dim=(1, 2), keepdim=True), attention.amax(dim=(1, 2), keepdim=True)
    shares = ((attention - low) / (high - low).clamp(min=1e-12))[:, None]
    shares = F.interpolate(shares, size=images.shape[-2:], mode="bilinear")[:, 0]
    colours = matplotlib.colormaps["inferno"](shares.numpy())[..., :3]
    shown = denormalise(images, preprocessing).permute(0, 2, 3, 1).cpu().numpy()
    pixels = (255 * ((1 - SHARE) * shown + SHARE * colours)).round().astype(np.uint8)
    times = max(1, SIDE // pixels.shape[1])
    return [Image.fromarray(each.repeat(times, axis=0).repeat(times, axis=1)) for each in pixels]


def overlay_name(number: int, file: str) -> str:
    """Return the name of an image's overlay: its number in the list, and its own name: 000012_cat.png."""
    own = re.sub(r"[^\w.-]+", "-", Path(file).stem)
    return f"{number:06d}_{own[:50]}.png"
