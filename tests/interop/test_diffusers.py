"""Configs and names of diffusers' folders, on networks small enough to build by the dozen."""

import inspect
import json
import re
from dataclasses import MISSING, fields

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from undiffuse.config import parse, plain
from undiffuse.diffusion.parameterisation import X0, Eps, Lattice, Mu, V
from undiffuse.diffusion.process import Const, Cosine, Linear, Quad, Vdm
from undiffuse.diffusion.reverse import FixedLarge, FixedSmall, Learned, LearnedRange
from undiffuse.errors import Corrupt, StorageError, UsageError
from undiffuse.interop import diffusers as interop
from undiffuse.interop.diffusers_files import is_folder
from undiffuse.machine import disk
from undiffuse.model import load as models
from undiffuse.model.recipe import ModelConfig
from undiffuse.network.unet import UNet

UNET = {
    "_class_name": "UNet2DModel",
    "_diffusers_version": "0.0.4",
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": [32, 64],
    "center_input_sample": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 1,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 8,
    "time_embedding_type": "positional",
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}
SCHEDULER = {
    "_class_name": "DDPMScheduler",
    "_diffusers_version": "0.1.1",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "clip_sample": True,
    "num_train_timesteps": 1000,
    "trained_betas": None,
    "variance_type": "fixed_large",
}
INDEX = {"_class_name": "DDPMPipeline"}
CONFIG = ModelConfig((3, 8, 8), Linear(), Eps(), FixedLarge(), UNet(32, (1, 2), 1, (1,), groups=32))
LEFT_OUT = object()
WEIGHTS = "diffusion_pytorch_model"
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def public(config):
    return {name: value for name, value in config.items() if not name.startswith("_")}


@pytest.fixture(scope="module")
def weights():
    """Of diffusers' own network, each tensor with values that no other has."""
    network = diffusers.UNet2DModel(**public(UNET))
    return {name: torch.randn_like(tensor) for name, tensor in network.state_dict().items()}


def write(path, weights=None, unet=UNET, scheduler=SCHEDULER, layout="folders"):
    """A folder in one of the three layouts."""
    unet_folder = path / "unet" if layout == "folders" else path
    scheduler_folder = path / "scheduler" if layout == "folders" else path
    for folder in (unet_folder, scheduler_folder):
        folder.mkdir(parents=True, exist_ok=True)
    (unet_folder / "config.json").write_text(json.dumps(unet))
    if layout != "bare":
        (scheduler_folder / "scheduler_config.json").write_text(json.dumps(scheduler))
        (path / "model_index.json").write_text(json.dumps(INDEX))
    if weights is not None:
        save_file(weights, unet_folder / f"{WEIGHTS}.safetensors")
    return path


def changed(config, field, value):
    return {name: each for name, each in {**config, field: value}.items() if each is not LEFT_OUT}


def read_config(path) -> ModelConfig:
    return parse(ModelConfig, interop.read_folder(path)[1]["model"], str(path))


def export(path, config: ModelConfig, tensors=None):
    if tensors is None:
        tensors = config.build(clip=True).network.state_dict()
    interop.write_folder(path, tensors, {"model": plain(config)})
    return path


@pytest.mark.parametrize("layout", ["folders", "flat"])
def test_a_pipeline_in_either_layout(tmp_path, weights, layout):
    path = write(tmp_path, weights, layout=layout)
    tensors, meta = interop.read_folder(path)
    assert is_folder(path)
    assert parse(ModelConfig, meta["model"], "test") == CONFIG
    assert meta["imported"] == {"from": "diffusers", "schedule": "given", "assumed": []}
    assert torch.equal(tensors["up.0.block.1.conv1.weight"], weights["up_blocks.1.resnets.1.conv1.weight"])
    assert torch.equal(tensors["up.1.attn.0.q.weight"][:, :, 0, 0], weights["up_blocks.0.attentions.0.to_q.weight"])


def test_a_bare_network_is_given_the_schedule_that_diffusers_would_give_it(tmp_path, weights):
    path = write(tmp_path, weights, layout="bare")
    _, meta = interop.read_folder(path)
    assert is_folder(path)
    assert meta["imported"]["schedule"] == "assumed"
    assert parse(ModelConfig, meta["model"], "test") == ModelConfig(
        (3, 8, 8), Linear(), Eps(), FixedSmall(), CONFIG.network
    )


def test_load_takes_the_folder(tmp_path, weights):
    model = models.load(write(tmp_path, weights))
    assert model.config == CONFIG
    assert model.sample(1, steps=2).shape == (1, 3, 8, 8)


def test_a_folder_of_something_else_is_not_ours(tmp_path):
    assert not is_folder(tmp_path)


@pytest.mark.parametrize("name", ["UNet2DModel", "DDPMScheduler"])
def test_defaults_are_those_of_diffusers(name):
    ours = {field.name: field.default for field in fields(getattr(interop, name))}
    signature = inspect.signature(getattr(diffusers, name).__init__).parameters
    theirs = {each: value.default for each, value in signature.items() if each != "self"}
    assert MISSING not in ours.values()
    assert ours == theirs


def test_both_generations_of_names_give_the_same_tensors(tmp_path, weights):
    pattern = "|".join(re.escape(name) for name in OLD_NAMES)
    old = {re.sub(pattern, lambda match: OLD_NAMES[match[0]], name): each for name, each in weights.items()}
    assert len(old.keys() - weights.keys()) == 4 * 2 * 4  # four attentions of four layers with weight and bias
    first, _ = interop.read_folder(write(tmp_path / "new", weights))
    second, _ = interop.read_folder(write(tmp_path / "old", old))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_number_of_groups_is_kept(tmp_path, weights):
    config = read_config(write(tmp_path, weights, changed(UNET, "norm_num_groups", 16)))
    assert config.network == UNet(32, (1, 2), 1, (1,), groups=16)


@pytest.mark.parametrize("head", [64, None])
def test_one_head_may_be_named_by_its_width(tmp_path, weights, head):
    assert read_config(write(tmp_path, weights, changed(UNET, "attention_head_dim", head))) == CONFIG


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("_class_name", "UNet2DConditionModel", '"_class_name" is "UNet2DConditionModel"; supported: "UNet2DModel"'),
        ("act_fn", "tanh", '"act_fn" is "tanh"; supported: "silu", "swish", "gelu", "relu", "mish"'),
        ("attention_head_dim", 65, "network unet: head is 65, and attention has only 64 channels"),
        ("attn_norm_num_groups", 24, '"attn_norm_num_groups" is 24; supported: what divides 64'),
        ("block_out_channels", [32, 48], r'"block_out_channels" is \[32, 48\]; supported: multiples of .*, 32'),
        ("block_out_channels", [16, 32], r'"block_out_channels" is \[16, 32\]; supported: multiples of .*, 32'),
        ("block_out_channels", [], r'"block_out_channels" is \[\]; supported'),
        ("block_out_channels", "32", '"block_out_channels" input should be a valid'),
        ("class_embed_type", "identity", '"class_embed_type" is "identity"; supported: null, "timestep"'),
        ("class_embed_type", "timestep", 'does not say how many classes there are; write .* as "num_class_embeds"'),
        ("down_block_types", ["DownBlock2D", "SkipDownBlock2D"], '"down_block_types" is .*SkipDownBlock2D.*supported'),
        ("down_block_types", ["DownBlock2D"], '"down_block_types" is .*supported: .*, 2 of them, as many as'),
        ("up_block_types", ["KUpBlock2D", "AttnUpBlock2D"], '"up_block_types" .*supported'),
        ("downsample_padding", 2, '"downsample_padding" is 2; supported: 0, 1'),
        ("freq_shift", 16, '"freq_shift" is 16; supported: 0 to 15'),
        ("mid_block_scale_factor", 0.0, '"mid_block_scale_factor" is 0.0; supported: more than 0'),
        ("mid_block_type", "UNetMidBlock2DCrossAttn", '"mid_block_type" is .*; supported: "UNetMidBlock2D", null'),
        ("norm_eps", -1e-5, '"norm_eps" is -1e-05; supported: more than 0'),
        ("norm_num_groups", 20, '"block_out_channels" is .*; supported: multiples of "norm_num_groups", 20'),
        ("norm_num_groups", None, '"norm_num_groups" input should be a valid integer, given None'),
        ("out_channels", 6, '"out_channels" is 6; supported: 3'),
        ("in_channels", 6, '"out_channels" is 3; supported: 6'),
        ("resnet_time_scale_shift", "spatial", '"resnet_time_scale_shift" is "spatial"; supported: "default", "scale_'),
        ("sample_size", None, '"sample_size" is null; write the side'),
        ("sample_size", 9, '"sample_size" is 9; supported: multiples of 2'),
        ("time_embedding_type", "fourier", '"time_embedding_type" is "fourier"; supported: "positional"'),
        ("time_embedding_type", "learned", '"time_embedding_type" is "learned"; supported: "positional"'),
        ("dropout", 2.0, '"dropout" input should be less than or equal to 1, given 2.0'),
    ],
)
def test_a_network_that_is_not_ours_is_refused_by_its_field(tmp_path, weights, field, value, message):
    with pytest.raises(UsageError, match=message):
        interop.read_folder(write(tmp_path, weights, changed(UNET, field, value)))


@pytest.mark.parametrize(
    "field, value, message",
    [
        (
            "_class_name",
            "ScoreSdeVeScheduler",
            '"_class_name" is "ScoreSdeVeScheduler"; supported: "DDPMScheduler", "D',
        ),
        ("beta_schedule", "sigmoid", '"beta_schedule" is "sigmoid"; supported: "linear", "scaled_linear", "squared'),
        ("trained_betas", [0.1, 0.2], r'"trained_betas" is \[0.1, 0.2\]; supported: null'),
        ("variance_type", "learned", '"variance_type" is "learned"; supported: "fixed_small", "fixed_large"'),
        ("prediction_type", "flow", '"prediction_type" is "flow"; supported: "epsilon", "sample", "v_prediction"'),
        ("rescale_betas_zero_snr", True, '"rescale_betas_zero_snr" is true; supported: false'),
        ("num_train_timesteps", 0, '"num_train_timesteps" input should be greater than or equal to 1'),
        ("variance_type", "learned_range", '"out_channels" is 3; supported: 6'),
    ],
)
def test_a_chain_that_is_not_ours_is_refused_by_its_field(tmp_path, weights, field, value, message):
    with pytest.raises(UsageError, match=message):
        interop.read_folder(write(tmp_path, weights, scheduler=changed(SCHEDULER, field, value)))


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_the_betas_are_those_of_diffusers(tmp_path, weights, schedule):
    """diffusers' are float32, of rounding 6e-8 in each operation."""
    config = {**SCHEDULER, "beta_schedule": schedule, "num_train_timesteps": 100, "beta_start": 0.001}
    process = read_config(write(tmp_path, weights, scheduler=config)).process
    torch.testing.assert_close(
        process.betas(), diffusers.DDPMScheduler(**public(config)).betas.double(), rtol=1e-6, atol=1e-8
    )


@pytest.mark.parametrize("name, ours", [("epsilon", Eps()), ("sample", X0()), ("v_prediction", V())])
def test_what_is_predicted(tmp_path, weights, name, ours):
    path = write(tmp_path, weights, scheduler={**SCHEDULER, "prediction_type": name})
    assert read_config(path).parameterisation == ours


@pytest.mark.parametrize(
    "change, message",
    [
        ({"conv_in.bias": None}, "hold no conv_in.bias; the config asks for exactly one"),
        ({"mid_block.attentions.0.to_q.bias": None}, "hold no mid_block.attentions.0.query.bias or .*to_q.bias; the"),
        ({"mid_block.attentions.0.query.bias": 64}, "hold both mid_block.*query.bias and mid_block.*to_q.bias; the"),
        ({"class_embedding.weight": 1}, "the config has no place for class_embedding.weight$"),
        ({name: 1 for name in "abcde"}, "the config has no place for a, b, c and 2 more"),
        ({"conv_out.bias": 4}, r"conv_out.bias is \[4\] in the weights, and \[3\] by the config"),
    ],
)
def test_each_tensor_is_used_exactly_once(tmp_path, weights, change, message):
    sizes = {name: size for name, size in change.items() if size is not None}
    wrong = {**weights, **{name: torch.zeros(size) for name, size in sizes.items()}}
    wrong = {name: tensor for name, tensor in wrong.items() if name in sizes or name not in change}
    with pytest.raises(UsageError, match=message):
        interop.read_folder(write(tmp_path, wrong))


def test_a_pickle_is_read_only_with_the_flag(tmp_path, weights):
    path = write(tmp_path)
    torch.save(weights, path / "unet" / f"{WEIGHTS}.bin")
    with pytest.raises(Corrupt, match=r"is a pickle.*--allow-pickle") as caught:
        interop.read_folder(path)
    assert caught.value.exit_code == 5
    tensors, _ = interop.read_folder(path, allow_pickle=True)
    assert torch.equal(tensors["conv_in.weight"], weights["conv_in.weight"])


def test_safetensors_are_preferred_to_a_pickle(tmp_path, weights):
    path = write(tmp_path, weights)
    (path / "unet" / f"{WEIGHTS}.bin").write_bytes(b"never read")
    assert read_config(path) == CONFIG


@pytest.mark.parametrize(
    "file, content, error, message",
    [
        ("model_index.json", '{"_class_name": "LDMPipeline"}', UsageError, '"LDMPipeline"; supported: "DDPMPipeline"'),
        ("unet/config.json", "{", Corrupt, "config.json is damaged: it is not JSON"),
        ("unet/config.json", "[]", Corrupt, "config.json holds no JSON object"),
        ("unet/config.json", None, UsageError, "config.json is missing; a diffusers model is"),
        ("scheduler/scheduler_config.json", None, UsageError, "scheduler_config.json is missing"),
        (f"unet/{WEIGHTS}.safetensors", "cut short", Corrupt, "safetensors is damaged, or no"),
        (f"unet/{WEIGHTS}.safetensors", None, UsageError, f"holds no {WEIGHTS}.safetensors, nor {WEIGHTS}.bin"),
    ],
)
def test_damaged_and_missing_files(tmp_path, weights, file, content, error, message):
    path = write(tmp_path, weights)
    if content is None:
        (path / file).unlink()
    else:
        (path / file).write_text(content)
    with pytest.raises(error, match=message):
        interop.read_folder(path)


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        ModelConfig((1, 8, 16), Cosine(100), V(), LearnedRange(), UNet(20, (1, 2), 2, (), dropout=0.1, groups=10)),
        ModelConfig((3, 4, 4), Quad(50, 0.001, 0.5), X0(), FixedSmall(), UNet(32, (1,), 1, (0,), groups=32)),
    ],
)
def test_a_round_trip_keeps_every_bit(tmp_path, config):
    before = {name: torch.randn_like(tensor) for name, tensor in config.build(True).network.state_dict().items()}
    after, meta = interop.read_folder(export(tmp_path / "out", config, before))
    assert parse(ModelConfig, meta["model"], "test") == config
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_round_trip_of_theirs_keeps_every_bit(tmp_path, weights):
    tensors, meta = interop.read_folder(write(tmp_path / "in", weights))
    interop.write_folder(tmp_path / "out", tensors, meta)
    after = load_file(tmp_path / "out" / "unet" / f"{WEIGHTS}.safetensors")
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[name], weights[name]) for name in weights)


@pytest.mark.parametrize("image", [(3, 8, 8), (3, 8, 16)])
def test_diffusers_loads_and_runs_what_is_exported(tmp_path, image):
    config = ModelConfig(image, Cosine(10), V(), FixedLarge(), CONFIG.network)
    pipeline = diffusers.DDPMPipeline.from_pretrained(export(tmp_path / "out", config))
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline.unet) is diffusers.UNet2DModel
    chain = pipeline.scheduler.config
    assert (chain.beta_schedule, chain.prediction_type, chain.variance_type, chain.num_train_timesteps) == (
        "squaredcos_cap_v2",
        "v_prediction",
        "fixed_large",
        10,
    )
    assert pipeline(num_inference_steps=2, output_type="np").images.shape == (1, *image[1:], 3)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"network": UNet(32, (1, 1), 1, (), patch=2)}, "cannot be this network: patch = 2 and not 1"),
        ({"network": UNet(32, (1, 1), 1, (), time="logsnr")}, 'network: time = "logsnr" and not "index"'),
        ({"network": UNet(32, (2, 1), 1, ())}, r"network: multipliers \[2, 1\] do not begin with 1"),
        ({"network": UNet(9, (1, 2), 1, ())}, r"network: widths \[9, 18\] are no multiples of 2 groups"),
        ({"network": UNet(32, (1, 1), 1, (), middle_groups=0)}, "middle_groups = 0 needs modulation scale-shift"),
        (
            {"network": UNet(32, (1, 1, 1), 1, (0, 1), residual_down=(0,))},
            "some levels with attention are left through a residual block and others are not",
        ),
        ({"process": Const()}, 'diffusers has no process "const"; supported: linear, quad, cosine'),
        ({"process": Cosine(offset=0.01)}, "cosine schedule has offset 0.008 and beta_max 0.999; this model"),
        ({"parameterisation": Mu()}, 'diffusers has no parameterisation "mu"; supported: eps, x0, v'),
        ({"parameterisation": Lattice()}, 'diffusers has no parameterisation "lattice"; supported: eps, x0, v'),
        ({"process": Vdm()}, 'diffusers has no process "vdm"; supported: linear, quad, cosine'),
        ({"variance": Learned()}, 'diffusers has no variance "learned"; supported: fixed-small, fixed-large'),
    ],
)
def test_what_diffusers_cannot_be_is_not_exported(tmp_path, change, message):
    parts = {"image": (3, 8, 8), "process": Linear(), "parameterisation": Eps(), "variance": FixedLarge()}
    config = ModelConfig(**{**parts, "network": CONFIG.network, **change})
    with pytest.raises(UsageError, match=message):
        export(tmp_path / "out", config, {})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="exists already; name a folder that is new or empty"):
        export(tmp_path, CONFIG)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "out").mkdir()
    assert read_config(export(tmp_path / "out", CONFIG)) == CONFIG


def test_a_failing_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    def full(change, path, detail=None):
        if change == "rename":
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk, "hook", full)
    with pytest.raises(StorageError, match="out cannot be written: No space left on device"):
        export(tmp_path / "out", CONFIG)
    assert list(tmp_path.iterdir()) == []
