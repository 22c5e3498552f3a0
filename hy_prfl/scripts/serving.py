"""Serves the web page of a study, for `annotate` and `compare`."""

import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..configs.serving import ServingConfig


if TYPE_CHECKING:
    from ..pages.study import Study


def serve_study(
    study: "Study",
    config: ServingConfig,
    save: Callable[["Study"], None],
    *,
    title: str,
    default: str,
    questions: Mapping[str, str],
) -> None:
    """
    Print the address of a study's page, serve it until the process is interrupted, and write the result.

    Args:
        save (`Callable`): Writes the result. It is called with the study or a snapshot of it.
        title, default (`str`): Headline and instructions to use if the options give none.
        questions (`Mapping[str, str]`): Text of each question, by its name.

    Raises:
        ValueError: If the server cannot listen on the address.
    """
    from ..pages.server import LOOPBACK, PageSettings, build_app, is_loopback, listen, serve

    save(study)
    if not config.serve:
        return
    token = config.token
    if token is None and not is_loopback(config.host):
        token = secrets.token_urlsafe(24)
    instructions = default
    if config.instructions is not None:
        instructions = Path(config.instructions).read_text(encoding="utf-8")
    settings = PageSettings(
        title=config.title or title,
        instructions=instructions.strip(),
        questions=questions,
        annotators=config.annotators or (),
        token=token,
        hosts=tuple(name.lower() for name in (*LOOPBACK, config.host, *(config.allowed_hosts or ()))),
    )
    listener = listen(config.host, config.port)
    name = (config.allowed_hosts or [config.host])[0]
    address = f"http://{f'[{name}]' if ':' in name else name}:{listener.getsockname()[1]}/"

    def announce() -> None:
        print(f"{address}{f'?token={token}' if token else ''}  (stop with Ctrl-C)", flush=True)

    serve(build_app(study, settings, save), listener, announce)
    # Start a new line after the `^C` that the terminal prints.
    print()
    save(study)
