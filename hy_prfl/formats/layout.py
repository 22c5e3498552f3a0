"""Names of the folders and files of a pipeline's transformers and of their LoRAs."""

from typing import Literal

from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE


ExpertName = Literal["high_noise", "low_noise"]

# In the order in which denoising uses them: high noise first.
EXPERT_FOLDERS: dict[ExpertName, str] = {"high_noise": "transformer", "low_noise": "transformer_2"}
# The same in Wan's own repositories.
NATIVE_EXPERT_FOLDERS: dict[ExpertName, str] = {"high_noise": "high_noise_model", "low_noise": "low_noise_model"}
# diffusers' name for the first expert. The second one, diffusers' `transformer_2`, needs a name of its own.
LORA_FILES: dict[ExpertName, str] = {
    "high_noise": LORA_WEIGHT_NAME_SAFE,
    "low_noise": "pytorch_lora_weights_2.safetensors",
}
