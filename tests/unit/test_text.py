from __future__ import annotations

import asyncio
from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrport.firewall.fake import MemoryKernel
from ctrport.firewall.plan import Add, Block, Delete, Empty, Line, New, Op, Plan, Remove
from ctrport.firewall.tables import Tables
from ctrport.firewall.text import (
    TAG,
    arguments,
    counts,
    diff,
    holders,
    listing,
    owner,
    restore_input,
    saved,
    shell,
    tag,
)
from ctrport.model import (
    IDENTIFIER_MAX,
    Attachment,
    ContainerKey,
    Count,
    Family,
    Mapping,
    PortRange,
    Protocol,
    Publication,
    State,
)
from ctrport.owners import Owner, owner_of
from ctrport.rules import ACCEPT, Dnat, Jump, Layout, Match, Rule, Table, rules_for, skeleton
from tests.unit import strategies, worlds
from tests.unit.worlds import active

#: What xt_comment keeps, with a zero byte behind it (linux/netfilter/xt_comment.h).
COMMENT_MAX = 255


def rule(owner: str = "default/web 8080:80/tcp", chain: str = "DOCKER", match: Match | None = None) -> Rule:
    return Rule(Family.IPV4, Table.NAT, chain, match or Match(), ACCEPT, owner)


def test_a_tag_names_the_owner_and_is_read_back() -> None:
    found = TAG.fullmatch(tag(rule()))
    assert found is not None
    assert found["owner"] == "default/web 8080:80/tcp"
    assert owner(tag(rule())) == "default/web 8080:80/tcp"


def test_what_is_worked_out_of_a_rule_is_no_part_of_its_value() -> None:
    tagged, plain = rule(), rule()
    assert tag(tagged) == tag(plain)
    other = rule()
    assert (tagged == other, hash(tagged) == hash(other), repr(tagged) == repr(other)) == (True, True, True)
    elsewhere = replace(tagged, chain="CTRPORT")
    assert tagged != elsewhere
    assert hash(tagged) != hash(elsewhere)
    assert tag(elsewhere) == tag(rule(chain="CTRPORT")) != tag(tagged)
    assert tag(elsewhere) in arguments(elsewhere)


def test_what_rules_of_ours_counted_is_read_out_of_one_chain_whatever_others_write() -> None:
    its = tag(rule())
    text = (
        "*nat\n:DOCKER - [0:0]\n:OTHER - [0:0]\n"
        f'[3:180] -A DOCKER -m comment --comment "{its}" -j DNAT --to-destination 172.17.0.2:80\n'
        f'[5:300] -A OTHER -m comment --comment "{its}" -j RETURN\n'
        "[7:420] -A DOCKER -p tcp -j RETURN\n"
        f'[9:540] -A OTHER -m comment --comment "x\n[1:1] -A DOCKER -m comment --comment {its}" -j RETURN\n'
        "COMMIT\n"
    )
    assert counts(text, "DOCKER") == [(its, Count(3, 180))]
    assert counts(text, "ABSENT") == []


def test_a_text_is_read_by_a_program_as_it_is() -> None:
    lines = shell("cat", '*nat\n-A DOCKER -m comment --comment "$(x) `y` \\\\"\nCOMMIT\n')
    assert lines == ["cat <<'EOF'", "*nat", '-A DOCKER -m comment --comment "$(x) `y` \\\\"', "COMMIT", "EOF"]
    assert shell("cat", "") == []


@pytest.mark.parametrize("text", ["", "ctrport web", "docker web 0123456789ab", "ctrport  0123456789ab", "ctrport a b"])
def test_what_is_no_tag_has_no_owner(text: str) -> None:
    assert owner(text) == ""


@pytest.mark.parametrize(
    "name",
    [
        'web" -j ACCEPT -m comment --comment "',
        "web\nCOMMIT",
        "web\r",
        "web\\",
        "web'",
        "web$(reboot)",
        "wéb",
        "web\x00",
        "",
        "a" * 300,
        "a" * (COMMENT_MAX - len("ctrport ") - len(" 0123456789ab") + 1),
    ],
)
def test_an_owner_that_could_break_out_of_its_comment_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="not an owner that can be part of a rule"):
        tag(rule(name))


@given(st.text(max_size=300))
def test_whatever_an_owner_is_called_it_ends_in_one_quoted_word_or_nowhere(name: str) -> None:
    try:
        text = arguments(rule(name))
    except ValueError:
        return
    assert text.count('"') == 2
    assert text.isascii()
    assert text.isprintable()
    assert len(tag(rule(name))) <= COMMENT_MAX
    assert owner(tag(rule(name))) == name


@pytest.mark.parametrize("chosen", ["named", "any", "pool"])
def test_the_longest_owner_that_there_can_be_fits_into_a_comment(chosen: str) -> None:
    longest = "a" * IDENTIFIER_MAX
    where = ip_address("fd00::ffff")
    mapping = Mapping(
        ip_address("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"),
        PortRange(10000, 10001),
        PortRange(20000, 20001),
        Protocol.SCTP,
    )
    one, many = PortRange(10000, 10000), PortRange(10000, 65535)
    declared = {
        "named": mapping,
        "any": replace(mapping, host_ports=None),
        "pool": replace(mapping, host_ports=many, container_ports=one),
    }[chosen]
    publication = Publication(
        declared,
        "config.yaml:1",
        ContainerKey(longest, longest),
        State.ACTIVE,
        attachments=(Attachment(where, "x" * 15, ip_network("fd00::/64")),),
        bound=replace(declared, host_ports=one) if chosen == "pool" else mapping,
    )
    assert Owner.parse(owner_of(publication)) == Owner.of(publication)
    lengths = [len(tag(rule)) for rule in rules_for(publication, Layout())]
    assert max(lengths) == len("ctrport  0123456789ab") + len(owner_of(publication))
    assert max(lengths) <= COMMENT_MAX


@settings(deadline=None)
@given(strategies.container_keys, strategies.supported_mappings())
def test_every_container_that_containerd_takes_can_own_rules(key: ContainerKey, mapping: Mapping) -> None:
    publication = Publication(
        mapping, "config.yaml:1", key, State.ACTIVE, attachments=(worlds.attachment(),), bound=mapping
    )
    for each in rules_for(publication, Layout()):
        [line] = listing([f"-A {each.chain} {arguments(each)}"])
        assert line.tag == tag(each)
        assert owner(line.tag) == each.owner


@settings(deadline=None, max_examples=60)
@given(worlds.publication_lists())
def test_in_one_chain_no_two_rules_bear_the_same_tag(publications: list[Publication]) -> None:
    rules = {r for family in Family for r in skeleton(Layout(), family)}
    rules |= {r for publication in publications for r in rules_for(publication, Layout())}
    for family in Family:
        tags = [(r.table, r.chain, tag(r)) for r in rules if r.family is family]
        assert len(tags) == len(set(tags))


def test_a_tag_changes_with_the_text_of_the_rule_and_with_its_chain() -> None:
    tags = {
        tag(rule()),
        tag(rule(chain="OTHER")),
        tag(rule(match=Match(in_device="docker0"))),
        tag(Rule(Family.IPV4, Table.NAT, "DOCKER", Match(), Jump("X"), "default/web 8080:80/tcp")),
    }
    assert len(tags) == 4


MATCHES: list[tuple[Match, str]] = [
    (Match(), ""),
    (Match(source=ip_network("10.0.0.0/8")), "-s 10.0.0.0/8"),
    (Match(not_source=ip_network("fe80::/10")), "! -s fe80::/10"),
    (Match(destination=ip_network("172.17.0.2")), "-d 172.17.0.2/32"),
    (Match(not_destination=ip_network("127.0.0.0/8")), "! -d 127.0.0.0/8"),
    (Match(in_device="docker0"), "-i docker0"),
    (Match(not_in_device="lo"), "! -i lo"),
    (Match(out_device="docker0"), "-o docker0"),
    (Match(protocol=Protocol.SCTP), "-p sctp"),
    (Match(protocol=Protocol.UDP, ports=PortRange(53, 53)), "-p udp -m udp --dport 53"),
    (Match(protocol=Protocol.TCP, ports=PortRange(80, 90)), "-p tcp -m tcp --dport 80:90"),
    (Match(to_local=True), "-m addrtype --dst-type LOCAL"),
    (Match(established=True), "-m conntrack --ctstate RELATED,ESTABLISHED"),
    (Match(translated=True), "-m conntrack --ctstate DNAT"),
    (
        Match(translated=True, original_ports=PortRange(1, 9), original_destination=ip_address("192.0.2.1")),
        "-m conntrack --ctstate DNAT --ctorigdstport 1:9 --ctorigdst 192.0.2.1",
    ),
    (
        # Two conntrack matches: the states of one are alternatives, and both are meant.
        Match(established=True, translated=True),
        "-m conntrack --ctstate RELATED,ESTABLISHED -m conntrack --ctstate DNAT",
    ),
]


@pytest.mark.parametrize(("match", "text"), MATCHES)
def test_matches_are_worded_as_iptables_words_them(match: Match, text: str) -> None:
    comment = f'-m comment --comment "{tag(rule(match=match))}"'
    assert arguments(rule(match=match)) == f"{text} {comment} -j ACCEPT".strip()


@pytest.mark.parametrize(
    ("address", "port", "text"),
    [
        ("172.17.0.2", 80, "-j DNAT --to-destination 172.17.0.2:80"),
        ("172.17.0.2", None, "-j DNAT --to-destination 172.17.0.2"),
        ("fd00::2", 80, "-j DNAT --to-destination [fd00::2]:80"),
        ("fd00::2", None, "-j DNAT --to-destination fd00::2"),
    ],
)
def test_the_destination_of_a_translation_is_worded_as_iptables_words_it(
    address: str, port: int | None, text: str
) -> None:
    dnat = Rule(Family.IPV4, Table.NAT, "DOCKER", Match(), Dnat(ip_address(address), port), "web")
    assert arguments(dnat).endswith(f'" {text}')


OPERATIONS: list[tuple[Op, str]] = [
    (New("DOCKER"), "-N DOCKER"),
    (Empty("DOCKER"), ":DOCKER - [0:0]"),
    (Delete("DOCKER"), "-X DOCKER"),
    (Delete("DOCKER", whole=False), "-F DOCKER"),
    (Add(rule(), None), f"-A DOCKER {arguments(rule())}"),
    (Add(rule(), 3), f"-I DOCKER 3 {arguments(rule())}"),
    (Remove("DOCKER", rule()), f"-D DOCKER {arguments(rule())}"),
    # What the kernel listed is given back in its own words, whatever our own would be.
    (Remove("DOCKER", Line("-A DOCKER -j ACCEPT -x", "tag")), "-D DOCKER -j ACCEPT -x"),
]


@pytest.mark.parametrize(("op", "text"), OPERATIONS)
def test_operations_are_worded_as_a_restore_reads_them(op: Op, text: str) -> None:
    assert restore_input(Plan((Block(Table.NAT, (op,)),))) == f"*nat\n{text}\nCOMMIT\n"


def test_the_operators_chain_is_never_emptied() -> None:
    with pytest.raises(ValueError, match="DOCKER-USER is the operator's"):
        restore_input(Plan((Block(Table.FILTER, (Empty("DOCKER-USER"),)),)))


@pytest.mark.parametrize("chain", ["", "a b", "DOCKER\nCOMMIT", "x" * 29, "DOCKER;", "ÄÖ"])
@pytest.mark.parametrize("op", [New, Empty, Delete, lambda chain: Add(rule(chain=chain), None)])
def test_what_is_no_name_of_a_chain_is_not_written(op: type[New], chain: str) -> None:
    with pytest.raises(ValueError, match="not a chain name that iptables takes"):
        restore_input(Plan((Block(Table.NAT, (op(chain),)),)))


def test_an_empty_plan_is_no_text() -> None:
    assert restore_input(Plan()) == ""


# What iptables 1.8.9 (nf_tables) prints of a chain.
LISTED = r"""-P FORWARD ACCEPT
-A FORWARD -m comment --comment "ctrport jump d6facdb2c61f" -j DOCKER-USER
-A FORWARD -m comment --comment "kubernetes forwarding rules" -j KUBE-FORWARD
-A FORWARD -m comment --comment "cali:wUHhoiAYhphO9Mso" -g cali-FORWARD
-A FORWARD -j LOG --log-prefix "dropped: "
-A FORWARD -p tcp -m tcp --dport 80 -m comment --comment "dnat name: \"cni\" id: \"abc -j DROP\"" -j ACCEPT
-A FORWARD -m comment --comment "nothing to -j anywhere"
-A FORWARD -s 10.0.0.0/8 -j DNAT --to-destination 10.0.0.1:80
-A FORWARD -m comment --comment ctrport -j RETURN
-A FORWARD -m comment --comment "ctrport without a digest" -j RETURN
-A FORWARD -m comment --comment "not ctrport chain 17ae01d1accc" -j RETURN
-A FORWARD -m comment --comment "ctrport chain 17ae01d1accc"
"""


def test_a_listing_is_read_as_iptables_prints_it() -> None:
    assert [(line.tag, line.target) for line in listing(LISTED.splitlines())] == [
        ("ctrport jump d6facdb2c61f", "DOCKER-USER"),
        (None, "KUBE-FORWARD"),
        (None, "cali-FORWARD"),
        (None, "LOG"),
        (None, "ACCEPT"),
        (None, ""),
        (None, "DNAT"),
        (None, "RETURN"),
        (None, "RETURN"),
        (None, "RETURN"),
        ("ctrport chain 17ae01d1accc", ""),
    ]
    assert [line.text for line in listing(LISTED.splitlines())] == LISTED.splitlines()[1:]


def test_a_log_prefix_is_not_taken_for_a_target() -> None:
    [line] = listing(['-A FORWARD -j LOG --log-prefix "to -j KUBE-X "'])
    assert line.target == "LOG"


@pytest.mark.parametrize(
    "comment",
    [
        "ctrport jump d6facdb2c61f and more",
        "see --comment ctrport jump d6facdb2c61f",
    ],
)
def test_a_comment_that_has_one_of_ours_in_it_is_not_ours(comment: str) -> None:
    [line] = listing([f'-A FORWARD -m comment --comment "{comment}" -j ACCEPT'])
    assert line.tag is None


SAVED = r"""# Generated by iptables-nft-save v1.8.9 (nf_tables) on Mon Nov 23 07:28:42 2026
*nat
:PREROUTING ACCEPT [12:720]
:INPUT ACCEPT [0:0]
:CNI-DN-0123456789abcdef01234 - [0:0]
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -m comment --comment "ctrport jump 56003c5aa0b9" -j DOCKER
-A CNI-DN-0123456789abcdef01234 -p tcp -m tcp --dport 8080 -j DNAT --to-destination 10.4.0.9:80
-A DOCKER -m comment --comment "ctrport chain 17ae01d1accc"
-A DOCKER -p tcp -m tcp --dport 80 -m comment --comment "dnat name: \"cni\" id: \"default-web\"" -j RETURN
COMMIT
# Completed on Mon Nov 23 07:28:42 2026
"""


def test_a_saved_table_is_read_as_iptables_prints_it() -> None:
    chains = saved(SAVED)
    assert list(chains) == ["PREROUTING", "INPUT", "CNI-DN-0123456789abcdef01234", "DOCKER"]
    assert {chain: [line.tag for line in lines] for chain, lines in chains.items()} == {
        "PREROUTING": ["ctrport jump 56003c5aa0b9"],
        "INPUT": [],
        "CNI-DN-0123456789abcdef01234": [None],
        "DOCKER": ["ctrport chain 17ae01d1accc", None],
    }


def test_a_saved_table_without_anything_has_no_chains() -> None:
    assert saved("") == {}
    assert saved("*raw\nCOMMIT\n") == {}


def test_our_own_rules_are_read_back_from_a_listing() -> None:
    rules = rules_for(active("8000-8002:9000-9002"), Layout())
    lines = listing(f"-A {each.chain} {arguments(each)}" for each in rules)
    assert [line.tag for line in lines] == [tag(each) for each in rules]
    assert [line.target for line in lines] == [
        *("DNAT", "DNAT", "DNAT", "MASQUERADE", "ACCEPT", "ACCEPT", "ACCEPT", "DROP", "DROP", "MASQUERADE")
    ]


# What others have in nat

OTHERS = r"""-N CHAIN
-A CHAIN -p tcp -m comment --comment "shop/web:http" -m tcp --dport 30080 -j KUBE-EXT-A
-A CHAIN -d 198.51.100.1/32 -p udp -m comment --comment plain -m udp --dport 5353 -j KUBE-EXT-B
-A CHAIN -p tcp -m comment --comment "dnat name: \"cbr0\" id: \"5efb\"" -m multiport --dports 8080,8443:8445 -j CNI-DN-7
-A CHAIN -s 172.17.0.0/16 -p sctp -m sctp --dport 9 -j DNAT --to-destination 172.17.0.2:9
-A CHAIN -p tcp -m tcp --dport 1 -j RETURN
-A CHAIN -p tcp -m tcp --dport 2
-A CHAIN -m comment --comment "no port" -j KUBE-X
-A CHAIN -p tcp -m tcp --sport 7 -j KUBE-X
-A CHAIN -p tcp -m tcp --dport 3 -m comment --comment "ctrport default/web 3:80/tcp 9b6a0d4ce34e" -j KUBE-X
"""


@pytest.mark.parametrize(("family", "any_address"), [(Family.IPV4, "0.0.0.0"), (Family.IPV6, "[::]")])
def test_who_else_answers_on_a_host_port_is_read_from_the_tables(family: Family, any_address: str) -> None:
    lines = listing(OTHERS.splitlines())
    found = [(holder.name, str(holder.mapping)) for holder in holders("CHAIN", lines, family)]
    assert found == [
        ("CHAIN (shop/web:http)", f"{any_address}:30080:30080/tcp"),
        ("CHAIN (plain)", "198.51.100.1:5353:5353/udp"),
        ("CHAIN", f"{any_address}:8080:8080/tcp"),
        ("CHAIN", f"{any_address}:8443-8445:8443-8445/tcp"),
        ("CHAIN", f"{any_address}:9:9/sctp"),
    ]


def test_a_plan_reads_as_a_diff() -> None:
    tables = Tables(MemoryKernel(), Layout())

    async def plans() -> tuple[list[str], list[str]]:
        await tables.read()
        first = tables.plan(skeleton(Layout(), Family.IPV4))
        await tables.apply(first)
        return diff(first), diff((await tables.plan_removal())[0])

    first, removal = asyncio.run(plans())
    assert first[:3] == ["*filter", "+ -N DOCKER", "+ -N DOCKER-FORWARD"]
    assert all(line.startswith(("*", "+ ")) for line in first)
    assert all(line.startswith(("*", "- ")) for line in removal)
    empty = Plan((Block(Table.NAT, (New("DOCKER"),)),))
    assert diff(empty, Family.IPV6) == ["*nat of IPv6", "+ -N DOCKER"]
    assert "- -X DOCKER" in removal
