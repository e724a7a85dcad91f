"""What cannot be known without a GPU, measured within eight minutes: `python scripts/gpu_kit/run.py`.

    sleep_and_swap   memory and seconds of sleep levels 1 and 2, swaps in place, noise of bfloat16 (noise.py)
    whole_round      `selfplay round` with LoRA, everything on one GPU
    training_steps   a step of ε-DPO beside one of TRL's DPO, at the shapes of models of 1 to 8 billion parameters
    throughput       the stage `generate` beside vLLM alone with all prompts at once (alone.py)

run.py starts the parts in this order, which is that of their worth. Each is a process of its own (part.py, supervise.py), and
tells what it finds as it finds it. document.py writes docs/measurements-gpu.md and .json anew after every figure, so a run
that is killed keeps what it has measured. sizes.py says how large everything is. Models are made from a configuration
(checkpoints.py): nothing is downloaded.

**On a machine with this repository set up** (`make setup`), `.venv/bin/python scripts/gpu_kit/run.py` is all. It needs one
GPU of 40 GB or more and 40 GB of disk under the temporary folder or `--work`. `--minutes 4` drops the parts of least worth.
`--small --out FOLDER` runs every part in miniature first, in two or three minutes: it shows whether everything is installed.

**On a machine that has only PyTorch and no network**, carry this repository and a folder of wheels. The kit also runs with
vllm 0.24.0, torch 2.11 and transformers 5.17: the miniature was run with these on a CPU. Where there is a network, and for the
Python and the C library of the machine without one:

    pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 \\
        --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -d wheels vllm==0.24.0 trl==1.16.0 …

and there:

    pip install --no-index --no-deps --target site wheels/*.whl
    PYTHONPATH=site python3 scripts/gpu_kit/run.py --out results

`--no-deps` keeps the torch that is there; its version has to be the one that vLLM was built for (`Requires-Dist: torch` in
the wheel). An image that has PyTorch, triton, transformers, accelerate, peft, scikit-learn, pandas, pyarrow, numba, aiohttp and
typer still lacks these. The miniature imports them:

    vllm trl datasets dill multiprocess sqlalchemy tenacity fastapi starlette uvicorn httptools python-multipart pydantic
    pydantic-core pydantic-extra-types annotated-types typing-inspection email-validator dnspython sniffio httpx2 httpcore2
    truststore openai openai-harmony jiter partial-json-parser msgspec pyzmq cachetools cbor2 pybase64 orjson xgrammar
    apache-tvm-ffi llguidance watchfiles websockets opentelemetry-api opentelemetry-sdk opentelemetry-proto
    opentelemetry-exporter-otlp opentelemetry-exporter-otlp-common opentelemetry-exporter-otlp-proto-common
    opentelemetry-exporter-otlp-proto-grpc opentelemetry-exporter-otlp-proto-http opentelemetry-exporter-http-transport
    opentelemetry-semantic-conventions opentelemetry-semantic-conventions-ai googleapis-common-protos

vLLM names these too, and the miniature imports none of them. They are small:

    anthropic apscheduler astor blake3 compressed-tensors depyf diskcache docstring-parser fastapi-cli fastar fastsafetensors
    ijson interegular jmespath jsonschema jsonschema-specifications lark lm-format-enforcer loguru mcp mcp-types mistral-common
    model-hosting-container-standards outlines-core prometheus-fastapi-instrumentator pydantic-settings pyjwt python-dotenv
    python-json-logger referencing rich-toolkit rpds-py setproctitle sse-starlette supervisor tzdata tzlocal

What vLLM needs on a GPU alone was read in the sources of 0.24.0, and not run: flashinfer, tilelang, quack, cutlass and humming are
imported only where a kernel of theirs is chosen, which a dense Llama in bfloat16 does not do on Hopper. The same holds for
`vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so`, `vllm/_moe_C_stable_libtorch.abi3.so` and `vllm/vllm-rs`, which make up half of the
wheel: they may be left out of a copy where little can be carried.
"""
