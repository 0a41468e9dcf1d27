"""Which containers are published as one."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from ctrport.model import ContainerKey, Member, Pod, Role
from ctrport.pods import CONTAINER_NAME, POD_NAME, POD_NAMESPACE, POD_UID, Pods, Running

HOST, MINE, OTHER = (4, 1), (4, 2), (4, 3)  # network namespaces


def key(name: str) -> ContainerKey:
    return ContainerKey("k8s.io", name)


def running(name: str, netns: tuple[int, int], started: int = 1, **labels: str) -> Running:
    return Running(key(name), 100 + started, started, netns, labels)


def sandbox(name: str, netns: tuple[int, int] = MINE, uid: str = "u", started: int = 1) -> Running:
    labels = {POD_NAME: "redis-0", POD_NAMESPACE: "prod", POD_UID: uid, "app": "redis"}
    return Running(key(name), 100 + started, started, netns, labels, role=Role.SANDBOX)


def member(name: str, netns: tuple[int, int] = MINE, uid: str = "u", called: str = "redis") -> Running:
    return Running(key(name), 200, 2, netns, {POD_UID: uid, CONTAINER_NAME: called}, role=Role.MEMBER)


def test_a_container_that_is_in_no_pod_is_published_by_itself() -> None:
    pods = Pods()
    web = running("web", MINE, app="web")
    assert pods.see(web) == {key("web")}
    container = pods.get(key("web"))
    assert container is not None
    assert (container.key, container.pid, container.pod) == (key("web"), 101, None)
    assert container.members == (Member("web", None, {"app": "web"}),)


def test_labels_of_a_pod_make_no_pod_of_a_container() -> None:
    """They may be those of its image."""
    pods = Pods()
    pods.see(replace(sandbox("shop"), role=None))
    pods.see(replace(member("job"), role=None))
    for name in ("shop", "job"):
        container = pods.get(key(name))
        assert container is not None
        assert container.pod is None
        assert [one.id for one in container.members] == [name]
    pods.see(sandbox("s"))
    pod = pods.get(key("s"))
    assert pod is not None
    assert pod.members == ()


def test_a_pod_is_published_by_its_sandbox_with_all_of_its_containers() -> None:
    pods = Pods()
    assert pods.see(sandbox("s")) == {key("s")}
    assert pods.see(member("b", called="exporter")) == {key("s")}
    assert pods.see(member("a")) == {key("s")}
    pod = pods.get(key("s"))
    assert pod is not None
    assert pod.pod == Pod("prod", "redis-0", sandbox("s").labels)
    assert [(each.id, each.name) for each in pod.members] == [("a", "redis"), ("b", "exporter")]
    assert pods.get(key("a")) is None
    assert pods.forget(key("a")) == {key("s")}
    pod = pods.get(key("s"))
    assert pod is not None
    assert [each.id for each in pod.members] == ["b"]


def test_containers_whose_sandbox_is_gone_are_published_as_nothing() -> None:
    pods = Pods()
    pods.see(sandbox("s"))
    pods.see(member("a"))
    assert pods.forget(key("s")) == {key("s")}
    assert pods.get(key("s")) is None
    assert pods.see(member("b")) == set()
    pods.see(sandbox("t"))
    pod = pods.get(key("t"))
    assert pod is not None
    assert [each.id for each in pod.members] == ["a", "b"]


def test_a_sandbox_made_anew_has_its_own_containers_and_not_those_of_the_old() -> None:
    pods = Pods()
    pods.see(sandbox("old"))
    pods.see(member("a"))
    pods.see(sandbox("new", OTHER, started=5))
    pods.see(member("b", OTHER))
    for name, members in (("old", ["a"]), ("new", ["b"])):
        pod = pods.get(key(name))
        assert pod is not None
        assert [each.id for each in pod.members] == members


def test_pods_on_the_hosts_network_are_told_apart() -> None:
    pods = Pods()
    for uid in ("u", "v"):
        pods.see(sandbox(f"s-{uid}", HOST, uid))
        pods.see(member(f"a-{uid}", HOST, uid))
    for uid in ("u", "v"):
        pod = pods.get(key(f"s-{uid}"))
        assert pod is not None
        assert [each.id for each in pod.members] == [f"a-{uid}"]


def test_a_container_that_is_another_process_now_leaves_where_it_was() -> None:
    pods = Pods()
    for name, netns in (("s", MINE), ("t", OTHER)):
        pods.see(sandbox(name, netns))
    pods.see(member("a"))
    assert pods.see(member("a", OTHER)) == {key("s"), key("t")}
    first = pods.get(key("s"))
    assert first is not None
    assert first.members == ()


def test_what_was_never_seen_may_be_forgotten() -> None:
    assert Pods().forget(key("web")) == {key("web")}


RUNNING = st.one_of(
    st.builds(sandbox, st.sampled_from("st"), st.sampled_from([HOST, MINE, OTHER]), st.sampled_from("uv")),
    st.builds(member, st.sampled_from("abc"), st.sampled_from([HOST, MINE, OTHER]), st.sampled_from("uv")),
    st.builds(running, st.sampled_from("wx"), st.sampled_from([HOST, MINE])),
)


@given(st.lists(st.one_of(RUNNING, st.sampled_from([key(name) for name in "stabcwx"])), max_size=30))
def test_what_is_published_depends_on_what_runs_alone_and_every_change_is_told(
    steps: list[Running | ContainerKey],
) -> None:
    pods = Pods()
    runs: dict[ContainerKey, Running] = {}
    shown: dict[ContainerKey, object] = {}
    for step in steps:
        if isinstance(step, Running):
            runs[step.key] = step
            touched = pods.see(step)
        else:
            runs.pop(step, None)
            touched = pods.forget(step)
        shown.update({each: pods.get(each) for each in touched})
    fresh = Pods()
    for each in sorted(runs.values(), key=lambda one: one.key):
        fresh.see(each)
    assert sorted(pods.running) == sorted(runs)
    for name in "stabcwx":
        assert pods.get(key(name)) == fresh.get(key(name)) == shown.get(key(name))
