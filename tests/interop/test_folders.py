"""Folders as diffusers itself writes them: variants, shards, checkpoints of a training, one scheduler or another."""

import inspect
import json
import re
import shutil
from dataclasses import fields
from pathlib import Path

import diffusers
import pytest
import torch

from tests.interop.theirs import WEIGHTS, network, variants
from undiffuse.config import parse, plain
from undiffuse.diffusion.parameterisation import Eps, V
from undiffuse.diffusion.process import Cosine, Linear, Quad
from undiffuse.diffusion.reverse import FixedLarge, FixedSmall, LearnedRange
from undiffuse.errors import Corrupt, UsageError
from undiffuse.interop.diffusers import read_folder, write_folder
from undiffuse.interop.diffusers_chain import CHAINS, DDPMScheduler
from undiffuse.model.load import from_weights, load
from undiffuse.model.recipe import ModelConfig
from undiffuse.network.unet import UNet


def config_of(path, **how) -> ModelConfig:
    return parse(ModelConfig, read_folder(path, **how)[1]["model"], str(path))


def assumed(path, **how) -> list[str]:
    return read_folder(path, **how)[1]["imported"]["assumed"]


def test_the_scheduler_beside_a_network_is_its_own(pipe, monkeypatch):
    expected = config_of(pipe)
    assert (expected.process, expected.parameterisation) == (Cosine(1000), V())
    assert config_of(pipe / "unet") == expected
    assert str(pipe / "scheduler") in assumed(pipe / "unet")[0]
    monkeypatch.chdir(pipe / "unet")
    assert config_of(Path(".")) == expected


def test_a_network_without_a_scheduler_says_what_is_assumed(pipe, tmp_path):
    alone = shutil.copytree(pipe / "unet", tmp_path / "alone")
    assert config_of(alone).process == Linear()
    (said,) = assumed(alone)
    assert "assumed to be that of diffusers' DDPMScheduler: linear, 1,000 steps, eps, fixed-small" in said


def test_twice_as_many_outputs_are_a_learned_variance(tmp_path):
    network(out_channels=6).save_pretrained(tmp_path)
    assert config_of(tmp_path).variance == LearnedRange()
    assert "learned-range, because the network has twice as many outputs" in assumed(tmp_path)[0]


# --- which weights ---


@pytest.mark.parametrize(
    "there, chosen, value",
    [
        (("fp16",), None, 0.0),
        (("non_ema",), None, 0.0),
        ((None, "fp16"), None, 0.0),
        (("fp16", None), None, 1.0),
        (("non_ema", None), "non_ema", 0.0),
        (("fp16", "non_ema"), "non_ema", 1.0),
    ],
)
def test_the_plain_weights_or_the_variant_that_is_there_or_is_chosen(pipe, there, chosen, value):
    variants(pipe / "unet", *there)
    tensors, meta = read_folder(pipe, variant=chosen)
    assert tensors["conv_in.bias"].unique().tolist() == [value]
    said = meta["imported"]["assumed"]
    assert said == ([] if chosen or None in there else [f'the weights are those of the variant "{there[0]}"'])


def test_a_choice_between_variants_is_the_users(pipe):
    variants(pipe / "unet", "fp16", "non_ema")
    with pytest.raises(UsageError, match=r"several variants .*, fp16, non_ema, and no plain ones; .*--variant fp16"):
        read_folder(pipe)
    with pytest.raises(UsageError, match='no weights of the variant "bf16"; variants there: fp16, non_ema'):
        read_folder(pipe, variant="bf16")


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_with_an_index(pipe, variant):
    whole, _ = read_folder(pipe)
    model = diffusers.UNet2DModel.from_pretrained(pipe / "unet")
    (pipe / "unet" / f"{WEIGHTS}.safetensors").unlink()
    model.save_pretrained(pipe / "unet", max_shard_size="20KB", variant=variant)
    shards = sorted((pipe / "unet").glob("*-of-*"))
    assert len(shards) > 2
    tensors, _ = read_folder(pipe)
    assert tensors.keys() == whole.keys()
    assert all(torch.equal(tensors[name], whole[name]) for name in whole)
    shards[1].unlink()
    with pytest.raises(UsageError, match=f"{re.escape(shards[1].name)} is missing; download all files"):
        read_folder(pipe)


@pytest.mark.parametrize("text", ['{"weight_map": {}}', '{"weight_map": {"a": "../other.safetensors"}}', "{}"])
def test_an_index_that_names_no_files_beside_it_is_damaged(pipe, text):
    (pipe / "unet" / f"{WEIGHTS}.safetensors").unlink()
    (pipe / "unet" / f"{WEIGHTS}.safetensors.index.json").write_text(text)
    with pytest.raises(Corrupt, match="its weight_map does not name the files beside it"):
        read_folder(pipe)


def test_safetensors_of_a_variant_need_no_leave_and_plain_pickles_with_leave_are_preferred(pipe):
    variants(pipe / "unet", "fp16")
    diffusers.UNet2DModel.from_pretrained(pipe / "unet", variant="fp16").save_pretrained(
        pipe / "unet", safe_serialization=False
    )
    assert assumed(pipe) == ['the weights are those of the variant "fp16"']
    assert assumed(pipe, allow_pickle=True) == []


def test_names_of_a_wrapped_network_are_its_own(pipe):
    model = diffusers.UNet2DModel.from_pretrained(pipe / "unet")
    whole, _ = read_folder(pipe)
    (pipe / "unet" / f"{WEIGHTS}.safetensors").unlink()
    torch.save({f"module._orig_mod.{n}": t for n, t in model.state_dict().items()}, pipe / "unet" / f"{WEIGHTS}.bin")
    assert read_folder(pipe, allow_pickle=True)[0].keys() == whole.keys()


# --- checkpoints of a training ---


@pytest.fixture
def training(pipe):
    """As the unconditional example leaves it: a pipeline, and checkpoints with an average, made by its own class."""
    from diffusers.training_utils import EMAModel

    for step in (500, 1000):
        model = diffusers.UNet2DModel.from_pretrained(pipe / "unet")
        torch.nn.init.constant_(model.conv_in.bias, float(step))
        model.save_pretrained(pipe / f"checkpoint-{step}" / "unet")
        torch.nn.init.constant_(model.conv_in.bias, -float(step))
        average = EMAModel(model.parameters(), model_cls=diffusers.UNet2DModel, model_config=model.config)
        average.save_pretrained(pipe / f"checkpoint-{step}" / "unet_ema")
    return pipe


@pytest.mark.parametrize("name, value", [("", -500.0), ("unet_ema", -500.0), ("unet", 500.0)])
def test_a_checkpoint_is_its_average_with_the_scheduler_of_the_training(training, name, value):
    path = training / "checkpoint-500" / name
    tensors, meta = read_folder(path)
    assert tensors["conv_in.bias"].unique().tolist() == [value]
    assert meta["model"]["process"]["name"] == "cosine"
    said = "; ".join(meta["imported"]["assumed"])
    assert ("unet_ema, are taken and not those of unet" in said) == (name == "")
    config = json.loads((training / "checkpoint-500" / "unet_ema" / "config.json").read_text())
    assert {"decay", "inv_gamma", "optimization_step", "use_ema_warmup"} <= config.keys()
    assert "unknown" not in said


def test_a_training_without_a_pipeline_names_its_newest_checkpoint(training, tmp_path):
    out = tmp_path / "out"
    for step in (500, 1000):
        shutil.copytree(training / f"checkpoint-{step}", out / f"checkpoint-{step}")
    with pytest.raises(UsageError, match=f"checkpoints of a training with diffusers; give one, {out}/checkpoint-1000"):
        load(out)


# --- schedulers and pipelines ---


@pytest.mark.parametrize("name", CHAINS)
def test_the_defaults_of_each_scheduler_are_those_of_diffusers(name):
    signature = inspect.signature(getattr(diffusers.schedulers, name).__init__).parameters
    if name.startswith("DPMSolverSDE"):  # a stand-in, without the package that it needs
        source = Path(diffusers.__file__).parent / "schedulers" / "scheduling_dpmsolver_sde.py"
        assert "beta_start: float = 0.00085" in source.read_text()
        return
    ours = {each.name: each.default for each in fields(DDPMScheduler)} | CHAINS[name]
    read = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type", "trained_betas")
    assert {key: signature[key].default if key in signature else ours[key] for key in read} == {
        key: ours[key] for key in read
    }


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.DDIMScheduler,
        diffusers.PNDMScheduler,
        diffusers.DPMSolverMultistepScheduler,
        diffusers.EulerDiscreteScheduler,
        diffusers.DEISMultistepScheduler,
        diffusers.UniPCMultistepScheduler,
    ],
)
def test_other_schedulers_say_how_the_network_was_trained(pipe, scheduler):
    how = {"beta_schedule": "scaled_linear", "beta_start": 0.001, "prediction_type": "v_prediction"}
    scheduler(num_train_timesteps=500, **how).save_pretrained(pipe / "scheduler")
    config = config_of(pipe)
    assert (config.process, config.parameterisation) == (Quad(500, 0.001, 0.02), V())
    assert config.variance == FixedSmall()
    said = assumed(pipe)
    assert f"{scheduler.__name__} says how the network was trained; how it samples is not taken over" in said
    assert "the variance is assumed to be fixed-small, because nothing says it" in said


def test_the_defaults_of_a_scheduler_are_its_own(pipe):
    file = pipe / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({"_class_name": "HeunDiscreteScheduler", "num_train_timesteps": 100}))
    assert config_of(pipe).process == Linear(100, 0.00085, 0.012)


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("FlowMatchEulerDiscreteScheduler", {}, '"_class_name" is "FlowMatchEulerDiscreteScheduler"; supported: "DDPM'),
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True}, '"use_flow_sigmas" is true; supported: false'),
        ("DDIMScheduler", {"rescale_betas_zero_snr": True}, '"rescale_betas_zero_snr" is true; supported: false'),
        ("PNDMScheduler", {"prediction_type": "flow_prediction"}, '"prediction_type" is "flow_prediction"; supported'),
    ],
)
def test_other_schedulers_that_are_no_chain_of_ours_are_refused(pipe, name, changes, message):
    file = pipe / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({"_class_name": name, **changes}))
    with pytest.raises(UsageError, match=message):
        read_folder(pipe)


@pytest.mark.parametrize("epsilon, ours", [(True, "eps"), (False, "x0")])
def test_the_first_releases_said_whether_the_noise_is_predicted(pipe, epsilon, ours):
    file = pipe / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({"_class_name": "DDPMScheduler", "predict_epsilon": epsilon}))
    assert read_folder(pipe)[1]["model"]["parameterisation"] == {"name": ours}


@pytest.mark.parametrize("name", ["DDIMPipeline", "PNDMPipeline", "MyOwnPipeline"])
def test_any_pipeline_of_a_network_and_a_scheduler(pipe, name):
    index = json.loads((pipe / "model_index.json").read_text())
    (pipe / "model_index.json").write_text(json.dumps({**index, "_class_name": name}))
    assert config_of(pipe).process == Cosine(1000)


@pytest.mark.parametrize("part", ["", "unet"])
def test_a_latent_model_is_refused_by_what_stands_beside_its_network(pipe, part):
    index = {"_class_name": "LDMPipeline", "unet": ["diffusers", "UNet2DModel"], "vqvae": ["diffusers", "VQModel"]}
    (pipe / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UsageError, match="it has vqvae beside its network; supported: pixels"):
        read_folder(pipe / part)


def test_all_reasons_are_said_at_once(pipe):
    file = pipe / "unet" / "config.json"
    unet = json.loads(file.read_text()) | {"act_fn": "tanh", "time_embedding_type": "fourier", "dropout": 2.0}
    file.write_text(json.dumps(unet | {"sample_size": None}))
    chain = {"_class_name": "DDPMScheduler", "prediction_type": "flow", "trained_betas": [0.1]}
    (pipe / "scheduler" / "scheduler_config.json").write_text(json.dumps(chain))
    with pytest.raises(UsageError, match=r"cannot be imported: .*Sample from it with diffusers, or train") as caught:
        read_folder(pipe)
    for name in ("act_fn", "time_embedding_type", "dropout", "sample_size", "prediction_type", "trained_betas"):
        assert str(caught.value).count(f'"{name}"') == 1
    assert "\n" not in str(caught.value)


AVERAGED = {"decay": 0.999, "inv_gamma": 1.0, "min_decay": 0.0, "optimization_step": 5, "power": 0.75}


@pytest.mark.parametrize(
    "section, changes, said",
    [
        ("unet", {**AVERAGED, "update_after_step": 0, "use_ema_warmup": False}, None),
        ("unet", {"layers": 2, "shape": [1]}, r"unet/config.json: layers, shape unknown and left aside"),
        ("scheduler", {"tensor_format": "pt", "timestep_values": None}, None),
        ("scheduler", {"future": 1}, "scheduler_config.json: future unknown and left aside"),
        (
            "scheduler",
            {"clip_sample": False},
            r"x_0 is clipped not at all there, and to \[-1, 1\] here unless --no-clip",
        ),
        ("scheduler", {"clip_sample_range": 2.0}, r"x_0 is clipped to ±2 there, and to \[-1, 1\] here"),
        ("scheduler", {"thresholding": True}, "dynamic thresholding there"),
        ("scheduler", {"variance_type": "fixed_small_log"}, None),
    ],
)
def test_what_is_harmless_is_read_and_what_differs_is_said(pipe, section, changes, said):
    expected = config_of(pipe)
    file = pipe / section / {"unet": "config.json", "scheduler": "scheduler_config.json"}[section]
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    assert config_of(pipe) == expected
    found = assumed(pipe)
    assert len(found) == (said is not None)
    assert said is None or re.search(said, found[0])


# --- classes, and what is written ---


def test_classes_of_theirs_get_a_row_for_no_class_that_adds_nothing(tmp_path):
    model = network(num_class_embeds=4)
    model.save_pretrained(tmp_path)
    tensors, meta = read_folder(tmp_path)
    assert meta["model"]["classes"] == 4
    assert torch.equal(tensors["label.weight"][:4], model.class_embedding.weight)
    assert not tensors["label.weight"][4].any()
    assert 'its 4 class embeddings are classes 0 to 3; "no class" was not trained' in "; ".join(assumed(tmp_path))


def test_a_model_with_classes_is_exported_with_all_rows(tmp_path):
    net = UNet(16, (1, 2), 1, (), groups=4)
    config = ModelConfig((3, 8, 8), Linear(), Eps(), FixedLarge(), net, classes=10)
    tensors = {n: torch.randn_like(t) for n, t in config.build(True).network.state_dict().items()}
    notes = write_folder(tmp_path / "out", tensors, {"model": plain(config)})
    assert notes == ['class_labels 0 to 9 are the classes, and 10 is "no class"']
    unet = diffusers.UNet2DModel.from_pretrained(tmp_path / "out" / "unet")
    assert unet.config.num_class_embeds == 11
    assert torch.equal(unet.class_embedding.weight, tensors["label.weight"])
    again, meta = read_folder(tmp_path / "out")
    assert meta["model"]["classes"] == 10
    assert torch.equal(again["label.weight"], tensors["label.weight"])


@pytest.mark.parametrize("steps", [1, 7, 20, 50, 250, 1000])
def test_fewer_steps_there_are_the_times_of_ours(tmp_path, steps):
    config = ModelConfig((3, 8, 8), Linear(), Eps(), FixedLarge(), UNet(16, (1,), 1, (), groups=4))
    write_folder(tmp_path / "out", config.build(True).network.state_dict(), {"model": plain(config)})
    scheduler = diffusers.DDPMPipeline.from_pretrained(tmp_path / "out").scheduler
    scheduler.set_timesteps(steps)
    ours = (from_weights(config, config.build(True).network.state_dict(), {}).times(steps)[:-1] * 1000).round() - 1
    assert scheduler.timesteps.tolist() == ours.long().tolist()
