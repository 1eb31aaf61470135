"""DINOv2's ViT-L/14 (Oquab et al. 2023) by way of transformers (extra `dinov2`), from a local folder.

The features are those of Stein et al. 2023, "Exposing flaws of generative model evaluation metrics", and of their tool
dgm-eval: the class token behind the last layer norm, of 8-bit pictures of 224 pixels that Pillow has resized.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn.functional import interpolate

from undiffuse.errors import Corrupt, UsageError
from undiffuse.quality.feature.base import Extractor, FeatureExtractor, hash_of_file
from undiffuse.quality.feature.resize import RESIZES, Resize, text
from undiffuse.quality.metric.base import Features
from undiffuse.strict import extra

FILES = ("config.json", "model.safetensors")
SIZE = (224, 224)
LARGE = (1024, 24, 14)  # width, layers and pixels of a patch of ViT-L/14
OFFSET = 0.1  # that DINOv2's own code adds to the number of patches where it stretches the position embeddings
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, for values from 0 to 1


@dataclass(frozen=True)
class Dinov2(FeatureExtractor):
    """`weights` is a folder with `config.json` and `model.safetensors`, as the hub has them; nothing is downloaded."""

    weights: str | None = None
    resize: Resize = "pil-uint8"

    title: ClassVar[str] = "FD-DINOv2"

    def open(self, device: torch.device) -> Extractor:
        folder = _folder(self.weights)
        network, shape = _network(folder)
        network.to(device)
        # Another size has another name, because only distances of the large one are called FD-DINOv2 in print.
        title = self.title if shape == LARGE else f"{self.title}-{shape[0]}x{shape[1]}"
        mean, std = (torch.tensor(each, dtype=torch.float32, device=device).view(3, 1, 1) * 255 for each in (MEAN, STD))

        def features(images: UInt8[Tensor, "b 3 h w"]) -> Features:
            pictures = (RESIZES[self.resize](images, SIZE) - mean) / std
            return Features(network(pixel_values=pictures).last_hidden_state[:, 0])

        sha256, resize = hash_of_file(folder / FILES[1]), text(self.resize, SIZE)
        return Extractor("dinov2", title, sha256, resize, SIZE, 3, {"pool": shape[0]}, features, device)


def _folder(given: str | None) -> Path:
    """The folder, with both files in it. Raises UsageError, and Corrupt where there is a pickle instead."""
    ask = f"give --feature-weights, a folder with {FILES[0]} and {FILES[1]} of DINOv2 ViT-L/14 (facebook/dinov2-large)"
    if given is None:
        raise UsageError(f"features dinov2 need weights, which are not downloaded; {ask}")
    folder = Path(given)
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder; {ask}")
    missing = [name for name in FILES if not (folder / name).is_file()]
    if FILES[1] in missing and any(folder.glob("*.bin")):
        raise Corrupt(f"{folder} has its weights in a pickle, which can run code when it is read; {ask}")
    if missing:
        raise UsageError(f"{folder} has no {' and no '.join(missing)}; {ask}")
    return folder


def _network(folder: Path) -> tuple[nn.Module, tuple[int, int, int]]:
    """The network, and its width, layers and pixels of a patch. Raises Corrupt for files of another one."""
    transformers = extra("transformers", "dinov2", "DINOv2")
    with _quiet(transformers):
        try:
            network, report = transformers.Dinov2Model.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
            )
        except MemoryError:
            raise
        except Exception as error:  # of a damaged folder transformers makes errors of any kind, over many lines
            raise Corrupt(f"{folder} cannot be read as DINOv2: {str(error).splitlines()[0]}") from error
    wrong = sorted(str(name) for kind in ("missing_keys", "mismatched_keys") for name in report[kind])
    if network.config.model_type != "dinov2" or wrong:
        what = f"is a {network.config.model_type}" if network.config.model_type != "dinov2" else f"lacks {wrong[0]}"
        raise Corrupt(f"{folder} {what}, so it is no DINOv2; give the folder of facebook/dinov2-large")
    config = network.config
    _stretch(network.embeddings, SIZE[0] // config.patch_size)
    return network.eval().requires_grad_(False), (config.hidden_size, config.num_hidden_layers, config.patch_size)


def _stretch(embeddings: Any, patches: int) -> None:
    """Position embeddings for so many patches a side, once and as DINOv2's own code does; transformers differs."""
    given: Float[Tensor, "1 n d"] = embeddings.position_embeddings.detach()
    side = round((given.shape[1] - 1) ** 0.5)
    if side == patches:
        return
    grid = given[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    scale = (patches + OFFSET) / side
    grid = interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
    embeddings.position_embeddings = nn.Parameter(torch.cat([given[:, :1], grid.flatten(2).transpose(1, 2)], 1))


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without progress bars and without reports that this file reads itself."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
