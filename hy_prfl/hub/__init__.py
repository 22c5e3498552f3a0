"""The Hugging Face Hub: what of a run goes there, with which card, and how it comes back."""

from .repositories import HubError, open_repo, pull, push_folder
from .uploader import HubUploader


__all__ = ["HubError", "HubUploader", "open_repo", "pull", "push_folder"]
