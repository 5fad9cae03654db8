"""Starts `llama_cpp.server` on the wheel that llmnode runs on. Runs in the rival's own virtual environment.

That wheel keeps its CPU back-ends in plug-ins, which a plain import does not load: the server would find nothing to
compute on. Loaded here is the plug-in that llmnode loads too: the best for this processor but the one with AMX.

    python python_server.py ARGUMENTS OF llama_cpp.server
"""

from __future__ import annotations

import ctypes
import os
import runpy
from pathlib import Path

import llama_cpp


def load_plugin() -> None:
    """Load the CPU plug-in with the best score that it gives itself on this processor; none where it is linked in."""
    package = Path(llama_cpp.__file__).parent
    plugins = [p for p in (package.parent / "bin").glob("libggml-cpu-*.so") if not p.stem.endswith("sapphirerapids")]
    if not plugins:
        return
    best = max(sorted(plugins), key=lambda plugin: ctypes.CDLL(str(plugin)).ggml_backend_score())
    # The copy of the library that libllama itself is linked to: libggml.so would be a second registry.
    library = ctypes.CDLL(str(package / "lib" / "libggml.so.0"))
    library.ggml_backend_load.argtypes, library.ggml_backend_load.restype = [ctypes.c_char_p], ctypes.c_void_p
    library.ggml_backend_load(os.fsencode(best))


if __name__ == "__main__":
    load_plugin()
    runpy.run_module("llama_cpp.server", run_name="__main__")
