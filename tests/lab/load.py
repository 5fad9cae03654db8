"""Keeps asking a gate streamed questions from several threads until standard input closes, then says how it went.

    python load.py URL KEY MODEL THREADS < pipe      prints {"answered": n, "failed": [what, ...]} as JSON

An answer counts when its status is 200, it has content, no error, and it ends with [DONE].
"""

from __future__ import annotations

import json
import sys
import threading

import httpx


def ask(client: httpx.Client, model: str) -> str:
    """One streamed question; returns what was wrong with the answer, or nothing."""
    body = {"model": model, "messages": [{"role": "user", "content": "Count."}], "max_tokens": 24, "stream": True}
    try:
        with client.stream("POST", "/v1/chat/completions", json=body) as response:
            # Not iter_lines(): it also ends lines at characters that may stand in an answer, such as U+2028.
            lines = [line for line in response.read().split(b"\n") if line.startswith(b"data: ")]
        if response.status_code != 200:
            return f"status {response.status_code}"
        if not lines or lines[-1] != b"data: [DONE]":
            return f"no [DONE] after {len(lines)} events"
        events = [json.loads(line.removeprefix(b"data: ")) for line in lines[:-1]]
    except (httpx.HTTPError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    if any("error" in event for event in events):
        return f"an error in the stream: {lines[-2]!r}"
    return "" if len(events) > 1 else "no content"


def main(url: str, key: str, model: str, threads: str) -> None:
    stop = threading.Event()
    results: list[str] = []

    def work() -> None:
        with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=120) as client:
            while not stop.is_set():
                results.append(ask(client, model))

    workers = [threading.Thread(target=work) for _ in range(int(threads))]
    for worker in workers:
        worker.start()
    sys.stdin.read()
    stop.set()
    for worker in workers:
        worker.join()
    print(json.dumps({"answered": results.count(""), "failed": [result for result in results if result]}))


if __name__ == "__main__":
    main(*sys.argv[1:])
