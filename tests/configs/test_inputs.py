"""Names of models and datasets: folders that exist, or names that a repository on the Hub can have."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hy_prfl.configs.inputs import HUB_ID, check_sources


NAMES = [
    "a", "a/b", "Wan-AI/Wan2.1-T2V-14B-Diffusers", "outputs/run_1.2", "_a/_b", "a/" + 96 * "b", "a/" + 97 * "b", 97 * "b", "a--b",
    "user/a--b", "a..b", "a-", "a.", "a/b.", "a.git", "a/b.git", "a.github", "-a", "./a", "../a", "/a", "a/", "a//b", "a/b/c", "~/a",
    "a b", "ü/x", "", ".",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_form_of_a_hub_id(name: str) -> None:
    """The client's own check, which is too heavy to import for this."""
    try:
        validate_repo_id(name)
        is_valid = True
    except HFValidationError:
        is_valid = False
    # The client lets deeper paths through to the Hub, which has none.
    assert bool(HUB_ID.fullmatch(name)) == is_valid


@pytest.mark.parametrize(
    "name", ["./rewrd", "/tmp/none/rewrd", "outputs/rewrd/best", "outputs/rewrd/", "outputs/re--wrd"]
)
@pytest.mark.parametrize("option", ["reward_model", "reward_models"])
def test_what_can_be_no_repository_is_refused_at_once(name: str, option: str) -> None:
    config = SimpleNamespace(**{option: name if option == "reward_model" else ["user/reward", name]})
    with pytest.raises(
        FileNotFoundError, match=rf"`{option}`: there is no folder '{name}', and it does not have the form"
    ):
        check_sources(config, option)


def test_a_folder_or_a_possible_repository_passes(tmp_path: Path) -> None:
    check_sources(SimpleNamespace(a=str(tmp_path), b="user/reward", c=None, d=["x/y"]), "a", "b", "c", "d")
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError, match=r"`a`: '.*file' is a file, not a folder"):
        check_sources(SimpleNamespace(a=str(tmp_path / "file")), "a")
