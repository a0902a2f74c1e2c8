"""Cost of HTTP streaming: time per token of concurrent streams, with and without the server.

python benchmarks/serving.py [model] [--streams 16] [--tokens 200] [--runs 5] [--save]

The same requests, each with a different prompt, run in the engine alone, step by step; and through
the server's streams, with a chunk for each token. The client runs in a separate process and only
looks for the end of each stream, so the benchmark measures the server. All processes share the
processors. measuring.py explains turns and rejected runs.
"""

import argparse
import asyncio
import json
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from make_random import SHAPES
from measuring import RESULTS, provenance, save_result, table, timings
from throughput import greedy_sampling, load

import llama32
from llama32.bench.interleave import Run, disturbance, interleave, machine_seconds, run_undisturbed
from llama32.llm.llm import LLM
from llama32.serve.app import create_app
from llama32.serve.server import Server
from llama32.serve.settings import ServeSettings

PROMPT = 20  # tokens
USAGE = {"include_usage": True}


def prompts(streams: int) -> list[list[int]]:
    """Return a different prompt for each stream."""
    return [[100 + i, *range(300, 300 + PROMPT - 1)] for i in range(streams)]


def engine_seconds(llm: LLM, streams: int, tokens: int) -> float:
    """Return the seconds of the engine alone."""
    llm.engine.forget_prefixes()
    start = time.perf_counter()
    for prompt in prompts(streams):
        llm.engine.add(prompt, greedy_sampling(tokens))
    while llm.engine.is_busy:
        llm.engine.step()
    return time.perf_counter() - start


def server_seconds(llm: LLM, port: int, streams: int, tokens: int) -> float:
    """Return the seconds measured by the client process."""
    llm.engine.forget_prefixes()
    command = [sys.executable, __file__, "--client", str(port)]
    arguments = ["--streams", str(streams), "--tokens", str(tokens)]
    done = subprocess.run([*command, *arguments], check=True, capture_output=True, text=True)
    return float(done.stdout)


async def stream(port: int, prompt: Sequence[int], tokens: int) -> None:
    """Send a request and read the stream to the end."""
    fields = {"model": "it", "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    body = json.dumps(
        {**fields, "ignore_eos": True, "stream": True, "stream_options": USAGE}
    ).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    writer.write(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
    last = b""
    while b"[DONE]" not in last:
        read = await reader.read(65536)
        if not read:
            raise RuntimeError(f"the stream ended early, after {last!r}")
        last = last[-500:] + read
    writer.close()
    if b'"completion_tokens":%d,' % tokens not in last:
        raise RuntimeError(f"the stream did not have {tokens} tokens: {last!r}")


def run_client(port: int, streams: int, tokens: int) -> None:
    """Run all streams at once and print the seconds from first request to last end."""

    async def run_streams() -> None:
        await asyncio.gather(*(stream(port, prompt, tokens) for prompt in prompts(streams)))

    start = time.perf_counter()
    asyncio.run(run_streams())
    print(time.perf_counter() - start)


def timed_run(work: Callable[[], float]) -> Run:
    """Run a workload; the share of other processes excludes the client process."""

    def own() -> float:
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return time.process_time() + children.ru_utime + children.ru_stime

    busy, used, start = machine_seconds(), own(), time.perf_counter()
    seconds = work()
    wall = (time.perf_counter() - start) * torch.multiprocessing.cpu_count()
    others = machine_seconds() - busy - (own() - used)
    return Run(seconds, None, max(others - 0.03, 0) / wall, 0)


def start_server(llm: LLM) -> int:
    """Start the server in a thread and return the port."""
    is_up = threading.Event()
    urls: list[str] = []
    settings = ServeSettings(port=0)
    app = create_app(llm, settings, "it")
    server = Server(app, settings, lambda url: (urls.append(url), is_up.set()))
    threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True).start()
    is_up.wait()
    return int(urls[0].rpartition(":")[2])


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the cost of HTTP streaming per token.")
    parser.add_argument("model", nargs="?", default="tiny", help=f"tiny, a folder, or {[*SHAPES]}")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--streams", type=int, nargs="+", default=[16])
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--client", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--save", action="store_true", help=f"save the result in {RESULTS.name}/")
    options = parser.parse_args()
    if options.client:
        run_client(options.client, options.streams[0], options.tokens)
        return
    model = load(options.model, getattr(torch, options.dtype))
    llm = (
        replace(llama32.load("tiny"), model=model)
        if options.model == "tiny"
        else LLM(model, None, None)
    )
    port = start_server(llm)
    rows, results = [], {}
    for streams in options.streams:
        works = {
            f"engine, {streams}": partial(engine_seconds, llm, streams, options.tokens),
            f"server, {streams}": partial(server_seconds, llm, port, streams, options.tokens),
        }
        turns = {
            name: partial(run_undisturbed, partial(timed_run, work)) for name, work in works.items()
        }
        results |= interleave(turns, options.runs)
        engine, server = (results[name] for name in works)
        ratios = [b.seconds / a.seconds for a, b in zip(engine, server, strict=True)]
        per_token = [
            1000 * statistics.median(run.seconds for run in runs) / options.tokens
            for runs in (engine, server)
        ]
        rows.append(
            [
                f"{streams}",
                *(f"{milliseconds:.2f}" for milliseconds in per_token),
                f"{statistics.median(ratios):.3f}",
                f"{min(ratios):.3f}-{max(ratios):.3f}",
            ]
        )
    head = ["streams", "engine, ms a token", "server, ms a token", "ratio", "from round to round"]
    report = (
        f"{options.model} in {options.dtype}; {options.tokens} tokens per stream; "
        f"medians of {options.runs} rounds of turns.\n\n{table(head, rows)}\n\n"
        f"{disturbance(results)}."
    )
    print(report)
    if options.save:
        arguments = " ".join(sys.argv[1:])
        name = f"serving_{options.model}_{options.dtype}"
        packages = "torch", "fastapi", "uvicorn"
        save_result(
            name,
            report,
            provenance(f"benchmarks/serving.py {arguments}", packages),
            timings(results),
        )


if __name__ == "__main__":
    main()
