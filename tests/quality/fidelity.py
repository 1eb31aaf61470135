"""Other tools' functions, and torch-fidelity's Inception with random weights: without torchvision, their import."""

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from unittest import mock

import torch
from sklearn.datasets import load_sample_images
from torch import nn

OTHERS = ("torch_fidelity", "pytorch_fid")
USED = {
    "torchvision.datasets": ("CIFAR10", "STL10", "CIFAR100"),
    "torchvision.transforms": ("Compose",),
    "torchvision.transforms.functional": (),
    "torchvision.models": (),
    "torchvision.models.inception": ("InceptionA", "InceptionC", "InceptionE"),
}


@contextmanager
def a_bare_torchvision() -> Iterator[None]:
    """Only while torch-fidelity is imported: later a package that looks for torchvision must find none."""
    stubs = {"torchvision": ModuleType("torchvision")}
    for name, classes in USED.items():
        stubs[name] = ModuleType(name)
        setattr(stubs[name.rpartition(".")[0]], name.rpartition(".")[2], stubs[name])
        for each in classes:
            setattr(stubs[name], each, type(each, (), {}))
    with mock.patch.dict(sys.modules, stubs):
        yield
        kept = {name: module for name, module in sys.modules.items() if name.startswith(OTHERS)}
    sys.modules.update(kept)


with a_bare_torchvision():
    from pytorch_fid import fid_score
    from torch_fidelity import calculate_metrics, metric_fid, metric_isc, metric_kid, metric_prc
    from torch_fidelity import feature_extractor_inceptionv3 as theirs
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from torchmetrics.image import fid  # noqa: E402, which finds torch-fidelity imported

distance_of_torchmetrics, distance_of_pytorch_fid = fid._compute_fid, fid_score.calculate_frechet_distance
statistics_of_fidelity = metric_fid.fid_features_to_statistics
distance_of_fidelity = metric_fid.fid_statistics_to_metric
score_of_fidelity, kernel_of_fidelity = metric_isc.isc_features_to_metric, metric_kid.kid_features_to_metric
precision_of_fidelity = metric_prc.prc_features_to_metric
resize_of_tensorflow = interpolate_bilinear_2d_like_tensorflow1x


@cache
def pictures(count: int = 4, size: int = 32) -> torch.Tensor:
    """uint8 [count, 3, size, size]: parts of two photographs, which are much less alike than noise is."""
    china, flower = (torch.from_numpy(image.copy()).permute(2, 0, 1) for image in load_sample_images().images)
    places = [(china, 40, 60), (flower, 150, 250), (china, 250, 300), (flower, 20, 20), (china, 120, 420)]
    return torch.stack([image[:, y : y + size, x : x + size] for image, y, x in places[:count]])


def photographs(count: int, size: int = 32) -> torch.Tensor:
    """uint8 [count, 3, size, size]: as many random parts of the two photographs."""
    images = [torch.from_numpy(image.copy()).permute(2, 0, 1) for image in load_sample_images().images]
    generator, parts = torch.Generator().manual_seed(0), []
    for i in range(count):
        image = images[i % 2]
        y, x = (int(torch.randint(side - size, (1,), generator=generator)) for side in image.shape[1:])
        parts.append(image[:, y : y + size, x : x + size])
    return torch.stack(parts)


def metrics_of_fidelity(samples: torch.Tensor, data: torch.Tensor) -> dict[str, float]:
    """What torch-fidelity says of two sets of uint8 images, with the random weights."""
    with tempfile.TemporaryDirectory() as folder:
        weights = f"{folder}/weights.pth"
        torch.save(random_inception().state_dict(), weights)
        return calculate_metrics(
            input1=_Images(samples), input2=_Images(data), fid=True, isc=True, kid=True,
            kid_subset_size=min(100, len(samples), len(data)),
            feature_extractor_weights_path=weights, cuda=False, cache=False, save_cpu_ram=True, verbose=False,
        )  # fmt: skip


class _Images(torch.utils.data.Dataset):
    def __init__(self, images: torch.Tensor):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.images[i]


@cache
def random_inception() -> nn.Module:
    """Weights of the size of trained ones: each layer keeps the spread of what it gets, as batch-norm saw to."""
    with mock.patch.object(theirs, "load_state_dict_from_url"), mock.patch.object(nn.Module, "load_state_dict"):
        network = theirs.FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased", "logits"])
    generator = torch.Generator().manual_seed(0)

    def draw(norm: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        std, mean = torch.std_mean(inputs[0])
        one, two, three, four = torch.rand(4, inputs[0].shape[1], generator=generator)
        norm.running_var.copy_(std**2 * (0.5 + one))
        norm.running_mean.copy_(mean + std * (two - 0.5))
        norm.weight.copy_(0.5 + three)
        norm.bias.copy_(four - 0.5)

    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            layer.weight.data.normal_(0, (2 / layer.weight[0].numel()) ** 0.5, generator=generator)
    hooks = [m.register_forward_pre_hook(draw) for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        network.fc.weight.normal_(0, 0.03, generator=generator)
        network.fc.bias.normal_(0, 0.3, generator=generator)
        network(pictures())
    for hook in hooks:
        hook.remove()
    return network
