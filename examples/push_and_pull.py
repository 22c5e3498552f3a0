r"""
Pushes a reward model and a latent dataset to the Hugging Face Hub, and loads them from there.

    hf auth login
    python examples/push_and_pull.py --user YOU --reward_model outputs/reward/best --dataset data/train

`hy-prfl push` and `hy-prfl pull` do the same for whole runs, with a model card made from the run.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from datasets import Dataset, load_dataset

from hy_prfl import WanRewardModel
from hy_prfl.configs.parser import parse_config
from hy_prfl.data.dataset import load_latent_dataset


@dataclass(kw_only=True)
class Config:
    user: str = field(metadata={"help": "Your name on the Hub, or that of your organisation."})
    reward_model: str = field(metadata={"help": "Folder of a reward model."})
    dataset: str = field(metadata={"help": "Folder of a latent dataset."})
    model_name: str = field(default="my-reward-model", metadata={"help": "Name of the model's repository."})
    dataset_name: str = field(default="my-latents", metadata={"help": "Name of the dataset's repository."})
    private: bool = field(default=True, metadata={"help": "Only you can see new repositories."})


def main(argv: Sequence[str] | None = None) -> tuple[WanRewardModel, Dataset]:
    config = parse_config(Config, argv, description=__doc__)
    model_id, dataset_id = f"{config.user}/{config.model_name}", f"{config.user}/{config.dataset_name}"

    # 1. Push
    WanRewardModel.from_pretrained(config.reward_model).push_to_hub(model_id, private=config.private)
    load_latent_dataset(config.dataset).push_to_hub(dataset_id, private=config.private)

    # 2. Pull, on any machine. Commands also accept these ids instead of a folder: --reward_model, --train_dataset
    reward_model = WanRewardModel.from_pretrained(model_id)
    dataset = load_dataset(dataset_id, split="train")
    print(f"{model_id}: judges {reward_model.config.task} with {reward_model.config.num_layers} blocks")
    print(f"{dataset_id}: {len(dataset)} clips, such as '{dataset[0]['prompt']}'")
    return reward_model, dataset


if __name__ == "__main__":
    main()
