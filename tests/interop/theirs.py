"""Small models as diffusers itself makes and writes them."""

import diffusers
import torch

WEIGHTS = "diffusion_pytorch_model"


def network(channels=3, **more):
    return diffusers.UNet2DModel(
        sample_size=8,
        in_channels=channels,
        out_channels=more.pop("out_channels", channels),
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        **more,
    )


def pipeline(path):
    """A pipeline of a cosine table and v."""
    scheduler = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    diffusers.DDPMPipeline(network(), scheduler).save_pretrained(path)
    return path


def variants(path, *names):
    model = diffusers.UNet2DModel.from_pretrained(path)
    for file in path.glob(f"{WEIGHTS}*"):
        file.unlink()
    for value, name in enumerate(names):
        torch.nn.init.constant_(model.conv_in.bias, float(value))
        model.save_pretrained(path, variant=name)
