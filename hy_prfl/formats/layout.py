"""Names of the folders and files of a pipeline's transformers and of their LoRAs."""

from typing import Literal

from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE


ExpertName = Literal["high_noise", "low_noise"]

# In the order in which a chain of denoising steps meets them.
EXPERT_FOLDERS: dict[ExpertName, str] = {"high_noise": "transformer", "low_noise": "transformer_2"}
# The same in Wan's own repositories.
NATIVE_EXPERT_FOLDERS: dict[ExpertName, str] = {"high_noise": "high_noise_model", "low_noise": "low_noise_model"}
# diffusers' name, and for the expert that it calls `transformer_2` one that is not taken for the other's.
LORA_FILES: dict[ExpertName, str] = {
    "high_noise": LORA_WEIGHT_NAME_SAFE,
    "low_noise": "pytorch_lora_weights_2.safetensors",
}
