"""Log lines: as text, as JSON, as logfmt, and as entries of systemd's journal."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmgate.requestlog import RequestLog
from llmnode.service import journal
from llmnode.service.journal import Journal
from llmnode.service.logs import Entries, TextLines, logfmt
from tests.journal import FakeJournal, fake_journal
from tests.processes import wait_for


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeJournal]:
    with fake_journal(tmp_path) as found:
        monkeypatch.setattr(journal, "SOCKET", str(found.path))
        yield found


def record(message: str, level: int = logging.INFO, **fields: object) -> logging.LogRecord:
    made = logging.LogRecord("llmnode.access", level, "file.py", 1, message, (), None)
    made.fields = fields
    return made


def test_logfmt_quotes_what_is_no_one_word() -> None:
    line = {"id": "req-1", "why": 'said "no"', "empty": "", "n": 3, "s": 0.25, "ok": True, "none": None, "eq": "a=b"}
    assert logfmt(line) == r'id=req-1 why="said \"no\"" empty="" n=3 s=0.25 ok=true eq="a=b"'
    assert logfmt({"attempts": [{"node": "a"}]}) == r'attempts="[{\"node\": \"a\"}]"'
    assert logfmt({"forged": "x\nlevel=error\u2028y"}) == r'forged="x\nlevel=error\u2028y"'


def test_a_line_is_an_entry_with_its_fields(there: FakeJournal) -> None:
    to = Entries(Journal("llmnode"), logging.NullHandler())
    to.setFormatter(TextLines())
    to.emit(record("request", request_id="req-1", status=200, first_token_ms=None, stream=True))
    to.emit(record("two\nlines", logging.WARNING, **{"odd name": "a\nb=c"}))
    entry = there.entry(LLMRACK_REQUEST_ID="req-1")
    assert entry["SYSLOG_IDENTIFIER"] == "llmnode"
    assert entry["PRIORITY"] == "6"
    assert entry["MESSAGE"].endswith("llmnode.access: request request_id=req-1 status=200 stream=true")
    assert entry["LLMRACK_STATUS"] == "200"
    assert entry["LLMRACK_STREAM"] == "true"
    assert entry["LLMRACK_LOGGER"] == "llmnode.access"
    assert "LLMRACK_FIRST_TOKEN_MS" not in entry
    assert there.entry(PRIORITY="4")["LLMRACK_ODD_NAME"] == "a\nb=c"


def test_a_field_that_is_longer_than_a_datagram_is_cut(there: FakeJournal) -> None:
    Journal("llmnode").send("x" * 10_000_000, 3, {"why": "y" * 100_000})
    entry = there.entry(PRIORITY="3")
    assert len(entry["MESSAGE"]) == len(entry["LLMRACK_WHY"]) == 48 * 1024


def test_only_what_systemd_calls_its_stream_is_the_journal(tmp_path: Path) -> None:
    with (tmp_path / "out").open("w") as out:
        there = (tmp_path / "out").stat()
        assert journal.is_stream(out.fileno(), {"JOURNAL_STREAM": f"{there.st_dev}:{there.st_ino}"})
        assert not journal.is_stream(out.fileno(), {"JOURNAL_STREAM": f"{there.st_dev}:{there.st_ino + 1}"})
        assert not journal.is_stream(out.fileno(), {})
        number = out.fileno()
    assert not journal.is_stream(number, {"JOURNAL_STREAM": "1:1"})


def test_lines_go_on_to_standard_error_while_the_journal_takes_none(
    there: FakeJournal, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = logging.StreamHandler(sys.stderr)
    other.setFormatter(TextLines())
    entries = Entries(Journal("llmnode"), other)
    monkeypatch.setattr(journal, "SOCKET", str(there.path) + "-away")
    entries.emit(record("nobody listens", request_id="req-2"))
    assert "nobody listens request_id=req-2" in capsys.readouterr().err
    monkeypatch.setattr(journal, "SOCKET", str(there.path))
    entries.emit(record("somebody does", request_id="req-2"))
    there.entry(LLMRACK_REQUEST_ID="req-2")
    assert capsys.readouterr().err == ""


LINE = {"ts": 1.5, "id": "req-3", "key": "client", "status": 200, "node": None, "attempts": [{"node": "a"}]}


def test_the_request_log_is_written_in_the_form_that_is_wanted(tmp_path: Path) -> None:
    for form in ("json", "logfmt"):
        out = RequestLog(str(tmp_path / form), form)
        out.write({**LINE, "model": "odd \ud800"})
        out.close()
    assert json.loads((tmp_path / "json").read_text()) == {**LINE, "model": "odd \ud800"}
    assert (tmp_path / "logfmt").read_text() == (
        'ts=1.5 id=req-3 key=client status=200 attempts="[{\\"node\\": \\"a\\"}]" model="odd \\ud800"\n'
    )


def test_the_request_log_can_be_the_journal_and_goes_on_when_that_is_back(
    there: FakeJournal, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    out = RequestLog("journal", "logfmt")
    out.write(LINE)
    entry = there.entry(LLMRACK_REQUEST_ID="req-3")
    assert entry["MESSAGE"].startswith("ts=1.5 id=req-3 key=client status=200")
    assert entry["SYSLOG_IDENTIFIER"] == "llmgate"
    assert entry["LLMRACK_KEY"] == "client"
    assert not {"LLMRACK_TS", "LLMRACK_NODE", "LLMRACK_ATTEMPTS"} & set(entry)
    monkeypatch.setattr(journal, "SOCKET", str(there.path) + "-away")
    for _ in range(2):
        out.write(LINE)
    wait_for(lambda: out.dropped == 2, "lines that nobody took")
    monkeypatch.setattr(journal, "SOCKET", str(there.path))
    out.write({**LINE, "id": "req-4"})
    there.entry(LLMRACK_REQUEST_ID="req-4")
    out.close()
    assert caplog.text.count("cannot write the request log") == 1
    assert "2 lines were lost" in caplog.text
