"""What HTTP costs: the time per token of concurrent streams, through the server and without it.

python benchmarks/serving.py [model] [--streams 16] [--tokens 200] [--runs 5] [--save]

The same requests, with prompts of their own, run in the engine alone, step after step; and through
the server's streams, one chunk for each token, read by a client in a process of its own that looks
for nothing but the end, so that what is measured is the server. All share the processors. How
turns are taken and disturbed runs rejected: see measuring.py.
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
from measuring import RESULTS, circumstances, keep, table, timings
from throughput import load, sampling

import llama32
from llama32.bench.turns import Run, disturbance, interleave, machine_seconds, run_undisturbed
from llama32.llm import LLM
from llama32.serve.app import create_app
from llama32.serve.server import Server
from llama32.serve.settings import ServeSettings

PROMPT = 20  # tokens
USAGE = {"include_usage": True}


def prompts(streams: int) -> list[list[int]]:
    """Each another one."""
    return [[100 + i, *range(300, 300 + PROMPT - 1)] for i in range(streams)]


def by_engine(llm: LLM, streams: int, tokens: int) -> float:
    """Seconds of the engine alone."""
    llm.engine.forget_prefixes()
    start = time.perf_counter()
    for prompt in prompts(streams):
        llm.engine.add(prompt, sampling(tokens))
    while llm.engine.is_busy:
        llm.engine.step()
    return time.perf_counter() - start


def by_server(llm: LLM, port: int, streams: int, tokens: int) -> float:
    """Seconds of the client, in another process."""
    llm.engine.forget_prefixes()
    command = [sys.executable, __file__, "--client", str(port)]
    given = ["--streams", str(streams), "--tokens", str(tokens)]
    told = subprocess.run([*command, *given], check=True, capture_output=True, text=True)
    return float(told.stdout)


async def stream(port: int, prompt: Sequence[int], tokens: int) -> None:
    """One request, to its end."""
    asked = {"model": "it", "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    body = json.dumps(
        {**asked, "ignore_eos": True, "stream": True, "stream_options": USAGE}
    ).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    writer.write(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
    last = b""
    while b"[DONE]" not in last:
        read = await reader.read(65536)
        if not read:
            raise RuntimeError(f"the stream broke off behind {last!r}")
        last = last[-500:] + read
    writer.close()
    if b'"completion_tokens":%d,' % tokens not in last:
        raise RuntimeError(f"not {tokens} tokens: {last!r}")


def client(port: int, streams: int, tokens: int) -> None:
    """All streams at once; prints the seconds from the first request to the last end."""

    async def everyone() -> None:
        await asyncio.gather(*(stream(port, prompt, tokens) for prompt in prompts(streams)))

    start = time.perf_counter()
    asyncio.run(everyone())
    print(time.perf_counter() - start)


def turn(work: Callable[[], float]) -> Run:
    """One run, with what others took meanwhile. The client is none of these."""

    def own() -> float:
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return time.process_time() + children.ru_utime + children.ru_stime

    busy, mine, start = machine_seconds(), own(), time.perf_counter()
    seconds = work()
    wall = (time.perf_counter() - start) * torch.multiprocessing.cpu_count()
    others = machine_seconds() - busy - (own() - mine)
    return Run(seconds, None, max(others - 0.03, 0) / wall, 0)


def start_server(llm: LLM) -> int:
    """In a thread of this process; its port."""
    is_up = threading.Event()
    told: list[str] = []
    settings = ServeSettings(port=0)
    app = create_app(llm, settings, "it")
    server = Server(app, settings, lambda url: (told.append(url), is_up.set()))
    threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True).start()
    is_up.wait()
    return int(told[0].rpartition(":")[2])


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what HTTP streaming costs a token.")
    parser.add_argument("model", nargs="?", default="tiny", help=f"tiny, a folder, or {[*SHAPES]}")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--streams", type=int, nargs="+", default=[16])
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--client", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--save", action="store_true", help=f"keep the result in {RESULTS.name}/")
    options = parser.parse_args()
    if options.client:
        client(options.client, options.streams[0], options.tokens)
        return
    model = load(options.model, getattr(torch, options.dtype))
    llm = (
        replace(llama32.load("tiny"), model=model)
        if options.model == "tiny"
        else LLM(model, None, None)
    )
    port = start_server(llm)
    rows, found = [], {}
    for streams in options.streams:
        works = {
            f"engine, {streams}": partial(by_engine, llm, streams, options.tokens),
            f"server, {streams}": partial(by_server, llm, port, streams, options.tokens),
        }
        turns = {
            name: partial(run_undisturbed, partial(turn, work)) for name, work in works.items()
        }
        found |= interleave(turns, options.runs)
        engine, server = (found[name] for name in works)
        ratios = [two.seconds / one.seconds for one, two in zip(engine, server, strict=True)]
        per_token = [
            1000 * statistics.median(run.seconds for run in runs) / options.tokens
            for runs in (engine, server)
        ]
        rows.append(
            [
                f"{streams}",
                *(f"{each:.2f}" for each in per_token),
                f"{statistics.median(ratios):.3f}",
                f"{min(ratios):.3f}-{max(ratios):.3f}",
            ]
        )
    head = ["streams", "engine, ms a token", "server, ms a token", "ratio", "from round to round"]
    report = (
        f"{options.model} in {options.dtype}; {options.tokens} tokens for each of the streams; "
        f"medians of {options.runs} rounds of turns.\n\n{table(head, rows)}\n\n"
        f"{disturbance(found)}."
    )
    print(report)
    if options.save:
        given = " ".join(sys.argv[1:])
        name = f"serving_{options.model}_{options.dtype}"
        packages = "torch", "fastapi", "uvicorn"
        keep(
            name, report, circumstances(f"benchmarks/serving.py {given}", packages), timings(found)
        )


if __name__ == "__main__":
    main()
