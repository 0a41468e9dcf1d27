"""Whose a process is, by the cgroup that containerd has stored and the one that the kernel shows."""

from __future__ import annotations

import json

import pytest

from ctrport.cgroups import cgroup_of, is_in

V1 = "12:memory:/default/web\n11:cpu,cpuacct:/default/web\n0::/\n"


@pytest.mark.parametrize(
    ("spec", "cgroup"),
    [
        (json.dumps({"linux": {"cgroupsPath": "/default/web"}}), "/default/web"),
        (
            json.dumps({"annotations": {"cgroupsPath": "/other"}, "linux": {"cgroupsPath": "/default/web"}}),
            "/default/web",
        ),
        *(
            (text, "")
            for text in ("", "{", "[]", "{}", '{"linux": null}', '{"linux": {"cgroupsPath": 1}}', "[" * 10_000)
        ),
    ],
)
def test_the_cgroup_is_read_out_of_the_spec(spec: str, cgroup: str) -> None:
    assert cgroup_of(spec.encode()) == cgroup


@pytest.mark.parametrize(
    ("cgroup", "shown"),
    [
        ("/default/web", V1),
        ("/default/web", "0::/default/web\n"),
        ("/default/web", "0::/../../default/web\n"),  # to a reader in a cgroup namespace of its own
        ("system.slice:ctrd:web", "0::/system.slice/ctrd-web.scope\n"),
        (
            "kubepods-pod1.slice:cri-containerd:ab12",
            "0::/kubepods.slice/kubepods-pod1.slice/cri-containerd-ab12.scope\n",
        ),
        ("user.slice::web", "0::/user.slice/web.scope\n"),
        ("/odd:name", "0::/odd:name\n"),
    ],
)
def test_a_process_in_it_is_told(cgroup: str, shown: str) -> None:
    assert is_in(cgroup, shown)


@pytest.mark.parametrize(
    ("cgroup", "shown"),
    [
        ("/default/web", "0::/default/web2\n"),
        ("/default/web", "0::/default/web/below\n"),  # a container inside the container
        ("/default/web", "0::/default/outer/default/web\n"),
        ("/default/web", "0::/\n"),
        ("/default/web", ""),
        ("/default/web", "nonsense\n"),
        ("/", "0::/\n"),
        ("", "0::/\n"),
        ("default/web", "0::/default/web\n"),  # relative to runc's own
        ("system.slice:ctrd:web", "0::/system.slice/ctrd-web2.scope\n"),
        ("system.slice:ctrd:web", "0::/system.slice/ctrd-web.scope/below\n"),
        ("a:b:c/d", "0::/a/b-c/d.scope\n"),
        ("system.slice:ctrd", "0::/system.slice/ctrd.scope\n"),
        ("::", "0::/-.scope\n"),
    ],
)
def test_another_is_not_taken_for_it(cgroup: str, shown: str) -> None:
    assert not is_in(cgroup, shown)
