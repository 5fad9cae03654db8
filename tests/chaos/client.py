"""One client: sends a request to a gate, reads all of what comes, and says what became of it.

Owns: the line between what a client may be asked to bear and what is a loss. A refusal is an error status before the
first byte that an SDK would try again, with its `Retry-After` where it is a 503. Everything else that is not a whole
answer is a loss, and so is a door that does not open.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass

import aiohttp

from tests.chaos import answers
from tests.chaos.answers import Answer, Broken
from tests.chaos.asks import Ask

RETRYABLE = frozenset({429, 502, 503, 504})


@dataclass(frozen=True)
class Outcome:
    """What became of one request. Moments on `time.monotonic()`.

    answer: of one that was answered whole.     refused, lost: the reason, where it was not.
    """

    ask: Ask
    began: float
    ended: float
    answer: Answer | None = None
    refused: str = ""
    lost: str = ""


class Client:
    """Sends requests, each on a connection of its own: a keep-alive that a server ends in the same moment would be
    nobody's loss, and could not be told from one."""

    def __init__(self, key: str, patience_s: float) -> None:
        self._headers = {"authorization": f"Bearer {key}"} if key else {}
        self._patience_s = patience_s

    async def __aenter__(self) -> Client:
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        timeout = aiohttp.ClientTimeout(total=self._patience_s)
        self._session = aiohttp.ClientSession(connector=connector, timeout=timeout, headers=self._headers)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def send(self, url: str, ask: Ask) -> Outcome:
        """Ask at `url`. Does not raise."""
        began = time.monotonic()
        body, status, late, trouble = b"", 0, "", ""
        try:
            async with self._session.post(url + ask.path, json=ask.body) as response:
                status, late = response.status, response.headers.get("retry-after", "")
                async for data in response.content.iter_any():
                    body += data
        except asyncio.TimeoutError:
            trouble = f"no end of it within {self._patience_s:g} s"
        except (aiohttp.ClientError, OSError) as error:
            trouble = f"{type(error).__name__}: {error}"
        return judge(ask, began, time.monotonic(), status, late, body, trouble)


def judge(ask: Ask, began: float, ended: float, status: int, late: str, body: bytes, trouble: str) -> Outcome:
    """What became of a request: its status (0: none came), `Retry-After`, and all that came. trouble: how it broke
    off, empty where it did not."""
    if trouble:
        return Outcome(ask, began, ended, lost=f"{trouble}, status {status}, after {body[-200:]!r}")
    if status in RETRYABLE:
        why = f"{status}: {_message(body)}"
        if status == 503 and not (late.isdigit() and int(late) > 0):
            return Outcome(ask, began, ended, lost=f"{why}, with Retry-After {late!r}")
        return Outcome(ask, began, ended, refused=why)
    if status != 200:
        return Outcome(ask, began, ended, lost=f"{status}: {_message(body)}")
    try:
        read = answers.streamed if ask.streams else answers.whole
        return Outcome(ask, began, ended, read(body, ask.choices))
    except Broken as error:
        return Outcome(ask, began, ended, lost=str(error))


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return repr(body[:200])
