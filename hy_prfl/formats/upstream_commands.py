"""Shell commands that convert upstream's lists and checkpoints into the files that a converted recipe names."""

import shlex
from pathlib import Path, PurePosixPath
from typing import Any

from .upstream_keys import RecipeKeys


# Upstream's embedding of the empty prompt, below the folder in which it ran.
NULL_PROMPT = "temp_data/null/wanx/null.npy"
# Upstream's `lrm.task` -> the labels that define it.
LABELS = {
    "text_alignment": ["text_alignment"],
    "blur_quality": ["blur_quality"],
    "physics_quality": ["physics_quality"],
    "human_quality": ["human_quality"],
    "motion_quality": ["physics_quality", "human_quality"],
}


def mirrored(folder: str, path: str) -> str:
    """
    Where to write the result of converting `path`: a path below `folder`, different for every `path`.

    `("data", "lists/train/meta.list")` -> `"data/lists/train/meta"`
    """
    parts = ["_up" if part == ".." else part for part in PurePosixPath(path).parts if part != "/"]
    return "/".join([folder, *parts]).removesuffix(".list")


def convert_lists(keys: RecipeKeys, key: str, option: str) -> None:
    """Set `option` to the dataset that `preprocess` imports list files into. Equal lists share one dataset."""
    lists = read_lists(keys, key)
    if lists not in keys.datasets:
        if len(lists) == 1:
            import_lists(keys, lists, mirrored(keys.data_folder, lists[0]))
        else:
            import_lists(keys, lists, f"{keys.data_folder}/{keys.path.stem}/{option}")
    keys.option(option, keys.datasets[lists], f"{key}, imported: see above")


def read_lists(keys: RecipeKeys, key: str) -> tuple[str, ...]:
    """The list files of a key, one or several."""
    lists = keys.require(key)
    lists = [lists] if isinstance(lists, str) else lists
    if not isinstance(lists, list) or not lists or not all(isinstance(each, str) for each in lists):
        keys.refuse(key, "list files")
    return tuple(PurePosixPath(each).as_posix() for each in lists)


def import_lists(keys: RecipeKeys, lists: tuple[str, ...], target: str) -> None:
    """Add the commands that import list files, joined if there are several, into the dataset `target`."""
    source = keys.locate(lists[0])
    if len(lists) > 1:
        source = f"{target}.list"
        keys.run_first(f"mkdir -p {shlex.quote(str(PurePosixPath(target).parent))}")
        # Not `cat`: upstream's lists end without a newline, and two paths would become one.
        keys.run_first(f"awk NF {quoted(keys, lists)} > {shlex.quote(source)}")
    words = ["hy-prfl preprocess", f"--upstream_meta {shlex.quote(source)}"]
    if keys.root != ".":
        words.append(f"--upstream_root {shlex.quote(keys.root)}")
    null_prompt = keys.locate(NULL_PROMPT)
    if Path(null_prompt).is_file():
        words.append(f"--null_prompt_path {shlex.quote(null_prompt)}")
    words.append(f"--pretrained_model_name_or_path {shlex.quote(keys.pipeline)}")
    words.append(f"--text_encoder_dtype bfloat16 --output_dir {shlex.quote(target)}")
    keys.run_first(" ".join(words))
    keys.datasets[lists] = target


def note_null_prompt(keys: RecipeKeys) -> None:
    """Say where the embedding of the empty prompt comes from, for recipes that train with it."""
    null_prompt = keys.locate(NULL_PROMPT)
    if Path(null_prompt).is_file():
        keys.note(f"the empty prompt is upstream's own embedding, --null_prompt_path {null_prompt} of the import.")
    else:
        keys.note(
            f"the import encodes the empty prompt itself; to use upstream's own embedding, which is not at {null_prompt}, "
            "add --null_prompt_path PATH/null.npy to it."
        )


def convert_pairs(keys: RecipeKeys) -> None:
    """Convert upstream's lists of good and of poor clips to one dataset, whose labels say which clips are good."""
    better, worse = (read_lists(keys, f"dataset.meta_file{part}_list") for part in ("", "_lose"))
    task = keys.recipe.options["task"]
    keys.option("allow_unpaired", True, "dataset.meta_file_lose_list: upstream compares with any clip of that list")
    keys.note(
        "allow_unpaired: where good and poor clips share a prompt, only such pairs are compared; upstream ignores prompts."
    )
    if better == worse:
        convert_lists(keys, "dataset.meta_file_list", "train_dataset")
        keys.note(
            f"dataset.meta_file_lose_list: {', '.join(worse)}: the same clips as meta_file_list, so the labels for {task} "
            "in the meta files say which are better. `hy-prfl label` adds labels."
        )
        return
    target = f"{keys.data_folder}/{keys.path.stem}/train_dataset"
    import_lists(keys, (*better, *worse), target)
    columns = LABELS[task]
    # The name of a meta file contains the id of its clip.
    rows = [
        'awk -F/ \'NF && !seen[$NF]++ {sub(/(_meta_v1)?\\.json$/, "", $NF); '
        f'print $NF "{f",{label}" * len(columns)}"}}\' {quoted(keys, lists)}'
        for label, lists in ((1, better), (0, worse))
    ]
    annotations, dataset = shlex.quote(f"{target}.csv"), shlex.quote(target)
    keys.run_first(f"{{ echo id,{','.join(columns)}; {'; '.join(rows)}; }} > {annotations}")
    keys.run_first(
        f"hy-prfl label --dataset {dataset} --annotations {annotations} --output_dir {dataset}_labelled --overwrite"
    )
    keys.option("train_dataset", f"{target}_labelled", "dataset.meta_file_list and meta_file_lose_list: see above")
    keys.note(
        f"dataset.meta_file_lose_list: {', '.join(worse)}: both lists go into one dataset. Its labels for {task} are good for "
        "the clips of meta_file_list and poor for these clips, and replace the labels in the meta files."
    )


def convert_reward_parts(keys: RecipeKeys, prefix: str) -> bool:
    """Set the option for the reward model to the conversion of its three files. Returns False if none is named."""
    parts = {"reward_transformer": "transformer", "mlp": "mlp", "query_attention": "query_attention"}
    names = {option: f"model.{prefix}_{part}_path" for option, part in parts.items()}
    paths = {option: keys.take(name) for option, name in names.items()}
    if not any(paths.values()):
        return False
    for option, path in paths.items():
        if path is None:
            raise ValueError(
                f"{keys.path}: `{names[option]}` is empty, but another of `model.{prefix}_*_path` is not. A reward model "
                "is converted from three files: name all three, or none."
            )
    if keys.values.get("lrm.pool") != "q_attn":
        keys.refuse("lrm.pool", "q_attn: the reward model has a file in model.*_query_attention_path")
    target = f"converted/{keys.path.stem}/reward_model"
    options = " ".join(f"--{name} {shlex.quote(keys.locate(path))}" for name, path in paths.items())
    if (heads := keys.whole("lrm.query_attention.num_heads", 8)) != 8:
        options += f" --num_query_heads {heads}"
    if keys.take("lrm.query_attention.return_type") != "query":
        options += " --query_residual false"
    task = keys.values.get("lrm.task")
    if task in LABELS and task != "motion_quality":
        options += f" --task {task}"
    keys.option("reward_model", target, f"model.{prefix}_*_path, converted: see above")
    keys.run_first(f"hy-prfl convert {options} --output_dir {target}")
    return True


def start_from(keys: RecipeKeys, key: str, path: Any) -> None:
    """Set the transformer that training starts from. Upstream stores it in Wan's native format."""
    if "reward_model" in keys.recipe.options and keys.recipe.command == "train_reward":
        keys.note(f"{key}: {path}: not needed, because model.resume_transformer_path replaces all of its weights.")
    else:
        keys.option("transformer_path", keys.locate(path), key)


def quoted(keys: RecipeKeys, lists: tuple[str, ...]) -> str:
    """List files as arguments of a shell command."""
    return " ".join(shlex.quote(keys.locate(each)) for each in lists)
