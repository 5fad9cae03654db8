"""The nodes file by table: what it may hold, and how what is wrong with it is named."""

from __future__ import annotations

import pytest

from llmgate import listing
from llmgate.core import policy
from llmgate.listing import Address, Canary, Route, parse

NODE = '[[nodes]]\nname="a"\nurl="http://a"\n'


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no [[nodes]] entry"),
        ("nodes = []", "no [[nodes]] entry"),
        ("nodes = 5", "no [[nodes]] entry"),
        ("nodes = [5]", "is not a table"),
        ("[[nodes]", "not valid TOML"),
        ('[[node]]\nname="a"', "unknown key 'node'"),
        ('[[nodes]]\nname="a"', "url must look like"),
        ('[[nodes]]\nurl="http://a"', "name must be"),
        ('[[nodes]]\nname="a b"\nurl="http://a"', "name must be"),
        ('[[nodes]]\nname="a"\nurl="ftp://a"', "url must look like"),
        ('[[nodes]]\nname="a"\nurl="http://"', "url must look like"),
        ('[[nodes]]\nname="a"\nurl="http://a/v1"', "without a path"),
        ('[[nodes]]\nname="a"\nurl="http://a:99999"', "url must look like"),
        ('[[nodes]]\nname="a"\nurl="http://u:p@a"', "url must look like"),
        (NODE + "port=5", "unknown key 'port'; it takes name, url, labels and weight"),
        (NODE + '[[nodes]]\nname="a"\nurl="http://b"', "two nodes have the name 'a'"),
        (NODE + '[[nodes]]\nname="b"\nurl="http://a/"', "two nodes have the url"),
        (NODE + "weight=0", "[[nodes]] entry 1 (a): weight must be above 0"),
        (NODE + "weight=nan", "weight must be above 0"),
        (NODE + "weight=true", "weight must be above 0"),
        (NODE + 'weight="2"', "weight must be above 0"),
        (NODE + "weight=2000", "at most 1000, got 2000"),
        (NODE + 'labels="a"', "[[nodes]] entry 1 (a): labels must be a table of texts"),
        (NODE + "labels={zone=1}", "labels must be a table of texts"),
        (NODE + "models=5", "unknown key 'models'"),
        ("models=5\n" + NODE, "models must be tables like [models.NAME]"),
        ("models={m=5}\n" + NODE, '[models."m"] is not a table'),
        (NODE + '[models.m]\npolice="prefix"', "[models.\"m\"] has an unknown key 'police'"),
        (NODE + '[models.m]\npolicy="best"', "policy must be one of prefix, least-loaded, round-robin, random"),
        (NODE + '[models.m]\naliases="x"', '[models."m"]: aliases must be a list of names'),
        (NODE + '[models.m]\naliases=[""]', "aliases must be a list of names"),
        (NODE + '[models.m]\naliases=["x","x"]', "aliases has 'x' twice"),
        (NODE + '[models.m]\naliases=["m"]', "the alias 'm' already stands for 'm'"),
        (NODE + '[models.m]\naliases=["x"]\n[models.n]\naliases=["x"]', "the alias 'x' already stands for 'm'"),
        (NODE + '[models.m]\nfallback=[5]', "fallback must be a list of names"),
        (NODE + '[models.m]\nfallback=["m"]', "fallback names the model itself"),
        (NODE + '[models.m]\nfallback=["x"]\n[models.n]\naliases=["x"]', "takes ids of models, and 'x' is an alias"),
        (NODE + '[models.m]\nlabels={zone=true}', '[models."m"]: labels must be a table of texts'),
        (NODE + "[models.m]\ncanary=5", '[models."m"] canary is not a table'),
        (NODE + '[models.m.canary]\nshare=0.5', "canary: release must be a release"),
        (NODE + '[models.m.canary]\nrelease="r"', "canary: share must be from 0 to 1, got None"),
        (NODE + '[models.m.canary]\nrelease="r"\nshare=5', "share must be from 0 to 1, got 5"),
        (NODE + '[models.m.canary]\nrelease="r"\nshare=0.5\nof="x"', "unknown key 'of'; it takes release and share"),
    ],
)  # fmt: skip
def test_a_bad_nodes_file_names_what_is_wrong(text: str, says: str) -> None:
    with pytest.raises(ValueError) as error:
        parse(text)
    assert says in str(error.value)


def test_nodes_are_read_in_order() -> None:
    text = '[[nodes]]\nname="b"\nurl="http://10.0.0.1:8100/"\n[[nodes]]\nname="a"\nurl="https://[::1]:8100"\n'
    assert parse(text).addresses == (Address("b", "http://10.0.0.1:8100"), Address("a", "https://[::1]:8100"))
    assert parse(text).routes == {}


def test_everything_that_a_file_may_say_is_read() -> None:
    text = """
    [[nodes]]
    name = "gpu1"
    url = "http://10.0.0.1:8100"
    labels = {zone = "a", gpu = "h100"}
    weight = 2

    [models."qwen-7b"]
    policy = "rendezvous"
    aliases = ["gpt-4o", "default"]
    fallback = ["qwen-1b"]
    labels = {zone = "a"}
    canary = {release = "0.2.0", share = 0.05}

    [models.plain]
    """
    read = parse(text)
    labels = frozenset({("zone", "a"), ("gpu", "h100")})
    assert read.addresses == (Address("gpu1", "http://10.0.0.1:8100", labels, 2.0),)
    route = Route("rendezvous", ("gpt-4o", "default"), ("qwen-1b",), frozenset({("zone", "a")}), Canary("0.2.0", 0.05))
    assert read.routes == {"qwen-7b": route, "plain": Route()}


def test_every_policy_that_can_be_named_exists_and_the_cost_rule_is_the_default() -> None:
    assert tuple(policy.POLICIES) == listing.POLICIES
    assert Route().policy == "prefix"
