"""One contender of `bench/speed.py` in a process of its own, so that each may live in its own environment.

    python bench/contenders.py '{"name": "ours", "task": "cifar10", "batch": 32, "options": ["bf16"]}'

Answers a JSON line: its size in FLOPs an image and its versions, after two steps that do not count. Then, for each line
it reads, it does one step (or, with the option "forward", one evaluation) and answers how many seconds that took.
"""

import json
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

SHAPES = {"cifar10": (3, 32), "small": (1, 28)}  # channels, side
RECIPES = {"cifar10": "cifar10", "small": str(Path(__file__).with_name("small.toml"))}
Step = Callable[[], object]
KEPT: list[torch.library.Library] = []


def pictures(task: str, count: int) -> torch.Tensor:
    channels, side = SHAPES[task]
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, channels, side, side), dtype=torch.uint8, generator=generator)


def flops(network: Callable[[torch.Tensor, torch.Tensor], object], shape: tuple[int, int]) -> int:
    """Of one image, forward."""
    channels, side = shape
    # The processor's fused attention is not among the operators that are counted; its plain form is.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, channels, side, side), torch.zeros(1))
    return counter.get_total_flops()


def without_torchvision() -> None:
    """torchvision has no CPU build. Nothing of it is called, but to import it takes these operators."""
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    KEPT.append(library)  # what it defines goes with it


def where(options: list[str]) -> str:
    return "cuda" if "cuda" in options else "cpu"


def layout(options: list[str]) -> torch.memory_format:
    return torch.channels_last if "channels_last" in options else torch.contiguous_format


def ours(task: str, batch: int, options: list[str]) -> tuple[Step, int, list[str]]:
    """A step of `undiffuse train` as the command makes it: keyed noise, clipping, Adam, EMA, checks for NaN."""
    from undiffuse.data.source import ArraySource
    from undiffuse.model.recipe import load_recipe
    from undiffuse.training.plan import forward_flops
    from undiffuse.training.trainer import Trainer

    settings = [f"train.batch={batch}", f"train.precision={'bf16' if 'bf16' in options else 'float32'}"]
    settings += [f"train.{name}=true" for name in ("compile", "channels_last") if name in options]
    recipe = load_recipe(RECIPES[task], settings)
    channels, side = SHAPES[task]
    config = recipe.model((channels, side, side))
    device = where(options)
    trainer = Trainer(recipe, config, ArraySource(pictures(task, 8 * batch)), device)
    if "forward" in options:
        network, x = trainer.denoiser.network.eval(), torch.randn(batch, channels, side, side, device=device)
        time_ = torch.rand(batch, device=device)

        @torch.no_grad()
        def forward() -> None:
            with torch.autocast(where(options), torch.bfloat16, enabled="bf16" in options):
                network(x, 1000 * time_)

        return forward, forward_flops(config), ["undiffuse"]
    return lambda: trainer.update(recipe.train.steps), forward_flops(config), ["undiffuse"]


def diffusers(task: str, batch: int, options: list[str]) -> tuple[Step, int, list[str]]:
    """UNet2DModel of the shape of our preset's network, in diffusers' own example of a training loop, with its EMA.

    Squares of pixels are folded into channels before it where that network does so.
    """
    from diffusers import DDPMScheduler, UNet2DModel
    from diffusers.training_utils import EMAModel

    from undiffuse.model.recipe import load_recipe
    from undiffuse.network.unet import UNet

    warnings.simplefilter("ignore")
    shape, (channels, side) = load_recipe(RECIPES[task]).network, SHAPES[task]
    assert isinstance(shape, UNet)
    patch, levels = shape.patch, range(len(shape.multipliers))
    net = UNet2DModel(
        sample_size=side // patch,
        in_channels=channels * patch**2,
        out_channels=channels * patch**2,
        block_out_channels=tuple(shape.channels * m for m in shape.multipliers),
        layers_per_block=shape.blocks,
        down_block_types=tuple("AttnDownBlock2D" if i in shape.attention else "DownBlock2D" for i in levels),
        up_block_types=tuple("AttnUpBlock2D" if i in shape.attention else "UpBlock2D" for i in reversed(levels)),
        attention_head_dim=None,
        dropout=shape.dropout,
        norm_num_groups=shape.norm_groups(),
    ).to(memory_format=layout(options))
    count = flops(lambda x, t: net(F.pixel_unshuffle(x, patch), t), SHAPES[task])
    net.to(where(options))
    called = torch.compile(net) if "compile" in options else net
    adam = torch.optim.AdamW(net.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6)
    average = EMAModel(net.parameters(), use_ema_warmup=True)
    scheduler, images = DDPMScheduler(), pictures(task, batch).to(where(options))

    def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        x = F.pixel_unshuffle(x, patch).contiguous(memory_format=layout(options))
        with torch.autocast(where(options), torch.bfloat16, enabled="bf16" in options):
            return F.pixel_shuffle(called(x, t).sample, patch)

    def step() -> None:
        x_0 = images.float() / 127.5 - 1
        noise, t = torch.randn_like(x_0), torch.randint(1000, (batch,), device=x_0.device)
        loss = F.mse_loss(predict(scheduler.add_noise(x_0, noise, t), t).float(), noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        adam.step()
        adam.zero_grad()
        average.step(net.parameters())
        loss.item()

    @torch.no_grad()
    def forward() -> None:
        predict(images.float() / 127.5 - 1, torch.zeros(batch, dtype=torch.int64, device=images.device))

    if "forward" in options:
        net.eval()
    return forward if "forward" in options else step, count, ["diffusers"]


def denoising_diffusion_pytorch(task: str, batch: int, options: list[str]) -> tuple[Step, int, list[str]]:
    """Its U-Net of dim 32 with multipliers 1, 2, 4, its loss and, as its Trainer, Adam, clipping and EMA every 10."""
    without_torchvision()
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet
    from ema_pytorch import EMA

    channels, side = SHAPES[task]
    net = Unet(dim=32, dim_mults=(1, 2, 4), channels=channels)
    net.to(memory_format=layout(options))
    count = flops(net, SHAPES[task])
    net.to(where(options))
    if "compile" in options:
        net.compile()
    diffusion = GaussianDiffusion(net, image_size=side).to(where(options))
    adam = torch.optim.Adam(diffusion.parameters(), lr=8e-5, betas=(0.9, 0.99))
    average, images = EMA(diffusion, beta=0.995, update_every=10), pictures(task, batch).to(where(options))

    def step() -> None:
        x_0 = (images.float() / 255).contiguous(memory_format=layout(options))
        with torch.autocast(where(options), torch.bfloat16, enabled="bf16" in options):
            loss = diffusion(x_0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
        adam.step()
        adam.zero_grad()
        average.update()
        loss.item()

    return step, count, ["denoising-diffusion-pytorch", "ema-pytorch"]


def convolution(task: str, batch: int, options: list[str]) -> tuple[Step, int, list[str]]:
    """The machine's rate: one bf16 3×3 convolution of 256 channels at 16×16, ten times."""
    x = torch.randn(batch, 256, 16, 16, dtype=torch.bfloat16, device=where(options))
    w = torch.randn(256, 256, 3, 3, dtype=torch.bfloat16, device=where(options))

    @torch.no_grad()
    def step() -> None:
        for _ in range(10):
            F.conv2d(x, w, padding=1)

    return step, 10 * 2 * 9 * 256**2 * 16**2, []  # FLOPs of an image of the batch


CONTENDERS = {f.__name__: f for f in (ours, diffusers, denoising_diffusion_pytorch, convolution)}


def main() -> None:
    given = json.loads(sys.argv[1])
    torch.manual_seed(0)
    started = time.perf_counter()
    step, count, packages = CONTENDERS[given["name"]](given["task"], given["batch"], given["options"])
    step()
    first = time.perf_counter() - started
    step()
    found = {name: version(name) for name in ["torch", *packages]}
    print(json.dumps({"flops": count, "first_seconds": round(first, 1), "versions": found}), flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        step()
        if "cuda" in given["options"]:
            torch.cuda.synchronize()
        print(time.perf_counter() - started, flush=True)


if __name__ == "__main__":
    main()
