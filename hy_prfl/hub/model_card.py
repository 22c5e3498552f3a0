"""Model cards made from the files of a run: what the model is, how it was trained, how good it is, how to load it."""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml
from huggingface_hub import HfApi, ModelCard, ModelCardData, eval_result_entries_to_yaml

from ..configs.base import names_in
from ..formats.layout import EXPERT_FOLDERS, LORA_FILES, ExpertName
from ..formats.lora_metadata import read_lora_metadata
from ..formats.pipeline_info import PUBLISHED, PipelineInfo
from ..runtime.atomic_writes import replacing
from ..runtime.provenance import CONFIG_FILE, RUN_FILE
from .results import (
    EVAL_RESULTS_FILE,
    best_metrics,
    draw_training,
    eval_result_entries,
    eval_results,
    metric_table,
    read_history,
)
from .run_sources import find_base_pipeline, is_on_hub, recorded_sources
from .usage import ModelKind, usage


Task = Literal["video-classification", "text-to-video", "image-to-video"]

CARD_FILE, PIPELINE_INDEX = "README.md", "model_index.json"
PLOT_FILE = "training.png"
TEMPLATE = Path(__file__).with_name("model_card.md")

# A card without this line was written or edited by a person, and is not replaced.
OWN_CARD = "<!-- Written by hy_prfl and written again with every push; delete this line to keep your own changes. -->"
BASE, TRAINING_DATA = "pretrained_model_name_or_path", ("train_dataset", "prompt_dataset")
WORDS: dict[ExpertName, str] = {"high_noise": "high-noise", "low_noise": "low-noise"}
PAPER = "https://arxiv.org/abs/2511.21541"


def model_kind(files: Mapping[str, Path]) -> ModelKind | None:
    """Kind of model in a repository, from its files (path in it -> file). None if this package did not make it."""
    if PIPELINE_INDEX in files:
        return None
    if experts_of("lora", files):
        return "lora"
    if experts_of("transformer", files):
        return "transformer"
    return "reward" if has_class(files, "WanRewardModel") else None


def has_class(files: Mapping[str, Path], name: str) -> bool:
    """Whether the model at the root of a repository has the class with this name."""
    return _read_json(files, "config.json").get("_class_name") == name


def experts_of(kind: ModelKind, files: Mapping[str, Path]) -> dict[ExpertName, str]:
    """
    For each expert in a repository, the file of its adapter or of its transformer's configuration.

    The only transformer of a pipeline counts as the high-noise expert.
    """
    names = LORA_FILES if kind == "lora" else {name: f"{each}/config.json" for name, each in EXPERT_FOLDERS.items()}
    return {} if kind == "reward" else {expert: name for expert, name in names.items() if name in files}


def may_replace_card(path: Path | None) -> bool:
    """Whether there is no card yet, or one that this package wrote and nobody has edited."""
    return path is None or OWN_CARD in path.read_text(encoding="utf-8")


def write_model_card(
    files: Mapping[str, Path],
    directory: Path,
    *,
    repo_id: str,
    license: str = "apache-2.0",
    api: HfApi | None = None,
) -> list[str]:
    """
    Write `README.md`, `training.png` if there are metrics to draw, and `.eval_results/hy_prfl.yaml` if they were
    measured on a dataset on the Hub.

    Args:
        files (`Mapping[str, Path]`):
            Files of the repository: path in it -> file; see [`~hy_prfl.hub.files.run_files`]. `config.yaml`, `run.json`,
            `metrics.jsonl`, `metrics.json` of the best model and the model's `config.json` are read if they exist.
        directory (`Path`):
            Folder to write into.
        repo_id (`str`):
            Name that the code on the card loads: `user/name`, or a path.
        license (`str`, defaults to `"apache-2.0"`):
            Licence of the weights. The default is Wan's; weights made from another model may need another licence.
        api (`HfApi`, *optional*):
            Client to look up base model and datasets on the Hub. Used for a run that did not record where they are.

    Returns:
        `list[str]`: names of the files written.

    Raises:
        ValueError: If the files contain no model.
    """
    kind = model_kind(files)
    if kind is None:
        raise ValueError(f"'{repo_id}': no reward model, transformer or adapter among {sorted(files)[:5]}.")
    has_plot = draw_training(read_history(files), best_metrics(files), directory / PLOT_FILE)
    card = build_card(kind, files, repo_id=repo_id, license=license, has_plot=has_plot, api=api)
    with replacing(directory / CARD_FILE) as temporary:
        card.save(temporary)
    names = [CARD_FILE, PLOT_FILE] if has_plot else [CARD_FILE]
    entries = eval_result_entries(card.data.get("eval_results") or [])
    if entries:
        path = directory / EVAL_RESULTS_FILE
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False), encoding="utf-8")
        names.append(EVAL_RESULTS_FILE)
    return names


def build_card(
    kind: ModelKind,
    files: Mapping[str, Path],
    *,
    repo_id: str,
    license: str = "apache-2.0",
    has_plot: bool = False,
    api: HfApi | None = None,
) -> ModelCard:
    """The card as an object, with its evaluation as `eval_results`. See `write_model_card` for the arguments."""
    config, experts, recorded = _read_config(files), list(experts_of(kind, files).items()), recorded_sources(files)
    model_file = experts[0][1] if experts else "config.json"
    header = read_lora_metadata(files[model_file]) if kind == "lora" else {}
    if kind == "lora" and BASE not in config:
        recorded = {"on_hub": _base_on_hub(header), **recorded}
    config = _known_of_adapter(header) | config
    model_config = {} if kind == "lora" else _read_json(files, model_file)

    @cache
    def known_to_hub(name: str, repo_type: str) -> bool:
        return is_on_hub(name, repo_type, recorded, api)

    def on_hub(option: str) -> bool:
        """Whether all that an option names are repositories."""
        found = names_in(config.get(option))
        return bool(found) and all(known_to_hub(name, "model" if option == BASE else "dataset") for name in found)

    base_model, metrics = str(config.get(BASE) or ""), best_metrics(files)
    # A local path that is gone must not be looked up on the Hub: another repository may have the same name.
    known = base_model if on_hub(BASE) or Path(base_model).is_dir() else ""
    pipeline = find_base_pipeline(known, config.get("revision"), recorded, model_config)
    relation = "adapter" if kind == "lora" else "finetune"
    task, names = _task(kind, pipeline), [name for name, _ in experts]
    training_data = [name for option in TRAINING_DATA for name in names_in(config.get(option))]
    results = eval_results(
        task or "other",
        config,
        metrics,
        is_reward=kind == "reward",
        dataset_on_hub=on_hub("validation_dataset") and len(names_in(config.get("validation_dataset"))) == 1,
    )
    data = ModelCardData(
        base_model=base_model if on_hub(BASE) else None,
        base_model_relation=relation if on_hub(BASE) else None,
        datasets=[name for name in training_data if known_to_hub(name, "dataset")] or None,
        eval_results=results or None,
        library_name=library_name(kind, pipeline if on_hub(BASE) else None, names),
        license=license,
        model_name=repo_id.rstrip("/").split("/")[-1],
        pipeline_tag=task,
        tags=["hy_prfl", "wan", *_tags(kind, config)],
    )
    records = json.loads(files[RUN_FILE].read_text(encoding="utf-8")) if RUN_FILE in files else []
    timesteps, rows = metric_table(metrics)
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        model_name=data.model_name,
        own_card=OWN_CARD,
        kind=kind,
        paper=PAPER,
        description="" if kind == "reward" else _description(kind, config, names, header.get("expert")),
        config=config,
        config_yaml=yaml.safe_dump(config, sort_keys=False).strip() if config else "",
        model_config=model_config,
        model_json=json.dumps(model_config, indent=2),
        usage=usage(kind, repo_id, config, model_config, pipeline, names),
        training_data=", ".join(f"`{name}`" for name in training_data),
        validation_data=", ".join(f"`{name}`" for name in names_in(config.get("validation_dataset"))),
        metrics=metrics,
        metric_rows=rows,
        timesteps=timesteps,
        plot=PLOT_FILE if has_plot else "",
        record=records[-1] if records else None,
        software=_software(records[-1]) if records else "",
    )


def library_name(kind: ModelKind, base: PipelineInfo | None, experts: Sequence[ExpertName]) -> str:
    """
    The library on the card. The Hub shows loading code for diffusers, and none for this package.

    It is diffusers only for a LoRA that the Hub's code can load. That code loads the base model from the Hub, loads the
    LoRA into its first transformer, and passes a prompt and at most one image. It takes any other repository for a whole
    pipeline.

    Args:
        base (`PipelineInfo`, *optional*):
            The pipeline that the model was trained on, if it is on the Hub.
        experts (`Sequence[str]`):
            The experts with a LoRA in the repository.
    """
    is_plain_lora = kind == "lora" and list(experts) == ["high_noise"]
    return "diffusers" if is_plain_lora and base is not None and base.last_image != "required" else "hy-prfl"


def _tags(kind: ModelKind, config: Mapping[str, Any]) -> list[str]:
    if kind == "reward":
        return ["reward-model"]
    return [*(["prfl"] if _uses_reward(config) else []), *(["lora"] if kind == "lora" else [])]


def _uses_reward(config: Mapping[str, Any]) -> bool:
    """Whether the configuration says that a generator was trained on a reward."""
    return bool(_reward_models(config)) and config.get("update_schedule") != "flow_matching"


def _reward_models(config: Mapping[str, Any]) -> list[str]:
    """The reward models of a run: none, one or several."""
    return config.get("reward_models") or [each for each in [config.get("reward_model")] if each]


def _description(
    kind: ModelKind, config: Mapping[str, Any], experts: Sequence[ExpertName], header_expert: str | None
) -> str:
    """
    A sentence on a generator's weights: which transformer and pipeline they are for, and how they were trained.

    Args:
        header_expert (`str`, *optional*):
            The expert in the header of a LoRA file.
    """
    if len(experts) > 1:
        part = " and ".join(f"the {WORDS[expert]} expert (`{EXPERT_FOLDERS[expert]}`)" for expert in experts)
    # The only transformer of a pipeline has the name of the high-noise expert.
    elif experts == ["low_noise"] or config.get("expert") or header_expert:
        part = f"the {WORDS[experts[0]]} expert (`{EXPERT_FOLDERS[experts[0]]}`)"
    else:
        part = "the transformer"
    weights = "All weights of"
    if kind == "lora":
        rank = f" of rank {config['lora_rank']}" if config.get("lora_rank") else ""
        weights = f"{'LoRA adapters' if len(experts) > 1 else 'A LoRA adapter'}{rank} for"
    base = config.get(BASE) or "a Wan pipeline"
    if _uses_reward(config):
        names = _reward_models(config)
        training = (
            f"fine-tuned with process reward feedback (PRFL, [paper]({PAPER})) on the reward model"
            f"{'s' if len(names) > 1 else ''} {', '.join(f'`{each}`' for each in names)}."
        )
        return f"{weights} {part} of {base}, {training}{_start(kind, config)}"
    if config.get("update_schedule") == "flow_matching":
        training = "fine-tuned with only the flow-matching loss, without a reward."
        return f"{weights} {part} of {base}, {training}{_start(kind, config)}"
    return f"{weights} {part} of {base}. How they were trained is not recorded."


def _start(kind: ModelKind, config: Mapping[str, Any]) -> str:
    """Sentences on the weights that the run started from, if not the pipeline's own. An adapter is useless without them."""
    transformers = [config[name] for name in ("transformer_path", "transformer_2_path") if config.get(name)]
    loras = [config[name] for name in ("lora_path", "lora_2_path") if config.get(name)]
    merges = config.get("lora_start") == "merge"
    parts = [f"the weights `{path}`" for path in transformers]
    parts += [f"the LoRA `{path}`{', merged into them' if merges else ''}" for path in dict.fromkeys(loras)]
    if not parts:
        return ""
    text = f" The run started from {' and '.join(parts)}."
    if kind == "lora" and (merges or transformers):
        text += (
            " **The adapter belongs to these weights**, not to the pipeline's own: load it into a pipeline with them."
        )
    return text


def _base_on_hub(header: Mapping[str, str]) -> list[str]:
    """
    The base model of an adapter without its run, if it is known to be a repository on the Hub.

    A path on another machine may have the form of an id. Files of older versions do not record which of the two it is. For
    them, only the names of published pipelines count as repositories.
    """
    base = header.get("base_model", "")
    on_hub = header.get("base_on_hub")
    return [base] if on_hub == "true" or (on_hub is None and base in PUBLISHED and not Path(base).exists()) else []


def _task(kind: ModelKind, pipeline: PipelineInfo | None) -> Task | None:
    if kind == "reward":
        return "video-classification"
    if pipeline is None:
        return None
    return "image-to-video" if pipeline.is_image_to_video else "text-to-video"


def _software(record: Mapping[str, Any]) -> str:
    versions = {"hy_prfl": record["hy_prfl"], "python": record["python"], **record["libraries"]}
    return ", ".join(f"{name} {version}" for name, version in versions.items() if version is not None)


def _known_of_adapter(header: Mapping[str, str]) -> dict[str, Any]:
    """Entries of an adapter's file header, under the names of the run's configuration."""
    names = {
        "base_model": "pretrained_model_name_or_path",
        "reward_model": "reward_model",
        "rank": "lora_rank",
        "base_quantization": "base_quantization",
    }
    known: dict[str, Any] = {name: header[key] for key, name in names.items() if key in header}
    return known | ({"reward_models": json.loads(header["reward_models"])} if "reward_models" in header else {})


def _read_json(files: Mapping[str, Path], name: str) -> dict[str, Any]:
    return json.loads(files[name].read_text(encoding="utf-8")) if name in files else {}


def _read_config(files: Mapping[str, Path]) -> dict[str, Any]:
    return yaml.safe_load(files[CONFIG_FILE].read_text(encoding="utf-8")) if CONFIG_FILE in files else {}
