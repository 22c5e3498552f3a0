"""The Hugging Face Hub: pushing runs with a model card, and pulling repositories."""

from .repositories import HubError, open_repo, pull, push_folder
from .uploader import HubUploader


__all__ = ["HubError", "HubUploader", "open_repo", "pull", "push_folder"]
