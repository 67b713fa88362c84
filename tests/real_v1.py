"""A real server of the OpenAI protocol for the tests: llama.cpp's own, out of the package xllamacpp.

A double answers as its author believes that servers answer; this server was written by others. It needs a model, and
none can be had without a download of many megabytes, so the tests make one: a BERT of two layers with fixed random
weights (700 KB, made in some hundredths of a second). Its vectors mean nothing, but all around them is genuine: the
tokens, the batches, the limits, the errors, the encodings.

    with RealServer(folder, key="secret") as server:
        ...  # POST f"{server.url}/v1/embeddings"

The server runs in a process of its own: should it crash, the tests go on, and it ends with the tests, however they end.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

MISSING = (
    ""
    if importlib.util.find_spec("xllamacpp")
    else "the package xllamacpp is not installed; it is needed for development only"
)
START_SECONDS = 60.0  # a start takes a tenth of a second; a busy machine may need longer

# The model: names and numbers of BERT, but small.
DIMENSIONS = 64
LAYERS = 2
HEADS = 4
FEED_FORWARD = 128
CONTEXT = 128  # tokens of one text, the two around it included; more is an error of the server
SEED = 1


class Tensor(NamedTuple):
    """Numbers as a GGUF file holds them."""

    shape: Sequence[int]  # the dimension whose numbers are adjacent comes first
    data: bytes
    kind: int = 0  # the file format's number of the type: 0 is float32, 1 float16, 8 blocks of 8 bits


def write_gguf(path: Path, facts: Mapping[str, object], tensors: Mapping[str, Tensor]) -> None:
    """Write a model file, version 3 of GGUF: facts, a table of the tensors, their numbers on 32-byte boundaries.

    A fact is a string, a bool, an int (stored as uint32), a float (float32), or a list of strings or of ints (int32).
    Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
    """

    def string(text: str) -> bytes:
        encoded = text.encode()
        return struct.pack("<Q", len(encoded)) + encoded

    def fact(value: object) -> bytes:
        if isinstance(value, bool):  # before int, for True is one
            return struct.pack("<I?", 7, value)
        if isinstance(value, int):
            return struct.pack("<II", 4, value)
        if isinstance(value, float):
            return struct.pack("<If", 6, value)
        if isinstance(value, str):
            return struct.pack("<I", 8) + string(value)
        assert isinstance(value, list) and value
        if isinstance(value[0], str):
            return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(string, value))
        return struct.pack(f"<IIQ{len(value)}i", 9, 5, len(value), *value)

    def padding(length: int) -> bytes:
        return bytes(-length % 32)

    table, offset = b"", 0
    for name, (shape, data, kind) in tensors.items():
        table += string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
        offset += len(data) + len(padding(len(data)))
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(facts))
    head += b"".join(string(name) + fact(value) for name, value in facts.items()) + table
    with path.open("wb") as file:
        file.write(head + padding(len(head)))
        for tensor in tensors.values():
            file.write(tensor.data + padding(len(tensor.data)))


def bert_facts(
    vocabulary: Sequence[str], *, dimensions: int, layers: int, heads: int, feed_forward: int, context: int
) -> dict[str, object]:
    """Return the facts of a BERT with mean pooling; `vocabulary` is as in BERT's vocab.txt, "##" before what continues.

    The file format marks what begins a word instead: with U+2581, a low line.
    """
    special = {name: vocabulary.index(name) for name in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")}
    return {
        "general.architecture": "bert",
        "general.name": "embedgen-test",
        "bert.context_length": context,
        "bert.embedding_length": dimensions,
        "bert.feed_forward_length": feed_forward,
        "bert.block_count": layers,
        "bert.attention.head_count": heads,
        "bert.attention.layer_norm_epsilon": 1e-12,
        "bert.attention.causal": False,
        "bert.pooling_type": 1,  # the mean of the tokens' vectors
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [
            token if token in special else token[2:] if token.startswith("##") else "\u2581" + token
            for token in vocabulary
        ],
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in vocabulary],  # 3: control, 1: normal
        "tokenizer.ggml.token_type_count": 2,
        "tokenizer.ggml.padding_token_id": special["[PAD]"],
        "tokenizer.ggml.unknown_token_id": special["[UNK]"],
        "tokenizer.ggml.cls_token_id": special["[CLS]"],
        "tokenizer.ggml.bos_token_id": special["[CLS]"],
        "tokenizer.ggml.seperator_token_id": special["[SEP]"],  # spelled so by the format
        "tokenizer.ggml.mask_token_id": special["[MASK]"],
    }


def small_vocabulary() -> list[str]:
    """Return a vocabulary that can spell every ASCII text: letters, digits, punctuation, and pairs of letters."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    parts = [*letters, *"0123456789", *(one + other for one in letters for other in letters)]
    marks = [chr(code) for code in range(33, 127) if not chr(code).isalnum()]
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *marks, *parts, *("##" + part for part in parts)]


def write_model(path: Path, *, context: int = CONTEXT) -> None:
    """Write the model, the same bytes each time: random() gives the same numbers in every version of Python."""
    numbers = random.Random(SEED)
    vocabulary = small_vocabulary()

    def uniform(columns: int, rows: int, spread: float) -> Tensor:
        """Return a matrix of random numbers whose standard deviation is `spread`."""
        width = 12**0.5 * spread
        values = [width * (numbers.random() - 0.5) for _ in range(columns * rows)]
        return Tensor((columns, rows), struct.pack(f"<{len(values)}f", *values))

    def filled(length: int, value: float) -> Tensor:
        return Tensor((length,), struct.pack("<f", value) * length)

    tensors = {
        "token_embd.weight": uniform(DIMENSIONS, len(vocabulary), 1.0),
        "token_types.weight": uniform(DIMENSIONS, 2, 0.1),
        "position_embd.weight": uniform(DIMENSIONS, context, 0.3),
    }

    def norm(name: str) -> None:
        tensors[f"{name}.weight"] = filled(DIMENSIONS, 1.0)
        tensors[f"{name}.bias"] = filled(DIMENSIONS, 0.0)

    def linear(name: str, columns: int, rows: int) -> None:
        tensors[f"{name}.weight"] = uniform(columns, rows, columns**-0.5)  # keeps the size of what goes through
        tensors[f"{name}.bias"] = filled(rows, 0.0)

    norm("token_embd_norm")
    for block in (f"blk.{number}" for number in range(LAYERS)):
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            linear(f"{block}.{part}", DIMENSIONS, DIMENSIONS)
        norm(f"{block}.attn_output_norm")
        linear(f"{block}.ffn_up", DIMENSIONS, FEED_FORWARD)
        linear(f"{block}.ffn_down", FEED_FORWARD, DIMENSIONS)
        norm(f"{block}.layer_output_norm")
    facts = bert_facts(
        vocabulary,
        dimensions=DIMENSIONS,
        layers=LAYERS,
        heads=HEADS,
        feed_forward=FEED_FORWARD,
        context=context,
    )
    write_gguf(path, facts, tensors)


class RealServer:
    """llama.cpp's server with the small model, on a port of 127.0.0.1, until it is stopped.

    `folder` receives the model, once; `key` is what clients must send as a bearer token ("" for none); `slots` is how
    many texts it works on at once; `batch` how many tokens of different texts it computes together, and so also the
    longest text it takes where that is less than the context; `port` 0 is a free one.
    """

    def __init__(
        self,
        folder: Path,
        *,
        key: str = "",
        model: str = "embedgen-test",
        file: Path | None = None,
        context: int = CONTEXT,
        batch: int = 512,
        slots: int = 4,
        threads: int = 1,
        port: int = 0,
    ) -> None:
        """Start it and wait until it answers.

        Raises: RuntimeError, with what the process said, if it ends or says nothing for a minute.
        """
        if file is None:
            file = folder / f"bert-{context}.gguf"
            if not file.exists():
                write_model(file, context=context)
        self.model = model
        self.key = key
        # One thread by default: several wait for each other by spinning, which on a busy machine costs seconds.
        settings = {
            "file": str(file),
            "model": model,
            "key": key,
            "context": context,
            "batch": batch,
            "slots": slots,
            "threads": threads,
            "port": port,
        }
        self._said = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed by stop)
        self._process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
        )
        alarm = threading.Timer(START_SECONDS, self._process.kill)  # then readline ends
        alarm.start()
        try:
            assert self._process.stdout is not None
            address = self._process.stdout.readline().decode().strip()
        finally:
            alarm.cancel()
        if not address:
            code = self._process.wait()
            self._said.seek(0)
            said = self._said.read().decode(errors="replace")
            self.stop()
            raise RuntimeError(f"the server did not start (exit code {code}): {said[-2000:]}")
        self.url = address

    @property
    def alive(self) -> bool:
        """Whether its process still runs."""
        return self._process.poll() is None

    def stop(self) -> None:
        """End the server at once, whatever it works on; harmless when it has ended."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()
        self._said.close()

    def __enter__(self) -> RealServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def serve(settings: Mapping[str, Any]) -> None:
    """Run the server in this process: print its address, and end when standard input does.

    That of a child whose parent was killed ends, too. What it still computes is not waited for.
    """
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = settings["file"]
    params.model_alias = {settings["model"]}
    params.api_keys = [settings["key"]] if settings["key"] else []
    params.hostnames = ["127.0.0.1"]
    params.port = settings["port"]
    params.embedding = True
    params.n_parallel = settings["slots"]
    params.n_ctx = settings["context"] * settings["slots"]  # shared out among the slots
    params.n_batch = params.n_ubatch = settings["batch"]
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = settings["threads"]
    params.n_gpu_layers = 0
    params.ui = False
    server = xllamacpp.Server(params)  # it returns when the model is loaded and requests are answered
    print(server.listening_address, flush=True)
    sys.stdin.buffer.read()
    os._exit(0)


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
