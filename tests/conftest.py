"""Fixtures: tiny pipelines made of the real classes, and real mp4 files. Nothing is mocked, nothing is fetched."""

# Nothing may be fetched; the Hub's client reads this when it is imported.
import os


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Tests run side by side, each on one core. So do the processes that they start.
os.environ["OMP_NUM_THREADS"] = "1"
# The CPU only, also where there are GPUs: what is computed twice to be compared is computed on the same device.
# pytest-xdist's workers inherit the environment of the process that starts them, in which the GPUs are hidden already.
os.environ.setdefault("GPUS_OF_TESTS", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from datasets import Dataset
from diffusers import AutoencoderKLWan, WanTransformer3DModel

from hy_prfl.data.encoding import vae_fingerprint
from hy_prfl.data.schema import latent_features, pack_tensor, rows_to_table
from hy_prfl.inference.tiny_pipelines import build_pipeline
from tests.hub.hub_server import HubServer, running_hub, use_in_this_process


torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fresh_accelerate_state() -> Iterator[None]:
    """Forget the process-wide state of Accelerate, as if each test were a process of its own."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="session", autouse=True)
def compiled_kernels(tmp_path_factory: pytest.TempPathFactory) -> None:
    """
    Compile DeepSpeed's kernels once for all processes of this run of the tests, which takes a minute of CPU.

    Not in the user's folder: a process that is killed while it compiles leaves a lock that all later ones wait for. To
    keep kernels between runs, set `TORCH_EXTENSIONS_DIR`.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(folder / "torch_extensions"))


@pytest.fixture(scope="session")
def pipeline_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny text-to-video `WanPipeline`, with 3 transformer blocks. Do not write into it."""
    folder = tmp_path_factory.mktemp("t2v") / "pipeline"
    build_pipeline(num_layers=3).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def i2v_pipeline_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny `WanImageToVideoPipeline`, with 3 transformer blocks. Do not write into it."""
    folder = tmp_path_factory.mktemp("i2v") / "pipeline"
    build_pipeline(num_layers=3, image_to_video=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def expert_pipeline_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny `WanPipeline` of two experts, boundary 0.875, 3 blocks each. Do not write into it."""
    folder = tmp_path_factory.mktemp("experts") / "pipeline"
    build_pipeline(num_layers=3, boundary_ratio=0.875).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def flf2v_pipeline_dir(i2v_pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the same with a transformer for the first and the last frame, as Wan2.1 FLF2V. Do not write into it."""
    folder = tmp_path_factory.mktemp("flf2v") / "pipeline"
    shutil.copytree(i2v_pipeline_dir, folder)
    config = WanTransformer3DModel.load_config(folder / "transformer")
    torch.manual_seed(0)
    # The tiny CLIP makes 5 tokens of an image.
    transformer = WanTransformer3DModel.from_config({**config, "pos_embed_seq_len": 10})
    torch.nn.init.normal_(transformer.condition_embedder.image_embedder.pos_embed)
    transformer.save_pretrained(folder / "transformer")
    return folder


@pytest.fixture(scope="session")
def write_video() -> Callable[..., Path]:
    """
    Function that writes a real H.264 mp4: `write_video(path, num_frames=9, height=32, width=48, fps=16, seed=0)`.

    A bright square moves over a dark ground; where it starts and how bright it is depends on the seed.
    """

    def write(
        path: Path, num_frames: int = 9, height: int = 32, width: int = 48, fps: int = 16, seed: int = 0
    ) -> Path:
        rng = np.random.default_rng(seed)
        top, left = rng.integers(0, height // 2), rng.integers(0, width // 2)
        color = rng.integers(120, 255, size=3)
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(path), mode="w") as container:
            stream = container.add_stream("libx264", rate=Fraction(fps))
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for index in range(num_frames):
                image = np.full((height, width, 3), 20, dtype=np.uint8)
                shift = index % (width // 2)
                image[top : top + height // 3, left + shift : left + shift + width // 4] = color
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode(None))
        return path

    return write


@pytest.fixture(scope="session")
def tiny_vae(pipeline_dir: Path) -> str:
    """Fingerprint of the VAE that both tiny pipelines have."""
    return vae_fingerprint(AutoencoderKLWan.from_pretrained(pipeline_dir, subfolder="vae"))


@pytest.fixture(scope="session")
def write_latents(tiny_vae: str) -> Callable[..., Path]:
    """
    Function that writes a latent dataset without encoding any video: `write_latents(path, num_rows=8, ...)`.

    Good rows are brighter than poor ones, so a reward model can learn the label. Shapes fit the tiny pipelines:
    text width 32, image width 32. `overrides` maps a row's index to columns that replace the usual ones.
    """

    def write(
        path: Path,
        num_rows: int = 8,
        *,
        image_to_video: bool = False,
        prompts_only: bool = False,
        shapes: Sequence[tuple[int, int, int]] = ((2, 4, 4),),
        overrides: Mapping[int, Mapping[str, object]] | None = None,
        seed: int = 0,
    ) -> Path:
        rng = np.random.default_rng(seed)
        rows = []
        for index in range(num_rows):
            label = index % 2
            num_frames, height, width = shapes[index % len(shapes)]
            size = (num_frames, height, width)
            tensors = {
                "latents": None if prompts_only else rng.normal(label - 0.5, 0.5, (16, *size)),
                "prompt_embeds": rng.normal(size=(3 + index // 2, 32)),
                "null_prompt_embeds": np.full((1, 32), 0.5),
                "image_embeds": rng.normal(size=(5, 32)) if image_to_video else None,
                "condition": rng.normal(size=(20, *size)) if image_to_video else None,
            }
            row: dict[str, object] = {
                "id": f"clip-{index}",
                "prompt": f"prompt {index // 2}",
                "physics_quality": label,
                "human_quality": label,
                "num_frames": 4 * num_frames - 3,
                "height": 8 * height,
                "width": 8 * width,
                "fps": 16.0,
                "max_sequence_length": 16,
                "vae_fingerprint": tiny_vae,
                "text_encoder_fingerprint": "tiny",
            }
            for name, array in tensors.items():
                row |= pack_tensor(name, array, "float16", source=str(index))
            row["latents_shape"] = [16, *size]
            rows.append(dict.fromkeys(latent_features()) | row | dict((overrides or {}).get(index, {})))
        Dataset(rows_to_table(rows)).save_to_disk(path)
        return path

    return write


@pytest.fixture(scope="session")
def gpu_environment() -> dict[str, str]:
    """Environment of a process that sees the GPUs, which the tests' own process does not."""
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    visible = os.environ["GPUS_OF_TESTS"]
    return environment if visible == "all" else environment | {"CUDA_VISIBLE_DEVICES": visible}


@pytest.fixture(scope="session")
def accelerate_launch() -> Callable[..., str]:
    """
    Function that runs a script as users do: `accelerate_launch("score", *options, num_processes=1)` -> its output.

    With two processes there are really two, over gloo. A failure raises, with all that was printed.
    """
    root = Path(__file__).parents[1]

    def launch(script: str, *options: object, num_processes: int = 1) -> str:
        config = root / "accelerate_configs" / ("cpu.yaml" if num_processes == 1 else "ddp_cpu.yaml")
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
        command = [*launcher, "-m", f"hy_prfl.scripts.{script}", *map(str, options)]
        environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
        finished = subprocess.run(command, cwd=root, env=environment, text=True, capture_output=True, timeout=300)
        if finished.returncode:
            raise RuntimeError(f"{finished.stdout}\n{finished.stderr}")
        return finished.stdout + finished.stderr

    return launch


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A local Hub that libraries in this process use."""
    with running_hub() as server:
        use_in_this_process(server, tmp_path / "home", monkeypatch)
        yield server
