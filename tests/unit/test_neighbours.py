from __future__ import annotations

from ctrport.neighbours import _by_chains


def test_whose_chains_there_are_is_said_once_a_sort() -> None:
    chains = {
        *(("nat", f"KUBE-SERVICES{suffix}") for suffix in ("", "-X")),
        *(("filter", f"cali-fw-{number}") for number in range(1000)),
        ("nat", "CILIUM_POST_nat"),
        ("nat", "FLANNEL-POSTRTG"),
        ("kube-proxy", "services"),
        ("kube-proxy", "nodeport-ips"),
        ("firewalld", "filter_FORWARD"),
        ("nat", "DOCKER"),
        ("mangle", "KUBE-IPTABLES-HINT"),  # the kubelet's, which is on every node of a cluster
    }
    assert _by_chains(chains) == [
        ("calico", "chains cali-*"),
        ("cilium", "chains CILIUM_*"),
        ("firewalld", "table firewalld"),
        ("flannel", "chains FLANNEL-*"),
        ("kube-proxy", "chains KUBE-SERVICES*"),
        ("kube-proxy", "table kube-proxy"),
    ]
    assert _by_chains(()) == []
