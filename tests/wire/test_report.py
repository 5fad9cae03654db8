"""The node's report: what is read back is what was said, and what is not a report is named."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from llmnode.wire.node import Cache, Device, Host, Load, Model, Report, State, Usage

FULL = Report(
    boot="b1",
    release="0.1.0-abc",
    config="0123456789abcdef",
    state=State.LOADING,
    why="reading the model",
    progress=0.25,
    models=(Model("tiny", ("t", "x"), "loading", "ff" * 32, 4096, ("chat",), ("text",), "aa", "dd"),),
    load=Load(4, 3, 2, 16384, 900, 77, 1234.5, 56.75, 0.25, 3.5),
    devices=(Device("CUDA", "H100", "GPU-1", 80_000_000_000, 1),),
    host=Host(64, 12.5, 1000, 500, 200),
    cache=Cache("AAAAAAAAAAA="),
    resume=1,
)


def over_the_wire(report: Report) -> Any:
    return json.loads(json.dumps(report.json()))


@pytest.mark.parametrize("state", list(State))
def test_a_report_is_read_as_it_was_written(state: State) -> None:
    body = over_the_wire(FULL) | {"state": state.value}
    read = Report.parse(body)
    assert read.state is state
    assert over_the_wire(read) == body


def test_the_least_report_has_defaults_for_all_the_rest() -> None:
    read = Report.parse({"protocol": 1, "state": "ready"})
    assert (read.boot, read.models, read.load, read.devices) == ("", (), Load(), ())


def test_fields_of_a_later_release_are_ignored_wherever_they_are() -> None:
    body = over_the_wire(FULL)
    for place in (body, body["load"], body["host"], body["models"][0], body["devices"][0]):
        place["from_the_future"] = {"anything": [1, None]}
    assert Report.parse(body | {"protocol": 2}).models == FULL.models


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ((), [], "must be a JSON object"),
        ((), None, "must be a JSON object"),
        (("protocol",), 0, "protocol must be"),
        (("protocol",), "1", "protocol must be"),
        (("protocol",), None, "protocol must be"),
        (("state",), "busy", "state must be one of"),
        (("state",), None, "state must be one of"),
        (("state",), 5, "state must be one of"),
        (("boot",), 5, "boot must be a string"),
        (("progress",), "half", "progress must be a number"),
        (("models",), {}, "models must be a list"),
        (("models", 0), "tiny", "models must be an object"),
        (("models", 0, "id"), 5, "models.id must be a string"),
        (("models", 0, "aliases"), "t", "models.aliases must be a list of strings"),
        (("models", 0, "aliases"), [1], "models.aliases must be a list of strings"),
        (("models", 0, "n_ctx"), -1, "models.n_ctx must be a whole number"),
        (("models", 0, "n_ctx"), 1.5, "models.n_ctx must be a whole number"),
        (("models", 0, "n_ctx"), True, "models.n_ctx must be a whole number"),
        (("load",), [], "load must be an object"),
        (("load", "slots"), "4", "load.slots must be a whole number"),
        (("load", "decode_tps"), None, "load.decode_tps must be a number"),
        (("devices", 0, "backend"), 1, "devices.backend must be a string"),
        (("host",), 5, "host must be an object"),
    ],
)
def test_what_is_no_report_is_refused_by_name(path: tuple[Any, ...], value: Any, says: str) -> None:
    body = copy.deepcopy(over_the_wire(FULL))
    if path:
        place = body
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = value
    else:
        body = value
    with pytest.raises(ValueError) as error:
        Report.parse(body)
    assert says in str(error.value)


@pytest.mark.parametrize("missing", ["id"])
def test_a_model_without_its_id_is_refused(missing: str) -> None:
    body = over_the_wire(FULL)
    del body["models"][0][missing]
    with pytest.raises(ValueError, match=r"models\.id is missing"):
        Report.parse(body)


def test_no_part_of_a_report_may_be_any_other_json_and_crash_the_reader() -> None:
    """Every value in the report replaced by every kind of JSON value: read, or refused with ValueError."""
    others = [None, True, -1, 2**70, 1.5, "", "text", [], [[]], {}, {"a": 1}]

    def places(body: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        found = [path] if path else []
        if isinstance(body, dict):
            found += [p for key, value in body.items() for p in places(value, (*path, key))]
        if isinstance(body, list):
            found += [p for number, value in enumerate(body) for p in places(value, (*path, number))]
        return found

    for path in places(over_the_wire(FULL)):
        for other in others:
            body = over_the_wire(FULL)
            place = body
            for step in path[:-1]:
                place = place[step]
            place[path[-1]] = other
            try:
                Report.parse(body)
            except ValueError:
                pass


def test_usage_in_openais_words() -> None:
    assert Usage(11, 3, 5).openai() == {
        "prompt_tokens": 11,
        "completion_tokens": 5,
        "total_tokens": 16,
        "prompt_tokens_details": {"cached_tokens": 3},
    }
