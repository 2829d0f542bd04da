"""Folders of diffusers become models whose samples are those of its own pipelines."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import Capture, fails, refuses, works
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.ddim.pipeline_ddim import DDIMPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_edm_euler import EDMEulerScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor

from patchdiffusion import cli
from patchdiffusion.cond import Cond
from patchdiffusion.denoiser import NetDenoiser
from patchdiffusion.interop.diffusersfolder import imported_folder
from patchdiffusion.interop.schedulers import precond_of, sampler_of, scheduler_of
from patchdiffusion.model import load_model
from patchdiffusion.nets.diffusers import DiffusersConfig
from patchdiffusion.nets.dit import DiT
from patchdiffusion.parameterisation import EpsDDPM, OnBetas
from patchdiffusion.sampling.driver import Start, sample
from patchdiffusion.sampling.pipeline import load

# Of diffusers itself, with numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
TEXT: dict[str, Any] = {
    **UNET,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "in_channels": 3,
    "out_channels": 3,
    "cross_attention_dim": 12,
    "attention_head_dim": 4,
}
DIT: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 3,
    "num_layers": 2,
    "sample_size": 8,
    "patch_size": 2,
    "num_embeds_ada_norm": 5,
}
CLASSES: Mapping[str, Any] = {
    "UNet2DModel": UNet2DModel,
    "UNet2DConditionModel": UNet2DConditionModel,
    "DiTTransformer2DModel": DiTTransformer2DModel,
}
STEPS = 10


def random_net(name: str, **changes: Any) -> Any:
    """A network none of whose parts is silent."""
    config = {"UNet2DModel": UNET, "UNet2DConditionModel": TEXT, "DiTTransformer2DModel": DIT}[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = CLASSES[name](**{**config, **changes}).eval()
        for parameter in network.parameters():
            if parameter.ndim == 1:
                torch.nn.init.normal_(parameter, std=0.1)
    if name == "DiTTransformer2DModel":  # published networks embed noise and class once
        first = network.transformer_blocks[0].norm1.emb
        for block in network.transformer_blocks:
            block.norm1.emb.load_state_dict(first.state_dict())
    return network


def folder_of(path: Path, network: Any, scheduler: Any) -> Path:
    part = "transformer" if isinstance(network, DiTTransformer2DModel) else "unet"
    network.save_pretrained(path / part)
    scheduler.save_pretrained(path / "scheduler")
    index = {
        "_class_name": "Whatever",
        part: ["diffusers", type(network).__name__],
        "scheduler": ["diffusers", type(scheduler).__name__],
        "safety_checker": [None, None],
    }
    (path / "model_index.json").write_text(json.dumps(index))
    return path


def theirs(network: Any, scheduler: Any, z: Tensor, **inputs: Any) -> Tensor:
    """The loop of the pipelines of diffusers, from normal noise z."""
    scheduler.set_timesteps(STEPS)
    flow = isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
    x = z if flow else z * scheduler.init_noise_sigma
    with torch.no_grad():
        for t in scheduler.timesteps:
            scaled = x if flow else scheduler.scale_model_input(x, t)
            raw = network(scaled, t.expand(len(x)), **inputs).sample[:, : x.shape[1]]
            extra: Any = {"use_clipped_model_output": True} if isinstance(scheduler, DDIM) else {}
            x = scheduler.step(raw, t, x, **extra, return_dict=False)[0]
    return x


def ours(folder: Path, scheduler: Any, z: Tensor, cond: Cond | None = None) -> Tensor:
    """The sample of an imported model by the settings of its scheduler, from the same noise."""
    config = sampler_of(scheduler.config, STEPS)
    with imported_folder(folder) as found:
        law, precond = found.config.noise, found.config.precond
        denoiser = NetDenoiser(found.network, precond)
    sigma = float(config.sigmas(law)[0])
    in_sigma = isinstance(scheduler, EulerDiscreteScheduler | EDMEulerScheduler)
    inner = precond.on(found.network).scales(torch.tensor(sigma, dtype=torch.float64)).inner
    scale = scheduler.init_noise_sigma if in_sigma else 1 / float(inner)
    start = Start(z * scale, sigma, fresh=False)
    return sample(
        denoiser, seeds=range(len(z)), channels=z.shape[1], canvas=(8, 8), cond=cond, law=law,
        start=start, config=replace(config, sigma_max=None),
    )  # fmt: skip


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


DDIM = DDIMScheduler
EULER = EulerDiscreteScheduler
SCHEDULERS: dict[str, Any] = {
    "eps": DDIM(clip_sample=False),
    "eps, clipped": DDIM(),
    "eps, trailing": DDIM(timestep_spacing="trailing", clip_sample=False),
    "scaled linear": DDIM(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False
    ),
    "cosine, x0": DDIM(
        beta_schedule="squaredcos_cap_v2", prediction_type="sample", clip_sample=False
    ),
    "v, no signal": DDIM(
        prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=False,
        rescale_betas_zero_snr=True,
    ),
    "listed": DDIM(
        num_train_timesteps=100, trained_betas=[0.001 * (i + 1) for i in range(100)],
        clip_sample=False,
    ),
    "euler": EULER(timestep_spacing="trailing"),
    "euler, v": EULER(timestep_spacing="leading", prediction_type="v_prediction"),
    "flow": FlowMatchEulerDiscreteScheduler(),
    "flow, shifted": FlowMatchEulerDiscreteScheduler(shift=3.0),
    "edm": EDMEulerScheduler(),
}  # fmt: skip


def distance(found: Tensor, expected: Tensor) -> float:
    """Largest difference, in units of the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", SCHEDULERS)
def test_samples_are_those_of_every_scheduler(name: str, tmp_path: Path) -> None:
    network, scheduler = random_net("UNet2DModel"), SCHEDULERS[name]
    folder, z = folder_of(tmp_path / "a", network, scheduler), noise(2, 3, 8, 8)
    expected = theirs(network, scheduler, z)
    error = distance(ours(folder, scheduler, z), expected)
    assert error < 2e-5, error


def test_classes_of_a_unet(tmp_path: Path) -> None:
    network, scheduler = random_net("UNet2DModel", num_class_embeds=4), SCHEDULERS["eps"]
    folder, z = folder_of(tmp_path / "a", network, scheduler), noise(2, 3, 8, 8)
    labels = torch.tensor([3, 1])
    expected = theirs(network, scheduler, z, class_labels=labels)
    assert distance(ours(folder, scheduler, z, Cond(labels=labels)), expected) < 2e-5


def test_tokens_of_a_condition(tmp_path: Path) -> None:
    """With a mask of the tokens that count; none of them are zeros."""
    network, scheduler = random_net("UNet2DConditionModel"), SCHEDULERS["scaled linear"]
    folder, z = folder_of(tmp_path / "a", network, scheduler), noise(2, 3, 8, 8)
    tokens, mask = noise(2, 5, 12), torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
    for context in (None, tokens):
        where = None if context is None else mask
        inputs = {"encoder_hidden_states": torch.zeros(2, 1, 12) if context is None else context}
        expected = theirs(network, scheduler, z, **inputs, encoder_attention_mask=where)
        found = ours(folder, scheduler, z, Cond(context=context, context_mask=where))
        assert distance(found, expected) < 2e-5


@pytest.mark.parametrize("scheduler", ["eps, trailing", "flow, shifted"])
@pytest.mark.parametrize("variance", [False, True])
def test_dit(scheduler: str, variance: bool, tmp_path: Path) -> None:
    """It is our own network, so that tokens and crops work; the last label is no class."""
    network = random_net("DiTTransformer2DModel", out_channels=6 if variance else 3, norm_eps=1e-6)
    folder = folder_of(tmp_path / "a", network, SCHEDULERS[scheduler])
    labels, z = torch.tensor([4, 5]), noise(2, 3, 8, 8)
    expected = theirs(network, SCHEDULERS[scheduler], z, class_labels=labels)
    cond = Cond(labels=torch.tensor([4, -1]))
    assert distance(ours(folder, SCHEDULERS[scheduler], z, cond), expected) < 2e-5
    with imported_folder(folder) as found:
        assert isinstance(found.network, DiT) and found.config.num_classes == 5


def test_older_name_and_norm_of_dit(tmp_path: Path) -> None:
    """Published folders say Transformer2DModel, and norm_eps 1e-5, where that of DiT is 1e-6."""
    network = random_net("DiTTransformer2DModel", out_channels=6)
    folder = folder_of(tmp_path / "a", network, SCHEDULERS["eps"])
    change(folder / "transformer" / "config.json", _class_name="Transformer2DModel")
    labels, z = torch.tensor([0, 2]), noise(2, 3, 8, 8)
    expected = theirs(network, SCHEDULERS["eps"], z, class_labels=labels)
    assert distance(ours(folder, SCHEDULERS["eps"], z, Cond(labels=labels)), expected) < 1e-4


def change(file: Path, **values: Any) -> None:
    facts = json.loads(file.read_text()) | values
    file.write_text(json.dumps({name: value for name, value in facts.items() if value != "gone"}))


def test_the_pipeline_itself(tmp_path: Path) -> None:
    """DDIMPipeline.from_pretrained and `load` of the imported model, from the same noise."""
    pipeline = DDIMPipeline(random_net("UNet2DModel"), DDIM(beta_end=0.01))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(tmp_path / "a")
    generator = torch.Generator().manual_seed(1)
    images = pipeline(
        2, generator, num_inference_steps=5, use_clipped_model_output=True, output_type="np"
    ).images  # pyright: ignore[reportAttributeAccessIssue]
    assert cli.main(["import", str(tmp_path / "a"), "--out", str(tmp_path / "m")]) == 0
    config = sampler_of(pipeline.scheduler.config, 5)
    sigma = float(config.sigmas()[0])
    start = Start(noise(2, 3, 8, 8) * (1 + sigma**2) ** 0.5, sigma, fresh=False)
    model = load(tmp_path / "m", device="cpu")
    values = model.sample(2, start=start, config=replace(config, sigma_max=None))
    assert abs(values - images * 255).max() <= 0.5 + 1e-2


# ---- The command line ----


def test_import_sample_and_train_on_crops(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command that `import` prints samples as the scheduler does; training starts from it."""
    monkeypatch.chdir(tmp_path)
    folder = folder_of(tmp_path / "a", random_net("UNet2DModel"), SCHEDULERS["scaled linear"])
    text = works(capsys, "import", folder, "--out", "m")
    _, _, flags = text.partition("does: patchdiffusion sample m ")
    flags = flags.splitlines()[0]
    works(capsys, "sample", "m", *flags.split(), "--steps", 3, "--count", 2, "--out", "s")
    images = np.random.default_rng(0).integers(0, 255, (8, 16, 16, 3), dtype=np.uint8)
    np.save("images.npy", images)
    flags = "--clock steps --images 8 --batch 2 --preview.samples 1 --preview.grid 2"
    flags += " --preview.sample-steps 1 --preview.held-out 2 --preview.status 1000000 --out run"
    works(capsys, "train", "images.npy", "--config", "m/train.json", "--start-from", "m",
          *flags.split())  # fmt: skip
    before, after = load_model("m"), load_model("run")
    assert before.config.network == after.config.network
    name = "unet.conv_in.coordinates.weight"
    weights = before.network.state_dict()[name], after.network.state_dict()[name]
    assert not weights[0].any() and weights[1].any()


@pytest.mark.parametrize("flags", [
    "--solver heun --solver.churn.amount 2", "--solver unipc", "--solver sde_dpmpp_2m",
    "--guidance cfg --guidance.weight 2", "--accelerator deepcache",
    "--canvas tiles --canvas.size 16",
])  # fmt: skip
def test_an_imported_dit_is_one_of_ours(flags: str, tmp_path: Path, capsys: Capture) -> None:
    folder = folder_of(tmp_path / "a", random_net("DiTTransformer2DModel"), SCHEDULERS["flow"])
    works(capsys, "import", folder, "--out", tmp_path / "m")
    options = ("--count", 1, "--steps", 3, "--out", tmp_path / "s")
    works(capsys, "sample", tmp_path / "m", *flags.split(), *options)
    assert len(list((tmp_path / "s").glob("*.png"))) > 0


def test_what_cannot_be_imported_is_one_line(tmp_path: Path, capsys: Capture) -> None:
    folder = folder_of(tmp_path / "a", random_net("UNet2DModel"), SCHEDULERS["eps"])
    network, scheduler = folder / "unet" / "config.json", folder / "scheduler"
    scheduler /= "scheduler_config.json"

    def told(file: Path, **values: Any) -> str:
        before = file.read_text()
        change(file, **values)
        line = fails(capsys, "import", folder, "--out", tmp_path / "m")
        file.write_text(before)
        assert str(folder) in line and not (tmp_path / "m").exists()
        return line

    assert "model_index.json" in fails(capsys, "import", tmp_path, "--out", tmp_path / "m")
    assert "FluxTransformer" in told(network, _class_name="FluxTransformer2DModel")
    assert "wavelets" in told(scheduler, prediction_type="wavelets")
    assert "laplace" in told(scheduler, beta_schedule="laplace")
    assert "beta_schedule" in told(scheduler, beta_schedule="gone", _class_name="Karras")
    assert "--side" in told(network, sample_size=None)
    assert "identity" in told(network, class_embed_type="identity")
    assert "center_input_sample" in told(network, center_input_sample=True)
    assert "of another shape" in told(network, block_out_channels=[16, 64])
    assert "surprise" in told(network, surprise=1)
    assert "the file only" in told(network, block_out_channels=[16, 32, 2**14], down_block_types=[
        "DownBlock2D"] * 3, up_block_types=["UpBlock2D"] * 3)  # fmt: skip
    assert "in_channels is 5" in told(network, in_channels=5)
    assert "--kind" in fails(capsys, "import", folder, "--kind", "dit", "--out", tmp_path / "m")
    (tmp_path / "there").mkdir()
    assert "exists" in fails(capsys, "import", folder, "--out", tmp_path / "there")
    scheduler.unlink()
    assert "scheduler_config.json" in fails(capsys, "import", folder, "--out", tmp_path / "m")
    assert works(capsys, "import", folder_of(folder, random_net("UNet2DModel"), DDIM()), "--out",
                 tmp_path / "m")  # fmt: skip


def test_blocks_with_embeddings_of_their_own_are_refused(tmp_path: Path) -> None:
    network = random_net("DiTTransformer2DModel")
    network.transformer_blocks[1].norm1.emb.timestep_embedder.linear_1.bias.data += 1
    folder = folder_of(tmp_path / "a", network, DDIM())
    with refuses("embeddings"), imported_folder(folder):
        pass


def test_schedulers_go_out_and_in() -> None:
    for word in ("eps, trailing", "cosine, x0", "v, no signal", "listed", "flow"):
        precond = precond_of(SCHEDULERS[word].config)
        assert precond_of(scheduler_of(precond)) == precond
    found = precond_of(scheduler_of(EpsDDPM()))
    sigma = torch.logspace(-1, 2, 9, dtype=torch.float64)
    assert isinstance(found, OnBetas)
    for ours_, theirs_ in zip(EpsDDPM().scales(sigma), found.scales(sigma), strict=True):
        assert torch.allclose(ours_, theirs_, rtol=1e-9)


# ---- The network ----


def test_any_size_any_seed_and_neutral_coordinates() -> None:
    before = torch.get_rng_state()
    config = DiffusersConfig(num_classes=3)
    a, b, c = (config.build(seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not any(torch.equal(a[n], c[n]) for n in a if n.endswith("conv1.weight"))
    plain, network = replace(config, coordinates=False).build(seed=1), config.build(seed=1)
    x, level = noise(2, 3, 7, 10), torch.tensor([1.0, 400.0])
    cond = Cond(labels=torch.tensor([0, -1]), pos=noise(2, 2, 7, 10))
    expected = plain(x, level, cond)
    assert expected.shape == x.shape and 0 < expected.abs().max() < 1e-3
    assert torch.equal(network(x, level, cond), expected)
    assert network.neutral() == {"unet.conv_in.coordinates.weight"}
    torch.nn.init.normal_(network.get_parameter("unet.conv_in.coordinates.weight"))
    assert not torch.equal(network(x, level, cond), expected)
    network(x, level, cond).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in network.parameters())
    assert network.roles().keys() == dict(network.named_parameters()).keys()


@pytest.mark.parametrize("wrong", [
    {"arguments": "{"}, {"arguments": '{"in_channels": 3}'}, {"kind": "UNet1DModel"},
    {"dropout": 0.1}, {"augment_dim": 2}, {"arguments": '{"time_embedding_type": "fourier"}'},
    {"arguments": '{"down_block_types": ["SkipDownBlock2D"]}'},
])  # fmt: skip
def test_impossible_networks_are_one_line(wrong: dict[str, Any]) -> None:
    with refuses(next(iter(wrong)) if "kind" in wrong else ""):
        DiffusersConfig(**wrong)
