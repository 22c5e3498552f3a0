"""Errors for models that cannot be read. A model's name may be a folder or a repository; the error covers both."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from ..configs.inputs import HUB_ID


@contextmanager
def reading(option: str, source: str) -> Iterator[None]:
    """
    Context in which the configuration or the weights of a model are read.

    Args:
        option (`str`):
            Option that names the model.
        source (`str`):
            Its value.

    Raises:
        FileNotFoundError: Instead of an error of diffusers or of the Hub's client. These do not know the option, and
            take a mistyped folder such as `outputs/rewrd` for a repository.
    """
    try:
        yield
    except (OSError, HTTPError) as error:
        if Path(source).exists() or not HUB_ID.fullmatch(source):
            raise FileNotFoundError(f"`{option}` '{source}': {_first_line(error)}.") from error
        raise FileNotFoundError(
            f"`{option}`: there is no file or folder '{source}' here, and as a repository on the Hub it cannot be read: "
            f"{_why_unread(error)}."
        ) from error


def _why_unread(error: BaseException) -> str:
    """The reason. diffusers says that a repository lacks the file, even if the Hub could not be reached."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
            hub = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} cannot be reached"
            return f"{hub}, and it is not in the cache"
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, HfHubHTTPError):
        answer = error.response
        return (
            f"the Hub answered {answer.status_code}: {(error.server_message or answer.reason_phrase).splitlines()[0]}"
        )
    return _first_line(error) if isinstance(error, OSError) else f"{constants.ENDPOINT} cannot be reached ({error})"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
