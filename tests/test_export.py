"""Exported models are the same function elsewhere."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Capture, fails, works
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.pipelines.ddim.pipeline_ddim import DDIMPipeline
from diffusers.pipelines.dit.pipeline_dit import DiTPipeline
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from safetensors.torch import load_file, save_file
from test_diffusers_in import DDIM, folder_of, noise, random_net
from torch import Tensor

from patchdiffusion.cond import Cond
from patchdiffusion.interop.program import _traced, conditions_of, save_onnx, traced
from patchdiffusion.interop.schedulers import sampler_of
from patchdiffusion.model import Model, ModelConfig, load_model, save_model
from patchdiffusion.nets import Network
from patchdiffusion.nets.dit import DiTConfig
from patchdiffusion.nets.edm2 import EDM2Config
from patchdiffusion.nets.text import ByteText
from patchdiffusion.nets.unet import UNetConfig
from patchdiffusion.parameterisation import EDM, EpsDDPM, FlowMatching, OnBetas, Parameterisation
from patchdiffusion.sampling.config import Kind, SamplerConfig
from patchdiffusion.sampling.driver import Start, sample

# Of diffusers without accelerate, and of the inside of PyTorch.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*treespec.*:FutureWarning"),
]

DIT = DiTConfig(width=16, depth=1, heads=2, patch=(2, 2), num_classes=3)
SMALL_VAE: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "scaling_factor": 0.5,
}
UNET = UNetConfig(base=8, mult=(1, 2), blocks=1, attention=(1,))


def model_of(folder: Path, network: Network, precond: Parameterisation) -> Path:
    """A model folder with random weights."""
    config = ModelConfig(
        network=network, precond=precond, noise=precond.default_noise(), canvas=(8, 8)
    )
    built = config.head.build(network)
    with torch.no_grad():
        for index, parameter in enumerate(built.parameters()):
            generator = torch.Generator().manual_seed(index)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    save_model(folder, config, built.state_dict(), built.state_dict())
    return folder


def sampled(model: Model, count: int, config: SamplerConfig, **changes: Any) -> Tensor:
    """Output of the network of seeds 0, 1, ... as `sample` makes it, before it becomes pixels."""
    facts = model.config
    return sample(
        model.denoiser, seeds=range(count), channels=facts.network.channels, canvas=facts.canvas,
        config=config, kind=Kind.trained(facts.objective, facts.precond, facts.space),
        law=facts.noise, **changes,
    )  # fmt: skip


def pipeline_of(folder: Path, **options: Any) -> Any:
    pipeline = DiffusionPipeline.from_pretrained(folder, low_cpu_mem_usage=False, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# ---- diffusers ----


@pytest.mark.parametrize("network", [DIT, UNET], ids=["dit", "unet"])
def test_a_pipeline_of_ours(network: Network, tmp_path: Path, capsys: Capture) -> None:
    """The same images from seeds, and from noise; classes by number; other solvers."""
    run = model_of(tmp_path / "m", network, EDM())
    told = works(capsys, "export", run, "--to", "diffusers", "--out", tmp_path / "a")
    assert "trust_remote_code" in told and "Apache-2.0" in told
    pipeline, model = pipeline_of(tmp_path / "a", trust_remote_code=True), load_model(run)
    classes = bool(model.config.num_classes)
    cond = Cond(labels=torch.tensor([2, 0])) if classes else None
    expected = sampled(model, 2, SamplerConfig().but(steps=4, solver="dpmpp_2m"), cond=cond)
    options: Any = {"class_labels": [2, 0] if classes else None, "output_type": "latent"}
    options |= {"num_inference_steps": 4, "solver": "dpmpp_2m"}
    assert torch.equal(pipeline(2, **options).images, expected)
    z = noise(2, 3, 8, 8)
    start = Start(z * 80, 80.0, fresh=False)
    expected = sampled(model, 2, SamplerConfig().but(steps=4), cond=cond, start=start)
    options |= {"solver": None, "latents": z}
    assert (pipeline(**options).images - expected).abs().max() < 1e-5
    pipeline.save_pretrained(tmp_path / "b")
    images = pipeline(3, num_inference_steps=2).images
    assert [image.size for image in images] == [(8, 8)] * 3


def test_plain_ddim(tmp_path: Path, capsys: Capture) -> None:
    """A U-Net of diffusers goes in and out: the same weights, and DDIMPipeline of plain diffusers.

    It clips estimates, as `sample` does for such models.
    """
    network, scheduler = random_net("UNet2DModel"), DDIM(timestep_spacing="trailing")
    folder = folder_of(tmp_path / "a", network, scheduler)
    works(capsys, "import", folder, "--out", tmp_path / "m")
    told = works(capsys, "export", tmp_path / "m", "--out", tmp_path / "b")
    assert "plain diffusers" in told and "DDIMPipeline" in told
    pipeline = pipeline_of(tmp_path / "b")
    assert isinstance(pipeline, DDIMPipeline)
    state, exported = network.state_dict(), pipeline.unet.state_dict()
    assert all(torch.equal(exported[name], value) for name, value in state.items())
    clipped: Any = {"use_clipped_model_output": True, "output_type": "np"}
    generator = torch.Generator().manual_seed(1)
    clipped |= {"num_inference_steps": 5}
    images = pipeline(2, generator, **clipped)[0]
    config = sampler_of(scheduler.config, 5)
    sigma = float(config.sigmas()[0])
    start = Start(noise(2, 3, 8, 8) * (1 + sigma**2) ** 0.5, sigma, fresh=False)
    found = sampled(load_model(tmp_path / "m"), 2, replace(config, sigma_max=None), start=start)
    expected = torch.from_numpy(images).movedim(-1, 1)
    assert ((found / 2 + 0.5).clamp(0, 1) - expected).abs().max() < 1e-5


def test_coordinates_that_are_trained_need_a_pipeline_of_ours(
    tmp_path: Path, capsys: Capture
) -> None:
    folder = folder_of(tmp_path / "a", random_net("UNet2DModel"), DDIM())
    works(capsys, "import", folder, "--out", tmp_path / "m")
    model = load_model(tmp_path / "m")
    state = model.network.state_dict()
    state["unet.conv_in.coordinates.weight"] += 0.1
    save_model(tmp_path / "n", model.config, state, state)
    told = works(capsys, "export", tmp_path / "n", "--out", tmp_path / "b")
    assert "trust_remote_code" in told and "coordinates" in told
    pipeline, changed = (
        pipeline_of(tmp_path / "b", trust_remote_code=True),
        load_model(tmp_path / "n"),
    )
    config = SamplerConfig().but(steps=3)
    found = pipeline(2, num_inference_steps=3, output_type="latent").images
    assert torch.equal(found, sampled(changed, 2, config))


def test_dit_of_latents_with_its_autoencoder(tmp_path: Path, capsys: Capture) -> None:
    """DiTPipeline in, out as DiTPipeline, and the images that `sample` decodes."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKL(**SMALL_VAE).eval()
    scheduler = DDIM(timestep_spacing="trailing", clip_sample=False)
    network = random_net("DiTTransformer2DModel", in_channels=4, out_channels=8, norm_eps=1e-6)
    first: Any = DiTPipeline(network, vae, scheduler)  # pyright: ignore[reportArgumentType]
    first.save_pretrained(tmp_path / "a")
    told = works(capsys, "import", tmp_path / "a", "--out", tmp_path / "m")
    assert "of 16x16 pixels" in told
    told = works(capsys, "export", tmp_path / "m", "--out", tmp_path / "b")
    assert "DiTPipeline" in told and "trust" not in told
    pipeline = pipeline_of(tmp_path / "b")
    options: Any = {"guidance_scale": 1.0, "num_inference_steps": 5, "output_type": "np"}
    images = []
    for one in (first, pipeline):
        one.set_progress_bar_config(disable=True)
        images.append(one([3, 1], generator=torch.Generator().manual_seed(1), **options).images)
    assert abs(images[0] - images[1]).max() < 1e-5
    model, config = load_model(tmp_path / "m"), sampler_of(scheduler.config, 5)
    sigma = float(config.sigmas()[0])
    start = Start(noise(2, 4, 8, 8) * (1 + sigma**2) ** 0.5, sigma, fresh=False)
    x = sampled(model, 2, replace(config, sigma_max=None), start=start,
                cond=Cond(labels=torch.tensor([3, 1])))  # fmt: skip
    values = model.config.space.to_values(x)
    assert abs(values / 255 - images[0]).max() < 0.5 / 255 + 1e-4
    # Other settings of the latents need a pipeline of ours, which decodes the same images.
    facts = replace(model.config.space, mean=(0.1, 0.2, 0.3, 0.4))
    facts.found_in(tmp_path / "m")
    state = model.network.state_dict()
    save_model(tmp_path / "n", replace(model.config, space=facts), state, state)
    assert "mean" in works(capsys, "export", tmp_path / "n", "--out", tmp_path / "c")
    custom = pipeline_of(tmp_path / "c", trust_remote_code=True)
    found = custom(2, config=SamplerConfig().but(steps=2), output_type="np").images
    other = load_model(tmp_path / "n")
    x = sampled(other, 2, SamplerConfig().but(steps=2), cond=Cond(labels=torch.tensor([0, 1])))
    assert abs(other.config.space.to_values(x) / 255 - found).max() < 0.5 / 255 + 1e-4


# ---- One file ----


def test_one_file_goes_out_and_in(tmp_path: Path, capsys: Capture) -> None:
    run, file = model_of(tmp_path / "m", DIT, FlowMatching()), tmp_path / "a.safetensors"
    works(capsys, "export", run, "--to", "safetensors", "--out", file)
    works(capsys, "import", file, "--out", tmp_path / "n")
    before, after = load_model(run), load_model(tmp_path / "n")
    assert before.config == after.config
    for name, value in before.network.state_dict().items():
        assert torch.equal(after.network.state_dict()[name], value)
    assert "--kind" in fails(capsys, "import", file, "--kind", "dit", "--out", tmp_path / "o")
    tensors = load_file(file)
    for header, word in (("{", "configuration"), ('{"network": 3}', "network")):
        save_file(tensors, file, metadata={"patchdiffusion": header})
        assert word in fails(capsys, "import", file, "--out", tmp_path / "o")
    tensors.pop("head.bias")
    facts = json.loads((run / "config.json").read_text())
    kept = {name: facts[name] for name in ("network", "precond", "noise", "canvas")}
    save_file(tensors, file, metadata={"patchdiffusion": json.dumps(kept)})
    assert "head.bias" in fails(capsys, "import", file, "--out", tmp_path / "o")


# ---- Programs ----


def inputs_of(model: Model, batch: int, size: tuple[int, int]) -> dict[str, Tensor]:
    conditions = conditions_of(model, batch, size)
    if "labels" in conditions:
        conditions["labels"] = torch.arange(batch) % (model.config.num_classes + 1) - 1
    if "context" in conditions:
        conditions["context"] = noise(*conditions["context"].shape)
        conditions["context_mask"][0, 2:] = False
    return {
        "x": noise(batch, 3, *size),
        "sigma": torch.logspace(-1, 1, batch) if batch > 1 else torch.ones(1),
        **conditions,
    }


def expected_of(model: Model, inputs: dict[str, Tensor]) -> Tensor:
    rest = {name: value for name, value in inputs.items() if name not in ("x", "sigma")}
    with torch.no_grad():
        return model.denoiser(inputs["x"], inputs["sigma"], Cond(**rest))


def test_a_program_of_one_size() -> None:
    """Of networks that permit no other, in any batch: quick to trace."""
    network = DIT.build()
    config = ModelConfig(network=DIT, precond=EDM(), noise=EDM().default_noise(), canvas=(4, 4))
    torch.nn.init.normal_(network.head.weight)
    model = Model(config, network.requires_grad_(False), "")
    trace = _traced(model, model.denoiser, (4, 4), free=False)
    assert trace.dynamic == {"x": (0,), "sigma": (0,), "labels": (0,)}
    for batch in (1, 5):
        inputs = inputs_of(model, batch, (4, 4))
        found = trace.program.module()(*inputs.values())
        assert torch.allclose(found, expected_of(model, inputs), atol=1e-5)


@pytest.mark.slow
def test_torch_export(tmp_path: Path, capsys: Capture) -> None:
    """Of any batch and size, without this library."""
    run, file = model_of(tmp_path / "m", DIT, EpsDDPM()), tmp_path / "a.pt2"
    told = works(capsys, "export", run, "--to", "torch", "--out", file)
    assert "x, sigma, labels" in told and "batch, height, width" in told
    extra = {"patchdiffusion.json": ""}
    program = torch.export.load(str(file), extra_files=extra).module()
    facts, model = json.loads(extra["patchdiffusion.json"]), load_model(run)
    assert facts["inputs"] == ["x", "sigma", "labels"] and facts["weights"] == model.digest
    for batch, size in ((1, (8, 8)), (4, (8, 8)), (2, (14, 20)), (3, (24, 6))):
        inputs = inputs_of(model, batch, size)
        expected = expected_of(model, inputs)
        assert (program(*inputs.values()) - expected).abs().max() < 1e-5 * expected.abs().max()


NETWORKS: dict[str, tuple[Network, Parameterisation]] = {
    "unet": (UNET, EDM()),
    "edm2": (EDM2Config(base=8, mult=(1, 2), blocks=1, attention=(1,), head_width=8), EDM()),
    "dit": (DIT, OnBetas(prediction="v")),
    "tokens": (replace(DIT, context=12), FlowMatching()),
    "texts": (replace(DIT, text=ByteText(width=8, heads=2, depth=1)), FlowMatching()),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_onnx(name: str, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = load_model(model_of(tmp_path / "m", *NETWORKS[name]))
    save_onnx(traced(model), model, tmp_path / "a.onnx")
    session = runtime.InferenceSession(tmp_path / "a.onnx", providers=["CPUExecutionProvider"])
    for batch, size in ((1, (8, 8)), (4, (8, 8)), (2, (12, 20))):
        inputs = inputs_of(model, batch, size)
        feed = {key: value.numpy() for key, value in inputs.items()}
        found, expected = torch.from_numpy(session.run(None, feed)[0]), expected_of(model, inputs)
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


# ---- What cannot be exported ----


def test_what_cannot_be_exported_is_one_line(tmp_path: Path, capsys: Capture) -> None:
    run = model_of(tmp_path / "m", DIT, EDM())
    assert "exists" in fails(capsys, "export", run, "--out", run)
    assert ".onnx" in fails(capsys, "export", run, "--to", "onnx", "--out", tmp_path / "a.pt2")
    assert "--to" in fails(capsys, "export", run, "--to", "gguf", "--out", tmp_path / "a")
    assert "holds no run" in fails(capsys, "export", tmp_path, "--out", tmp_path / "a")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]
