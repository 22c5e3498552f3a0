"""Model cards made from what a run leaves behind: what it is, how it was trained, how good it is, how to load it."""

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..flow_matching import NUM_TRAIN_TIMESTEPS
from ..models.experts import EXPERT_FOLDERS, LORA_FILES, ExpertName
from ..models.lora_metadata import read_lora_metadata
from ..provenance import CONFIG_FILE, METRICS_FILE, RUN_FILE


ModelKind = Literal["reward", "lora", "transformer"]
Task = Literal["video-classification", "text-to-video", "image-to-video"]
Metrics = dict[str, float]

CARD_FILE = "README.md"
PLOT_FILE = "training.png"

# A card without this line was written, or taken over, by a person, and is left alone.
OWN_CARD = "<!-- Written by hy_prfl and written again with every push; delete this line to keep your own changes. -->"
AT_TIMESTEP = re.compile(r"(?P<metric>.+)/t(?P<timestep>\d+)")
METRIC_NAMES = {"auc": "AUC", "f1": "F1"}
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
PROJECT_URL = "https://arxiv.org/abs/2511.21541"
CITATION = """@article{mi2025video,
  title={Video Generation Models are Good Latent Reward Models},
  author={Mi, Xiaoyue and Yu, Wenqing and Lian, Jiesong and Jie, Shibo and Zhong, Ruizhe and Liu, Zijun and Zhang, Guozhen and Zhou, Zixiang and Xu, Zhiyong and Zhou, Yuan and Lu, Qinglin and Tang, Fan},
  journal={arXiv preprint arXiv:2511.21541},
  year={2025}
}"""


def model_kind(files: Mapping[str, Path]) -> ModelKind | None:
    """What a repository holds, by its files (path in it -> file); None if it is no model of this package."""
    if experts_of("lora", files):
        return "lora"
    if experts_of("transformer", files):
        return "transformer"
    name = _read_json(files, "config.json").get("_class_name")
    return "reward" if name == "WanRewardModel" else None


def experts_of(kind: ModelKind, files: Mapping[str, Path]) -> dict[ExpertName, str]:
    """
    File of the adapter, or of the transformer's configuration, of each expert that a repository has.

    A model of a pipeline of one transformer counts as its high-noise expert.
    """
    names = LORA_FILES if kind == "lora" else {name: f"{each}/config.json" for name, each in EXPERT_FOLDERS.items()}
    return {} if kind == "reward" else {expert: name for expert, name in names.items() if name in files}


def may_replace_card(path: Path | None) -> bool:
    """Whether there is no card yet, or one made by this package that nobody has taken over."""
    return path is None or OWN_CARD in path.read_text(encoding="utf-8")


def write_model_card(
    files: Mapping[str, Path], directory: Path, *, repo_id: str, license: str = "apache-2.0"
) -> list[str]:
    """
    Write `README.md`, and `training.png` if there are metrics to draw, for a model.

    Args:
        files (`Mapping[str, Path]`):
            The repository that the card is for: path in it -> file; see [`~hy_prfl.hub.files.run_files`]. Read are
            `config.yaml`, `metrics.jsonl`, `metrics.json` of the best model and the model's `config.json`, as far as
            they are there.
        directory (`Path`):
            Folder to write into.
        repo_id (`str`):
            What the card says to load: `user/name`, or a path.
        license (`str`, defaults to `"apache-2.0"`):
            Licence of the weights. Wan's is the default; weights made from others may need another one.

    Returns:
        `list[str]`: names of the files written.

    Raises:
        ValueError: If there is no model among the files.
    """
    kind = model_kind(files)
    if kind is None:
        raise ValueError(f"'{repo_id}': no reward model, transformer or adapter among {sorted(files)[:5]}.")
    history = _read_history(files)
    has_plot = draw_training(history, best_metrics(files), directory / PLOT_FILE)
    card = build_card(kind, files, repo_id=repo_id, license=license, has_plot=has_plot)
    temporary = directory / f".{CARD_FILE}.tmp"
    card.save(temporary)
    temporary.replace(directory / CARD_FILE)
    return [CARD_FILE, PLOT_FILE] if has_plot else [CARD_FILE]


def build_card(
    kind: ModelKind, files: Mapping[str, Path], *, repo_id: str, license: str = "apache-2.0", has_plot: bool = False
) -> ModelCard:
    """The card as an object, with its evaluation as `eval_results`; the arguments are those of `write_model_card`."""
    config = _read_config(files)
    experts = experts_of(kind, files)
    if kind == "lora":
        config = _known_of_adapter(read_lora_metadata(files[next(iter(experts.values()))])) | config
    model_config = _read_json(files, next(iter(experts.values())) if kind == "transformer" else "config.json")
    metrics = best_metrics(files)
    base_model = str(config.get("pretrained_model_name_or_path") or "")
    datasets = [str(config[name]) for name in ("train_dataset", "prompt_dataset") if config.get(name)]
    is_i2v = model_config.get("image_dim") is not None or _is_image_to_video(base_model)
    generates: Task = "image-to-video" if is_i2v else "text-to-video"
    task: Task = "video-classification" if kind == "reward" else generates
    data = ModelCardData(
        base_model=base_model if _is_hub_id(base_model) else None,
        base_model_relation=None if not _is_hub_id(base_model) else "adapter" if kind == "lora" else "finetune",
        datasets=[name for name in datasets if _is_hub_id(name)] or None,
        eval_results=eval_results(task, config, metrics) or None,
        library_name="diffusers",
        license=license,
        model_name=repo_id.split("/")[-1],
        pipeline_tag=task,
        tags=["hy_prfl", "wan", "reward-model" if kind == "reward" else "prfl", *(["lora"] if kind == "lora" else [])],
    )
    sections = [
        f"# {data.model_name}",
        OWN_CARD,
        _introduction(kind, config, model_config),
        "## Use\n\n```python\n"
        + usage(kind, repo_id, base_model, image_to_video=is_i2v, experts=list(experts))
        + "\n```",
        _training_section(config, datasets),
        _evaluation_section(kind, config, metrics),
        f"![Training curves, and evaluation against the timestep]({PLOT_FILE})" if has_plot else "",
        _configuration_section(config, model_config),
        _origin_section(files),
        f"## Licence\n\n{license}. These weights are made from {base_model or 'a base model'}, whose licence also holds.",
        f"## Citation\n\n```bibtex\n{CITATION}\n```",
    ]
    text = "\n\n".join(section for section in sections if section)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n")


def usage(
    kind: ModelKind,
    repo_id: str,
    base_model: str,
    *,
    image_to_video: bool,
    experts: Sequence[ExpertName] = ("high_noise",),
) -> str:
    """Python code that loads the model."""
    if kind == "reward":
        inputs = "noisy_latents, timesteps, prompt_embeds"
        if image_to_video:
            inputs = "torch.cat([noisy_latents, condition], dim=1), timesteps, prompt_embeds, image_embeds"
        return (
            ("import torch\n" if image_to_video else "") + "from hy_prfl import WanRewardModel\n\n"
            f'reward_model = WanRewardModel.from_pretrained("{repo_id}").eval()\n'
            f"logits = reward_model({inputs}).logits  # any timestep in [0, 1000]"
        )
    pipeline = "WanImageToVideoPipeline" if image_to_video else "WanPipeline"
    if kind == "lora":
        low_noise = f', weight_name="{LORA_FILES["low_noise"]}", load_into_transformer_2=True'
        loads = [f'pipeline.load_lora_weights("{repo_id}"{low_noise * (each == "low_noise")})' for each in experts]
        lines = [
            f"from diffusers import {pipeline}\n",
            f'pipeline = {pipeline}.from_pretrained("{base_model}")',
            *loads,
        ]
        return "\n".join(lines)
    folders = [EXPERT_FOLDERS[each] for each in experts]
    tuned = [f'{each} = WanTransformer3DModel.from_pretrained("{repo_id}", subfolder="{each}")' for each in folders]
    arguments = ", ".join(f"{each}={each}" for each in folders)
    return "\n".join(
        [
            f"from diffusers import {pipeline}, WanTransformer3DModel\n",
            *tuned,
            f'pipeline = {pipeline}.from_pretrained("{base_model}", {arguments})',
        ]
    )


def best_metrics(files: Mapping[str, Path]) -> Metrics:
    """Metrics of the model that is published: the best one's own, or else those of the last validation."""
    best = _read_json(files, "metrics.json")
    if best:
        return {name: value for name, value in best.items() if isinstance(value, (int, float))}
    validations = [entry for entry in _read_history(files) if any(name.startswith("validation/") for name in entry)]
    if not validations:
        return {}
    last = {
        name.removeprefix("validation/"): value for name, value in validations[-1].items() if "validation/" in name
    }
    return {"global_step": validations[-1]["step"], **last}


def eval_results(task: Task, config: Mapping[str, Any], metrics: Metrics) -> list[EvalResult]:
    """The metrics at each noise level, and their means, as the Hub's `model-index` wants them."""
    if not metrics or not config.get("validation_dataset"):
        return []
    dataset = str(config["validation_dataset"])
    subject = f"{config.get('task')} of noisy latents" if task == "video-classification" else "reward of samples"
    results = []
    for name, value in metrics.items():
        if name == "global_step" or not math.isfinite(value):
            continue
        at = AT_TIMESTEP.fullmatch(name)
        metric = at["metric"] if at else name
        sigma = None if at is None else int(at["timestep"]) / NUM_TRAIN_TIMESTEPS
        level = "all noise levels" if at is None else f"sigma {sigma:g}"
        pretty = METRIC_NAMES.get(metric, metric.replace("_", " ").capitalize())
        results.append(
            EvalResult(
                task_type=task,
                task_name=f"{subject}, {level}",
                dataset_type=dataset if _is_hub_id(dataset) else Path(dataset).name,
                dataset_name=Path(dataset).name,
                dataset_config=level,
                dataset_args=None if at is None else {"timestep": int(at["timestep"]), "sigma": sigma},
                metric_type=metric,
                metric_name=f"{pretty}, mean" if at is None else f"{pretty} at {level}",
                metric_value=round(float(value), 6),
            )
        )
    return results


def draw_training(history: list[Metrics], metrics: Metrics, path: Path) -> bool:
    """
    Draw every training curve against the step, and every metric against the timestep, into a PNG.

    Returns:
        `bool`: whether there was anything to draw.
    """
    curves: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for entry in history:
        for name, value in entry.items():
            if name.startswith("train/"):
                curves[name.removeprefix("train/")].append((entry["step"], value))
    levels: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for name, value in metrics.items():
        at = AT_TIMESTEP.fullmatch(name)
        if at:
            levels[at["metric"]].append((int(at["timestep"]), value))
    panels = [(f"training: {name}", "step", points) for name, points in curves.items()]
    panels += [(f"evaluation: {name}", "timestep", sorted(points)) for name, points in levels.items()]
    if not panels:
        return False
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    # Not pyplot: it keeps every figure, and may be drawn from one thread only.
    figure = Figure(figsize=(4 * columns, 2.8 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for index, (name, axis, points) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, index + 1)
        axes.plot(*zip(*points, strict=True), marker="o" if axis == "timestep" or len(points) == 1 else None)
        axes.set_title(name)
        axes.set_xlabel(axis)
        axes.grid(visible=True, alpha=0.3)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png", dpi=100)
    temporary.replace(path)
    return True


def _introduction(kind: ModelKind, config: Mapping[str, Any], model_config: Mapping[str, Any]) -> str:
    base = config.get("pretrained_model_name_or_path") or "a Wan transformer"
    if kind == "reward":
        return (
            f"Scores noisy video latents at any timestep of the sampling chain, without decoding a video (PAVRM, "
            f"[paper]({PROJECT_URL})). The sigmoid of its logit is the probability that `{model_config['task']}` of the "
            f"clean clip is good. Made of the first {model_config['num_layers']} blocks of {base}."
        )
    what = f"A LoRA adapter of rank {config.get('lora_rank')} for" if kind == "lora" else "All weights of"
    return (
        f"{what} the transformer of {base}, fine-tuned with process reward feedback (PRFL, [paper]({PROJECT_URL})) on "
        f"the reward model `{config.get('reward_model', 'unknown')}`."
    )


def _training_section(config: Mapping[str, Any], datasets: list[str]) -> str:
    if not datasets:
        return ""
    lines = [f"Training data: {', '.join(f'`{name}`' for name in datasets)}."]
    if "loss" in config:
        lines.append(f"Label: `{config.get('task')}`. Loss: `{config['loss']}`.")
    if "reward_loss" in config:
        lines.append(f"Updates: `{config.get('update_schedule')}`. Reward loss: `{config['reward_loss']}`.")
    lines.append(f"Noise levels: `{config.get('weighting_scheme')}` with shift {config.get('flow_shift')}.")
    return "## Training\n\n" + "  \n".join(lines)


def _evaluation_section(kind: ModelKind, config: Mapping[str, Any], metrics: Metrics) -> str:
    rows: dict[str, dict[int, float]] = defaultdict(dict)
    for name, value in metrics.items():
        at = AT_TIMESTEP.fullmatch(name)
        if at:
            rows[at["metric"]][int(at["timestep"])] = value
    if not rows:
        return ""
    timesteps = sorted({timestep for row in rows.values() for timestep in row})
    subject = "clips" if kind == "reward" else "prompts; the reward is the training reward, no measure of quality"
    lines = [
        f"## Evaluation\n\nOn held-out {subject} (`{config.get('validation_dataset')}`), after step "
        f"{int(metrics['global_step'])}, by timestep (1000 * sigma; 1000 is pure noise).\n",
        "| | " + " | ".join(str(timestep) for timestep in timesteps) + " | mean |",
        "|---" * (len(timesteps) + 2) + "|",
    ]
    for metric, row in rows.items():
        cells = [f"{row[timestep]:.3f}" if timestep in row else "" for timestep in timesteps]
        mean = f"{metrics[metric]:.3f}" if metric in metrics else ""
        lines.append(f"| {METRIC_NAMES.get(metric, metric)} | {' | '.join(cells)} | {mean} |")
    return "\n".join(lines)


def _configuration_section(config: Mapping[str, Any], model_config: Mapping[str, Any]) -> str:
    parts = []
    if config:
        text = yaml.safe_dump(dict(config), sort_keys=False).strip()
        parts.append(f"<details><summary>Of the run</summary>\n\n```yaml\n{text}\n```\n\n</details>")
    if model_config:
        text = json.dumps(model_config, indent=2)
        parts.append(f"<details><summary>Of the model</summary>\n\n```json\n{text}\n```\n\n</details>")
    return "## Configuration\n\n" + "\n\n".join(parts) if parts else ""


def _origin_section(files: Mapping[str, Path]) -> str:
    """With what the run was started, and last continued."""
    records = json.loads(files[RUN_FILE].read_text(encoding="utf-8")) if RUN_FILE in files else []
    if not records:
        return ""
    last = records[-1]
    versions = {"hy_prfl": last["hy_prfl"], "python": last["python"], **last["libraries"]}
    git = f" Commit {last['git']['commit']}{', with changes' if last['git']['dirty'] else ''}." if last["git"] else ""
    software = ", ".join(f"{name} {version}" for name, version in versions.items() if version is not None)
    return f"## Origin\n\nStarted {last['started']} with seed {last['seed']}.{git} Software: {software}."


def _known_of_adapter(header: Mapping[str, str]) -> dict[str, Any]:
    """What the header of an adapter's file tells, by the names of the run's configuration."""
    names = {"base_model": "pretrained_model_name_or_path", "reward_model": "reward_model", "rank": "lora_rank"}
    return {name: header[key] for key, name in names.items() if key in header}


def _is_image_to_video(base_model: str) -> bool:
    index = Path(base_model) / "model_index.json"
    if not index.is_file():
        return "I2V" in base_model
    return json.loads(index.read_text(encoding="utf-8"))["_class_name"] == "WanImageToVideoPipeline"


def _is_hub_id(name: str) -> bool:
    """Whether a name in a configuration is one of the Hub, and no path here."""
    return HUB_ID.fullmatch(name) is not None and not name.startswith(".") and not Path(name).exists()


def _read_json(files: Mapping[str, Path], name: str) -> dict[str, Any]:
    return json.loads(files[name].read_text(encoding="utf-8")) if name in files else {}


def _read_config(files: Mapping[str, Path]) -> dict[str, Any]:
    return yaml.safe_load(files[CONFIG_FILE].read_text(encoding="utf-8")) if CONFIG_FILE in files else {}


def _read_history(files: Mapping[str, Path]) -> list[Metrics]:
    if METRICS_FILE not in files:
        return []
    return [json.loads(line) for line in files[METRICS_FILE].read_text(encoding="utf-8").splitlines()]
