"""Compiles the C++ part of the pretended device, once for each version of torch, and loads it before torch."""

import ctypes
import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path


SOURCE = Path(__file__).with_name("pretended_cuda.cpp")


def torch_folder() -> Path:
    """Folder in which torch is installed. Does not import torch."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def compile_library(build_dir: Path) -> Path:
    """
    Compile the C++ part, unless it is compiled already.

    Raises:
        RuntimeError: If there is no C++ compiler, or it fails.
    """
    library = build_dir / f"pretended_cuda_{importlib.metadata.version('torch').replace('+', '_')}.so"
    if library.is_file():
        return library
    build_dir.mkdir(parents=True, exist_ok=True)
    root = torch_folder()
    command = [
        "g++", "-shared", "-fPIC", "-std=c++20", str(SOURCE), f"-I{root}/include",
        f"-I{root}/include/torch/csrc/api/include", f"-L{root}/lib", "-ltorch_cpu", "-lc10", "-o", str(library),
    ]  # fmt: skip
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise RuntimeError("There is no C++ compiler (g++), which the pretended device needs.") from error
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"{SOURCE.name} does not compile:\n{error.stderr}") from error
    return library


def load_library(library: Path) -> None:
    """
    Load the C++ part.

    Raises:
        RuntimeError: If torch is already imported: it looks for devices only when it is imported.
    """
    if "torch" in sys.modules:
        raise RuntimeError("The pretended device must be loaded before torch is imported.")
    ctypes.CDLL(str(torch_folder() / "lib" / "libtorch_cpu.so"))
    ctypes.CDLL(str(library))
