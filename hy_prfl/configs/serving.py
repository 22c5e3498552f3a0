"""Options of commands that serve a web page."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .base import Config, check


@dataclass(kw_only=True)
class ServingConfig(Config):
    """Options of the page, of the server, and of the people who may take part."""

    title: str | None = field(default=None, metadata={"help": "Headline of the page."})
    instructions: str | None = field(
        default=None, metadata={"help": "Text file with instructions, shown beside the clips."}
    )
    annotators: list[str] | None = field(
        default=None, metadata={"help": "Names of the people who may take part. Anybody may if left out."}
    )
    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen on."})
    port: int = field(default=8765, metadata={"help": "Port to listen on; 0 for any free port."})
    allowed_hosts: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names and addresses, without a port, under which browsers may reach the server, besides this machine's "
            "loopback names and `host`. Required if `host` is 0.0.0.0 or ::."
        },
    )
    token: str | None = field(
        default=None,
        metadata={
            "help": "Secret at the end of the address. If left out and `host` is not a loopback address, a random one is "
            "used and printed at each start."
        },
    )
    serve: bool = field(
        default=True, metadata={"help": "Serve the page. Without it, write the result from the journal and exit."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 <= self.port < 2**16, "port", self.port, "from 0 to 65535")
        check(
            self.host not in ("0.0.0.0", "::") or bool(self.allowed_hosts),
            "allowed_hosts",
            self.allowed_hosts,
            f"given if `host` is {self.host}: the names under which browsers reach this machine",
        )
        check(self.token is None or len(self.token) >= 8, "token", "...", "at least 8 characters long")
        names = self.annotators or []
        check(len(set(names)) == len(names), "annotators", names, "different names")
        for name in names:
            check(0 < len(name.strip()) <= 64 and name == name.strip(), "annotators", name, "1 to 64 characters long")


def check_overwrites(inputs: Mapping[str, str | None], outputs: Mapping[str, str | None]) -> None:
    """
    Raise a `ValueError` if an output file is also an input file, or if two outputs are the same file.

    Args:
        inputs, outputs (`Mapping[str, str | None]`): Files by their names in error messages; None where not given.
    """
    known = {Path(path).resolve(): name for name, path in inputs.items() if path is not None}
    for name, path in outputs.items():
        if path is None:
            continue
        other = known.setdefault(Path(path).resolve(), name)
        if other != name:
            verb = "overwrite" if other in inputs else "be the same file as"
            raise ValueError(f"{name} '{path}' would {verb} {other}. Choose another name.")
