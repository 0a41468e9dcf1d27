"""Which container a name on the command line means."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ctrport.model import ContainerKey, Role
from ctrport.named import MOST_NAMED, NERDCTL_NAME, Named, NoSuch, find
from ctrport.pods import POD_NAME, POD_NAMESPACE

ID = "0123456789abcdef" * 4


def named(id: str, namespace: str = "default", *, runs: bool = True, **labels: str) -> Named:
    return Named(ContainerKey(namespace, id), labels, runs)


def nerdctls(id: str, name: str, namespace: str = "default") -> Named:
    return Named(ContainerKey(namespace, id), {NERDCTL_NAME: name}, True)


def pods(
    id: str, name: str = "web-0", role: Role = Role.SANDBOX, *, namespace: str = "shop", runs: bool = True
) -> Named:
    return Named(ContainerKey("k8s.io", id), {POD_NAMESPACE: namespace, POD_NAME: name}, runs, role)


def why(name: str, *containers: Named) -> str:
    with pytest.raises(NoSuch) as caught:
        find(name, containers)
    return str(caught.value)


WEB, WEB2, TEST = named("web"), named("web-2"), named("web", "test")
SHOP = nerdctls(ID, "shop")
POD, MEMBER = pods("aaa111"), pods("bbb222", role=Role.MEMBER)
ALL = (WEB, WEB2, TEST, SHOP, POD, MEMBER)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("web-2", WEB2),
        ("web-", WEB2),
        ("default/web", WEB),
        ("test/web", TEST),
        ("test/w", TEST),
        ("shop", SHOP),
        ("default/shop", SHOP),
        (ID, SHOP),
        (ID[:4], SHOP),
        ("pod:shop/web-0", POD),
        ("aaa", POD),
        ("k8s.io/aaa111", POD),
        ("bbb222", MEMBER),  # that it is part of a pod is not for the name to say
    ],
)
def test_a_name_means_one(name: str, expected: Named) -> None:
    assert find(name, ALL) is expected
    assert find(name, ALL[::-1]) is expected


def test_the_whole_of_an_id_comes_before_the_beginning_of_others() -> None:
    assert find("web", [WEB, WEB2]) is WEB
    assert find("web", [WEB2, nerdctls("webx", "web")]).key.id == "webx"


def test_no_label_takes_a_name_from_a_namespace_and_an_id() -> None:
    liar = nerdctls("liar", "web")
    assert find("default/web", [liar, WEB]) is WEB
    said = "'web' may be default/liar (web) or default/web: expected the whole of one, NAMESPACE/ID"
    assert why("web", liar, WEB) == said


def test_of_a_pod_the_sandbox_that_runs_is_meant() -> None:
    ended = pods("zzz", runs=False)
    assert find("pod:shop/web-0", [ended, POD]) is POD
    assert find("pod:shop/web-0", [ended]) is ended
    twice = pods("ccc")
    assert why("pod:shop/web-0", POD, twice) == (
        "'pod:shop/web-0' may be k8s.io/aaa111 (pod:shop/web-0) or k8s.io/ccc (pod:shop/web-0): "
        "expected the whole of one, NAMESPACE/ID"
    )


@pytest.mark.parametrize(
    ("name", "containers", "said"),
    [
        ("web", ALL, "'web' may be default/web or test/web: expected the whole of one, NAMESPACE/ID"),
        ("we", [WEB, WEB2], "'we' may be default/web or default/web-2: expected the whole of one, NAMESPACE/ID"),
        ("webb", [WEB, POD], "no container is called 'webb'; did you mean web?"),
        ("pod:shop/web0", [WEB, POD], "no container is called 'pod:shop/web0'; did you mean pod:shop/web-0?"),
        ("pod:web-0", [POD], "no container is called 'pod:web-0'; did you mean pod:shop/web-0?"),
        (
            "nope",
            [WEB, POD, MEMBER],
            "no container is called 'nope'; those that run are default/web and pod:shop/web-0",
        ),
        ("nope/web", [WEB], "no container is called 'nope/web'; those that run are default/web"),
        ("a/b/c", [WEB], "no container is called 'a/b/c'; those that run are default/web"),
        ("", [WEB], "no container is called ''; those that run are default/web"),
        ("", [], "no container is called ''; none runs"),
        ("x", [named("db", runs=False)], "no container is called 'x'; none runs"),
    ],
)
def test_what_means_none_or_several_is_told_with_what_there_is(
    name: str, containers: Sequence[Named], said: str
) -> None:
    assert why(name, *containers) == said


def test_few_of_many_are_named() -> None:
    said = why("w", *(named(f"w{number:02}") for number in range(20)))
    assert said == (
        f"'w' may be default/w00, default/w01, default/w02, default/w03, default/w04 or {20 - MOST_NAMED} more: "
        "expected the whole of one, NAMESPACE/ID"
    )


def test_a_pod_is_called_by_its_name_as_far_as_that_is_one() -> None:
    assert str(POD) == "pod:shop/web-0"
    assert str(pods("ddd", "$(reboot)")) == "k8s.io/ddd"
    assert find("pod:shop/$(reboot)", [pods("ddd", "$(reboot)")]).key.id == "ddd"


names = st.sampled_from(["web", "we", "db", "", "/", "pod:", "pod:a/b", "a/b", "\x1b[2J"]) | st.text(max_size=8)
everyone = st.lists(
    st.builds(
        Named,
        st.builds(ContainerKey, st.sampled_from(["default", "test"]), st.sampled_from(["web", "web-2", "db"])),
        st.dictionaries(
            st.sampled_from([POD_NAME, POD_NAMESPACE, NERDCTL_NAME]),
            st.sampled_from(["a", "b", "web"]) | st.text(max_size=6),
        ),
        st.booleans(),
        st.sampled_from([None, *Role]),
    ),
    max_size=6,
    unique_by=lambda one: one.key,
)


@given(names, everyone)
@example("web", [nerdctls("db", "web\x1b[2J")])
def test_whatever_is_asked_has_one_answer_whatever_the_order_or_a_short_printable_sentence(
    name: str, containers: list[Named]
) -> None:
    found = answer(name, containers)
    assert answer(name, containers[::-1]) == found
    if isinstance(found, str):
        assert found.isprintable()
        assert len(found) < 1000
        return
    assert str(found).isascii()
    whole = [one for one in containers if name == str(one.key)]
    assert whole in ([], [found])


def answer(name: str, containers: list[Named]) -> Named | str:
    try:
        return find(name, containers)
    except NoSuch as error:
        return str(error)
