"""denoising-diffusion-pytorch trained on Fashion-MNIST by the clock, for `bench/time_to_quality.py`.

    PEER/bin/python bench/peer_training.py IMAGES.npy OUT MINUTES [MINUTES ...]

Its README's settings: batches of 32, two for each update, Adam at 8e-5, EMA of 0.995 every 10 updates; dim 32 with
multipliers 1, 2, 4; bf16 autocast. At each of the given minutes the averaged network is kept; from each of these it
then draws 2,000 images by its own DDIM of 30 steps (eta 0) into OUT/MINUTES.npz, the last first. What is there is not
done again.
"""

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contenders import without_torchvision
from torch import nn

BATCH, ACCUMULATE, COUNT = 32, 2, 2000


def main() -> None:
    without_torchvision()
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet

    images = torch.from_numpy(np.load(sys.argv[1]))[:, None]
    out, minutes = Path(sys.argv[2]), sorted(map(float, sys.argv[3:]))
    torch.manual_seed(0)
    network = Unet(dim=32, dim_mults=(1, 2, 4), channels=1)
    diffusion = GaussianDiffusion(network, image_size=28, timesteps=1000, sampling_timesteps=30)
    snapshots = [out / f"{minute:g}.pt" for minute in minutes]
    if not all(path.exists() for path in snapshots):
        train(diffusion, images, list(zip(minutes, snapshots, strict=True)))
    for path in reversed(snapshots):
        if not path.with_suffix(".npz").exists():
            draw(diffusion, path)


def train(diffusion: nn.Module, images: torch.Tensor, snapshots: list[tuple[float, Path]]) -> None:
    from ema_pytorch import EMA

    adam = torch.optim.Adam(diffusion.parameters(), lr=8e-5, betas=(0.9, 0.99))
    average, seen, started = EMA(diffusion, beta=0.995, update_every=10), 0, time.perf_counter()
    order = torch.randperm(len(images))
    while snapshots:
        for _ in range(ACCUMULATE):
            if seen % len(images) + BATCH > len(images):
                order = torch.randperm(len(images))
            rows = order[seen % len(images) :][:BATCH]
            with torch.autocast("cpu", torch.bfloat16):
                loss = diffusion(images[rows].float() / 255) / ACCUMULATE
            loss.backward()
            seen += len(rows)
        torch.nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
        adam.step()
        adam.zero_grad()
        average.update()
        seconds = time.perf_counter() - started
        if seconds / 60 >= snapshots[0][0]:
            path = snapshots.pop(0)[1]
            torch.save({"network": average.ema_model.state_dict(), "seen": seen, "seconds": seconds}, path)
            print(f"{path.name}: {seen} images in {seconds:.0f} s", flush=True)


@torch.no_grad()
def draw(diffusion: Any, path: Path) -> None:
    snapshot = torch.load(path)
    diffusion.load_state_dict(snapshot.pop("network"))
    diffusion.eval()
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        drawn = torch.cat([diffusion.sample(batch_size=50) for _ in range(COUNT // 50)]).float()
    np.savez(path.with_suffix(".npz"), images=(drawn * 255).round().to(torch.uint8)[:, 0].numpy(), **snapshot)


if __name__ == "__main__":
    main()
