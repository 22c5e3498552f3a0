import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import WanPipeline, WanTransformer3DModel
from huggingface_hub import HfApi, ModelCard, metadata_load, parse_eval_result_entries
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file

from hy_prfl.configs.prfl import PRFLTrainingConfig
from hy_prfl.configs.reward import RewardTrainingConfig
from hy_prfl.formats.layout import EXPERT_FOLDERS, LORA_FILES, ExpertName
from hy_prfl.formats.lora_metadata import lora_metadata, read_lora_metadata
from hy_prfl.formats.pipeline_info import PUBLISHED, PipelineInfo
from hy_prfl.hub.files import run_files
from hy_prfl.hub.model_card import OWN_CARD, PAPER, build_card, may_replace_card, write_model_card
from hy_prfl.hub.results import draw_training
from hy_prfl.hub.run_sources import SOURCES, find_base_pipeline, run_sources
from hy_prfl.hub.usage import ModelKind
from hy_prfl.inference.tiny_pipelines import build_pipeline
from hy_prfl.models.reward_model import WanRewardModel
from hy_prfl.runtime.provenance import run_record
from hy_prfl.trainers.prfl_trainer import PRFLTrainer
from hy_prfl.trainers.reward_trainer import RewardTrainer
from tests.hub.hub_server import HubServer, check_card


@pytest.fixture
def train(
    tmp_path: Path, pipeline_dir: Path, tiny_vae: str, write_latents: Callable[..., Path]
) -> Callable[..., Path]:
    """Function that makes a run of two steps and two validations: `train(RewardTrainer, **options)` -> its folder."""

    def run(trainer: type[RewardTrainer] | type[PRFLTrainer], **options: Any) -> Path:
        write_latents(tmp_path / "train", 6)
        write_latents(tmp_path / "validation", 4, seed=1)
        values: dict[str, Any] = {
            "output_dir": str(tmp_path / "out"),
            "pretrained_model_name_or_path": str(pipeline_dir),
            "train_dataset": str(tmp_path / "train"),
            "validation_dataset": str(tmp_path / "validation"),
            "validation_timesteps": [200, 900],
            "validation_steps": 1,
            "train_batch_size": 2,
            "max_train_steps": 2,
            "learning_rate": 1e-3,
            "report_to": ["none"],
        }
        if trainer is RewardTrainer:
            RewardTrainer.from_config(RewardTrainingConfig(**values, num_layers=2, **options)).train()
        else:
            transformer = WanTransformer3DModel.from_pretrained(pipeline_dir, subfolder="transformer")
            reward_model = WanRewardModel.from_transformer(transformer, num_layers=1, vae_fingerprint=tiny_vae)
            reward_model.save_pretrained(tmp_path / "reward")
            values |= {"reward_model": str(tmp_path / "reward"), "num_inference_steps": 3}
            PRFLTrainer.from_config(PRFLTrainingConfig(**values, **options)).train()
        return tmp_path / "out"

    return run


def section(text: str, title: str) -> str:
    return text.split(f"## {title}\n")[1].split("\n## ")[0]


def run_usage(card: ModelCard, **names: Any) -> dict[str, Any]:
    """Do what the card says, and return the names that its code defines."""
    code = re.search(r"```python\n(.*?)\n```", section(card.text, "Use"), re.DOTALL)
    assert code is not None
    exec(code[1], names)
    return names


def check_evaluation(card: ModelCard, metrics: dict[str, float]) -> None:
    """Every metric of the run, at every noise level, is a result in the card's `model-index`."""
    results = {
        (result.metric_type, (result.dataset_args or {}).get("timestep")): result.metric_value
        for result in card.data.eval_results
    }
    expected = {}
    for name, value in metrics.items():
        if name != "global_step":
            metric, _, timestep = name.partition("/t")
            expected[metric, int(timestep) if timestep else None] = value
    assert results.keys() == expected.keys()
    assert {timestep for _, timestep in results} == {None, 200, 900}
    for key, value in expected.items():
        assert results[key] == pytest.approx(value, abs=1e-6)
    sigmas = {result.dataset_args["sigma"] for result in card.data.eval_results if result.dataset_args}
    assert sigmas == {0.2, 0.9}


def check_common(card: ModelCard, run_dir: Path, directory: Path) -> None:
    assert check_card(card.content) == ([], [])
    card.validate(repo_type="model")
    # Its base is a folder: no code of diffusers can load it from the Hub.
    assert metadata_load(directory / "README.md")["library_name"] == "hy-prfl"
    assert "base_model" not in metadata_load(directory / "README.md")
    assert card.data.license == "apache-2.0"
    shown = re.search(r"```yaml\n(.*?)\n```", card.text, re.DOTALL)
    assert shown is not None
    assert yaml.safe_load(shown[1]) == yaml.safe_load((run_dir / "config.yaml").read_text())
    assert "arXiv:2511.21541" in section(card.text, "Citation")
    pixels = np.asarray(Image.open(directory / "training.png").convert("L"))
    assert pixels.std() > 5
    assert "(training.png)" in card.text


def test_reward_model(hub: HubServer, train: Callable[..., Path], tmp_path: Path) -> None:
    run_dir = train(RewardTrainer)
    files = run_files(run_dir)
    written = write_model_card(files, tmp_path, repo_id=str(run_dir / "best"))
    assert written == ["README.md", "training.png"]
    card = ModelCard.load(tmp_path / "README.md")
    check_common(card, run_dir, tmp_path)
    metrics = json.loads((run_dir / "best" / "metrics.json").read_text())
    check_evaluation(card, metrics)
    assert card.data.pipeline_tag == "video-classification"
    row = next(line for line in section(card.text, "Evaluation").splitlines() if line.startswith("| accuracy"))
    assert [float(cell) for cell in row.split("|")[2:5]] == pytest.approx(
        [metrics["accuracy/t200"], metrics["accuracy/t900"], metrics["accuracy"]], abs=5e-4
    )
    assert "`motion_quality`" in card.text

    names = run_usage(card)
    assert names["logits"].shape == (1,)
    saved = load_file(run_dir / "best" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in names["reward_model"].state_dict().items())


def test_adapter(hub: HubServer, train: Callable[..., Path], pipeline_dir: Path) -> None:
    run_dir = train(PRFLTrainer, lora_rank=2)
    write_model_card(run_files(run_dir), run_dir, repo_id=str(run_dir))
    card = ModelCard.load(run_dir / "README.md")
    check_common(card, run_dir, run_dir)
    validations = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in validations if any("validation/" in name for name in line)][-1]
    prefix = "validation/"
    check_evaluation(card, {n.removeprefix(prefix): v for n, v in last.items() if n.startswith(prefix)})
    assert card.data.pipeline_tag == "text-to-video"
    assert "lora" in card.data.tags

    transformer = run_usage(card)["pipeline"].transformer
    saved = load_file(run_dir / "pytorch_lora_weights.safetensors")
    loaded = {name: value for name, value in transformer.named_parameters() if "lora_" in name}
    assert len(loaded) == len(saved)
    for name, value in loaded.items():
        key = "transformer." + re.sub(r"\.default(_\d+)?\.", ".", name)
        assert torch.equal(saved[key], value), name


def test_transformer(hub: HubServer, train: Callable[..., Path]) -> None:
    run_dir = train(PRFLTrainer)
    write_model_card(run_files(run_dir), run_dir, repo_id=str(run_dir))
    card = ModelCard.load(run_dir / "README.md")
    check_common(card, run_dir, run_dir)
    pipeline = run_usage(card)["pipeline"]
    assert isinstance(pipeline, WanPipeline)
    saved = load_file(run_dir / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in pipeline.transformer.state_dict().items())


KINDS: dict[str, dict[str, Any]] = {
    "t2v": {},
    "i2v": {"image_to_video": True},
    "flf2v": {"image_to_video": True, "transformer_config": {"pos_embed_seq_len": 10}},
    "t2v-a14b": {"boundary_ratio": 0.875},
    "i2v-a14b": {"boundary_ratio": 0.9, "image_to_video": True},
    "ti2v-5b": {"expand_timesteps": True},
    "ti2v-5b as image-to-video": {"expand_timesteps": True, "image_to_video": True},
}
MODELS: dict[str, tuple[ModelKind, list[ExpertName]]] = {
    "reward": ("reward", []),
    "lora": ("lora", ["high_noise"]),
    "lora of the low-noise expert": ("lora", ["low_noise"]),
    "lora of both": ("lora", ["high_noise", "low_noise"]),
    "full": ("transformer", ["high_noise"]),
    "full, the low-noise expert": ("transformer", ["low_noise"]),
    "full, both": ("transformer", ["high_noise", "low_noise"]),
}
# A name that tells nothing of the kind.
BASE = "someone/base-model"


def save_model(folder: Path, kind: ModelKind, experts: list[ExpertName], options: dict[str, Any]) -> dict[str, Any]:
    """Save a tuned model of one kind; return its weights by where they belong."""
    tuned = build_pipeline(num_layers=3, seed=1, **options)
    if kind == "reward":
        model = WanRewardModel.from_transformer(tuned.transformer, num_layers=1)
        model.save_pretrained(folder)
        return {"reward_model": model.state_dict()}
    weights = {}
    for expert in experts:
        transformer = getattr(tuned, EXPERT_FOLDERS[expert])
        if kind == "transformer":
            transformer.save_pretrained(folder / EXPERT_FOLDERS[expert])
            weights[EXPERT_FOLDERS[expert]] = transformer.state_dict()
        else:
            transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
            layers = weights[EXPERT_FOLDERS[expert]] = get_peft_model_state_dict(transformer)
            WanPipeline.save_lora_weights(folder, transformer_lora_layers=layers, weight_name=LORA_FILES[expert])
    return weights


def visible(folder: Path) -> dict[str, Path]:
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("pipeline", KINDS)
def test_the_code_runs_for_every_kind(pipeline: str, model: str, tmp_path: Path) -> None:
    """As a stranger runs it, with nothing but the two names replaced; and what the Hub's own code is right for."""
    options, (kind, experts) = KINDS[pipeline], MODELS[model]
    if "low_noise" in experts and "boundary_ratio" not in options:
        return
    base = tmp_path / "base"
    build_pipeline(num_layers=3, **options).save_pretrained(base)
    folder = tmp_path / "model"
    weights = save_model(folder, kind, experts, options)
    config = {"pretrained_model_name_or_path": BASE, "reward_model": "someone/reward", "lora_rank": 2}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    info = PipelineInfo.read(str(base))
    sources = run_sources({"pretrained_model_name_or_path": str(base)}, info) | {"on_hub": [BASE]}
    recorded = find_base_pipeline("", None, sources)
    assert recorded is not None
    assert (recorded.is_image_to_video, recorded.last_image) == (info.is_image_to_video, info.last_image)
    record = run_record(seed=0) | {SOURCES: sources}
    (folder / "run.json").write_text(json.dumps([record]))

    card = build_card(kind, visible(folder), repo_id="user/name")
    assert check_card(card.content) == ([], [])
    assert card.data.base_model == BASE
    is_i2v = bool(options.get("image_to_video"))
    task = "image-to-video" if is_i2v else "text-to-video"
    assert card.data.pipeline_tag == ("video-classification" if kind == "reward" else task)
    # The Hub shows: DiffusionPipeline.from_pretrained(base).load_lora_weights(id), pipeline(prompt, one image at most).
    code_is_right = kind == "lora" and experts == ["high_noise"] and pipeline != "flf2v"
    assert card.data.library_name == ("diffusers" if code_is_right else "hy-prfl")

    found = re.search(r"```python\n(.*?)\n```", card.text, re.DOTALL)
    assert found is not None
    code = found[1].replace(BASE, str(base)).replace("user/name", str(folder))
    names: dict[str, Any] = {}
    exec(code, names)
    if kind == "reward":
        assert names["logits"].shape == (1,)
        loaded = {"reward_model": names["reward_model"].state_dict()}
    else:
        assert type(names["pipeline"]).__name__ == ("WanImageToVideoPipeline" if is_i2v else "WanPipeline")
        loaded = {place: getattr(names["pipeline"], place).state_dict() for place in weights}
        others = {"transformer", "transformer_2"} - weights.keys()
        assert all("lora_" not in name for place in others for name in state_dict(names["pipeline"], place))
    for place, saved in weights.items():
        for name, value in saved.items():
            known = loaded[place] if kind != "lora" else strip_adapter_names(loaded[place])
            assert torch.equal(known[name], value), (place, name)
    if pipeline == "flf2v" and kind != "reward":
        assert "last_image=last_image" in code


def state_dict(pipeline: Any, place: str) -> dict[str, torch.Tensor]:
    module = getattr(pipeline, place, None)
    return {} if module is None else module.state_dict()


def strip_adapter_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {re.sub(r"\.default(_\d+)?\.", ".", name): value for name, value in weights.items()}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_pipelines_are_known_offline(name: str, tmp_path: Path) -> None:
    """A LoRA's own file does not tell its task, nor does its name: 'TI2V' holds 'I2V', 'FLF2V' does not."""
    WanPipeline.save_lora_weights(
        tmp_path, transformer_lora_layers={"blocks.0.attn1.to_q.lora_A.weight": torch.ones(2, 4)}
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"pretrained_model_name_or_path": name}))
    card = build_card("lora", visible(tmp_path), repo_id="user/name")
    is_i2v = name.split("-")[2] in ("I2V", "FLF2V")
    assert card.data.pipeline_tag == ("image-to-video" if is_i2v else "text-to-video")
    assert f'{"WanImageToVideoPipeline" if is_i2v else "WanPipeline"}.from_pretrained("{name}")' in card.text
    assert card.data.base_model == name


@pytest.mark.parametrize(
    ("start", "belongs"),
    [
        ({"transformer_path": "mine"}, True),
        ({"lora_path": "old.safetensors", "lora_start": "merge"}, True),
        ({"lora_path": "old.safetensors", "lora_start": "continue"}, False),
    ],
)
def test_an_adapter_of_other_weights_than_the_pipelines(tmp_path: Path, start: dict[str, str], belongs: bool) -> None:
    WanPipeline.save_lora_weights(
        tmp_path, transformer_lora_layers={"blocks.0.attn1.to_q.lora_A.weight": torch.ones(2, 4)}
    )
    config = {"pretrained_model_name_or_path": "someone/wan", "reward_model": "r", "lora_rank": 2}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config | start))
    text = build_card("lora", visible(tmp_path), repo_id="user/name").text
    assert "The run started from the " in text
    assert next(iter(start.values())) in text
    assert ("**The adapter belongs to these weights**" in text) == belongs


def test_a_pipeline_that_nothing_tells_of(tmp_path: Path) -> None:
    """Then diffusers chooses the class when it loads, and the card has no task."""
    WanPipeline.save_lora_weights(
        tmp_path, transformer_lora_layers={"blocks.0.attn1.to_q.lora_A.weight": torch.ones(2, 4)}
    )
    for config in ({"pretrained_model_name_or_path": "someone/I2V", "revision": "v2"}, {}):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        card = build_card("lora", visible(tmp_path), repo_id="user/name")
        assert (card.data.pipeline_tag, card.data.base_model, card.data.library_name) == (None, None, "hy-prfl")
        assert check_card(card.content) == ([], [])
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump({"pretrained_model_name_or_path": "someone/I2V", "revision": "v2"})
    )
    text = build_card("lora", visible(tmp_path), repo_id="user/name").text
    assert 'DiffusionPipeline.from_pretrained("someone/I2V", revision="v2")' in text


PATHS = [
    "data/train",
    "weights/wan",
    "./x",
    "../x",
    "~/x",
    "C:\\x",
    "C:/x",
    "/data/m",
    "data/a/train",
    "data/train/",
    "clips",
]


@pytest.fixture
def reward_files(tmp_path: Path, pipeline_dir: Path) -> Callable[..., dict[str, Path]]:
    """Function that makes the files of a reward model whose run had these options, and this record."""

    def make(sources: dict[str, Any] | None = None, **config: str) -> dict[str, Path]:
        folder = tmp_path / "reward"
        transformer = WanTransformer3DModel.from_pretrained(pipeline_dir, subfolder="transformer")
        WanRewardModel.from_transformer(transformer, num_layers=1).save_pretrained(folder)
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        (folder / "metrics.json").write_text('{"global_step": 3, "accuracy": 0.75, "accuracy/t200": 0.5}')
        record = run_record(seed=0) | ({} if sources is None else {SOURCES: sources})
        (folder / "run.json").write_text(json.dumps([record]))
        return visible(folder)

    return make


def links(card: ModelCard) -> set[str]:
    """All that the Hub makes a link of, but for the paper."""
    data = card.data.to_dict()
    results = [result["dataset"]["type"] for model in data.get("model-index", []) for result in model["results"]]
    names = {data.get("base_model"), *(data.get("datasets") or []), *results} - {None, "local"}
    return names | set(re.findall(r"\]\(([^)]*)\)", card.text)) - {PAPER, "training.png"}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("recorded", [False, True])
def test_paths_become_no_links(
    reward_files: Callable[..., dict[str, Path]], path: str, recorded: bool, tmp_path: Path
) -> None:
    """Also where there is nothing at that path, as on another machine, and the form is that of an id."""
    options = {"pretrained_model_name_or_path": path, "train_dataset": path, "validation_dataset": path}
    files = reward_files({"on_hub": [], "pipeline": None} if recorded else None, **options)
    written = write_model_card(files, tmp_path, repo_id="user/name")
    card = ModelCard.load(tmp_path / "README.md")
    assert links(card) == set()
    assert check_card(card.content) == ([], [])
    assert path in card.text
    assert len(card.data.eval_results) == 2
    assert not any(name.startswith(".eval_results") for name in written)


def test_a_folder_wins_over_a_repository(
    reward_files: Callable[..., dict[str, Path]], hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the run recorded, what lies here, what the Hub has: in this order."""
    for name, kind in (("data/train", "datasets"), ("weights/wan", "models"), ("user/clips", "datasets")):
        hub.create(name, kind)
    options = {"pretrained_model_name_or_path": "weights/wan", "train_dataset": "data/train"}
    options |= {"validation_dataset": "user/clips"}
    build = partial(build_card, "reward", repo_id="user/name", api=HfApi())
    assert links(build(reward_files(**options))) == {"weights/wan", "data/train", "user/clips"}
    assert links(build(reward_files({"on_hub": ["user/clips"], "pipeline": None}, **options))) == {"user/clips"}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "train").mkdir(parents=True)
    assert links(build(reward_files(**options))) == {"weights/wan", "user/clips"}
    # A repository of the wrong kind, one that is private, one that is not there; a Hub that does not answer.
    hub.create("other/private", private=True)
    for name in ("user/clips", "other/private", "user/none"):
        assert links(build(reward_files(pretrained_model_name_or_path=name))) == set()
    hub.fail("GET", "/api/models/weights/wan", 500)
    assert links(build(reward_files(pretrained_model_name_or_path="weights/wan"))) == set()


def test_what_was_downloaded_is_on_the_hub(
    reward_files: Callable[..., dict[str, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    files = reward_files(pretrained_model_name_or_path="user/model", train_dataset="user/model")
    assert links(build_card("reward", files, repo_id="user/name")) == set()
    (tmp_path / "cache/models--user--model/snapshots/1").mkdir(parents=True)
    card = build_card("reward", files, repo_id="user/name")
    assert (card.data.base_model, card.data.datasets) == ("user/model", None)
    assert card.data.base_model_relation == "finetune"


def test_runs_record_their_sources(tmp_path: Path, i2v_pipeline_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "train").mkdir(parents=True)
    config = {
        "train_dataset": "data/train",
        "validation_dataset": "user/clips",
        "reward_model": "./x",
        "revision": None,
    }
    info = PipelineInfo.read(str(i2v_pipeline_dir))
    sources = run_sources(config | {"pretrained_model_name_or_path": str(i2v_pipeline_dir)}, info)
    assert sources["on_hub"] == ["user/clips"]
    assert sources["pipeline"] == {
        "class_name": "WanImageToVideoPipeline", "in_channels": 36, "out_channels": 16, "image_dim": 32,
        "pos_embed_seq_len": None,
    }  # fmt: skip
    assert json.loads(json.dumps(sources)) == sources
    # A trainer of given models needs no transformer there.
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model_index.json").write_text(json.dumps(dict(info.index)))
    sources = run_sources({"pretrained_model_name_or_path": "someone/base"}, PipelineInfo.read("base"))
    assert sources == {"on_hub": ["someone/base"], "pipeline": None}


OLD_RECORD = {"in_channels": 36, "out_channels": 16, "image_dim": 1280}


@pytest.mark.parametrize(
    ("record", "task", "line"),
    [
        (
            {"class_name": "WanImageToVideoPipeline", **OLD_RECORD, "pos_embed_seq_len": 514},
            "image-to-video",
            "pipeline(image=image, last_image=last_image, ",
        ),
        (
            {"class_name": "WanImageToVideoPipeline", **OLD_RECORD, "pos_embed_seq_len": None},
            "image-to-video",
            "pipeline(image=image, prompt",
        ),
        (
            {"class_name": "WanPipeline", "in_channels": 48, "out_channels": 48, "image_dim": None},
            "text-to-video",
            "WanPipeline.from_pretrained(",
        ),
        # Earlier versions recorded any class.
        ({"class_name": "WanVideoToVideoPipeline", "in_channels": 16}, None, "DiffusionPipeline.from_pretrained("),
    ],
)
def test_records_of_earlier_versions(record: dict[str, Any], task: str | None, line: str, tmp_path: Path) -> None:
    """As they are in `run.json` since runs record their sources."""
    WanPipeline.save_lora_weights(
        tmp_path, transformer_lora_layers={"blocks.0.attn1.to_q.lora_A.weight": torch.ones(2, 4)}
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"pretrained_model_name_or_path": BASE}))
    sources = {"on_hub": [BASE], "pipeline": record}
    (tmp_path / "run.json").write_text(json.dumps([run_record(seed=0) | {"sources": sources}]))
    card = build_card("lora", visible(tmp_path), repo_id="user/name")
    assert card.data.pipeline_tag == task
    assert line in card.text


def test_evaluation_in_the_newer_format(reward_files: Callable[..., dict[str, Path]], tmp_path: Path) -> None:
    """`.eval_results/*.yaml` as the client reads it, and as the Hub documents it."""
    sources = {"on_hub": ["user/clips"], "pipeline": None}
    files = reward_files(sources, validation_dataset="user/clips", task="motion_quality")
    written = write_model_card(files, tmp_path, repo_id="user/name")
    assert ".eval_results/hy_prfl.yaml" in written
    content = yaml.safe_load((tmp_path / ".eval_results/hy_prfl.yaml").read_text())
    assert content == [
        {
            "dataset": {"id": "user/clips", "task_id": "accuracy"},
            "value": 0.75,
            "notes": "motion_quality of noisy latents, all noise levels",
        },
        {
            "dataset": {"id": "user/clips", "task_id": "accuracy_t200"},
            "value": 0.5,
            "notes": "motion_quality of noisy latents, sigma 0.2",
        },
    ]
    assert [entry.task_id for entry in parse_eval_result_entries(content)] == ["accuracy", "accuracy_t200"]
    # Beside the older one.
    assert {result.metric_value for result in ModelCard.load(tmp_path / "README.md").data.eval_results} == {0.75, 0.5}


def test_metrics_that_are_not_finite_stay_out_of_the_model_index(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"_class_name": "WanRewardModel", "task": "blur_quality", "num_layers": 8})
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"validation_dataset": "user/clips"}))
    (tmp_path / "metrics.json").write_text('{"global_step": 3, "loss/t200": NaN, "loss/t400": 0.5}')
    (tmp_path / "run.json").write_text(json.dumps([run_record(seed=0) | {SOURCES: {"on_hub": ["user/clips"]}}]))
    files = {path.name: path for path in tmp_path.iterdir()}
    (result,) = build_card("reward", files, repo_id="user/x").data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_type) == ("loss", 0.5, "user/clips")


def test_nothing_to_draw_and_nothing_to_describe(tmp_path: Path) -> None:
    assert not draw_training([{"step": 1, "validation/loss": 1.0}], {}, tmp_path / "training.png")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="'user/x': no reward model, transformer or adapter"):
        write_model_card({"notes.txt": tmp_path / "notes.txt"}, tmp_path, repo_id="user/x")


def test_only_own_cards_are_replaced(tmp_path: Path) -> None:
    assert may_replace_card(None)
    (tmp_path / "README.md").write_text(f"# Model\n\n{OWN_CARD}\n")
    assert may_replace_card(tmp_path / "README.md")
    (tmp_path / "README.md").write_text("# Model\n")
    assert not may_replace_card(tmp_path / "README.md")


def save_lora_with_header(folder: Path, **header: Any) -> dict[str, Path]:
    folder.mkdir()
    weights = {"transformer.blocks.0.attn1.to_q.lora_A.weight": torch.ones(2, 4)}
    save_file(weights, folder / LORA_FILES["high_noise"], metadata=lora_metadata(step=3, **header) if header else None)
    return visible(folder)


@pytest.mark.parametrize("name", ["data/wan", "someone/base-model", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"])
def test_an_adapter_without_its_run_links_what_its_header_knows_to_be_on_the_hub(
    hub: HubServer, tmp_path: Path, name: str
) -> None:
    """On another machine, where a repository may have the name of the path that it was trained on."""
    hub.create(name, "models")
    linked = {}
    for told in (True, False, None):
        files = save_lora_with_header(tmp_path / str(told), base_model=name, base_on_hub=told)
        card = build_card("lora", files, repo_id="user/name", api=HfApi())
        assert name in card.text
        linked[told] = links(card)
    # The published pipelines are known by their names, also to older files, which do not tell.
    assert linked == {True: {name}, False: set(), None: {name} if name in PUBLISHED else set()}


def test_a_run_with_an_adapter_tells_whether_its_base_is_on_the_hub(train: Callable[..., Path]) -> None:
    run_dir = train(PRFLTrainer, lora_rank=2)
    assert read_lora_metadata(run_dir / LORA_FILES["high_noise"])["base_on_hub"] == "false"


@pytest.mark.parametrize("model", [name for name, (kind, _) in MODELS.items() if kind != "reward"])
def test_without_a_run_the_code_runs_and_nothing_is_claimed(model: str, tmp_path: Path) -> None:
    kind, experts = MODELS[model]
    folder = tmp_path / "model"
    weights = save_model(folder, kind, experts, {"boundary_ratio": 0.875})
    card = build_card(kind, visible(folder), repo_id=str(folder))
    assert "PRFL" not in card.text.split("## Licence")[0]
    assert "prfl" not in card.data.tags
    assert "How they were trained is not recorded." in card.text
    assert "None" not in card.text
    names = run_usage(card)
    for expert in experts:
        saved = weights[EXPERT_FOLDERS[expert]]
        if kind == "lora":
            loaded = names["lora_2" if expert == "low_noise" else "lora"]
            loaded = {name.removeprefix("transformer."): value for name, value in loaded.items()}
        else:
            loaded = names[EXPERT_FOLDERS[expert]].state_dict()
        assert loaded.keys() == saved.keys()
        assert all(torch.equal(loaded[name], value) for name, value in saved.items())


@pytest.mark.parametrize(
    ("model", "option", "part"),
    [
        ("full", None, "the transformer of"),
        ("full", "high_noise", "the high-noise expert (`transformer`) of"),
        ("full, the low-noise expert", "low_noise", "the low-noise expert (`transformer_2`) of"),
        ("full, both", "both", "the high-noise expert (`transformer`) and the low-noise expert (`transformer_2`) of"),
        ("lora", "high_noise", "A LoRA adapter of rank 2 for the high-noise expert (`transformer`) of"),
        ("lora of the low-noise expert", "low_noise", "for the low-noise expert (`transformer_2`) of"),
        (
            "lora of both",
            "both",
            "LoRA adapters of rank 2 for the high-noise expert (`transformer`) and the low-noise",
        ),
    ],
)
def test_the_text_names_the_expert(model: str, option: str | None, part: str, tmp_path: Path) -> None:
    kind, experts = MODELS[model]
    save_model(tmp_path, kind, experts, {"boundary_ratio": 0.875})
    config = {
        "pretrained_model_name_or_path": BASE,
        "reward_model": "someone/reward",
        "lora_rank": 2,
        "expert": option,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    card = build_card(kind, visible(tmp_path), repo_id="user/name")
    assert part in card.text
    assert "(PRFL, [paper]" in card.text


def test_a_run_without_reward_is_not_called_prfl(tmp_path: Path) -> None:
    save_model(tmp_path, "transformer", ["high_noise"], {})
    config = {"pretrained_model_name_or_path": BASE, "reward_model": "someone/reward"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**config, "update_schedule": "flow_matching"}))
    card = build_card("transformer", visible(tmp_path), repo_id="user/name")
    assert "with only the flow-matching loss, without a reward" in card.text
    assert "prfl" not in card.data.tags
