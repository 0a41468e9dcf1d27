"""The answer in one sentence: works, or does not, because, and the mend. Pure."""

from __future__ import annotations

from collections.abc import Callable

from ..firewall.text import owner
from ..rules import USER_CHAIN
from .cases import At, Doubt, Passed
from .facts import Facts
from .fate import Cause, Fate, Outcome
from .judgement import Judgement, translator
from .question import Inquiry
from .ruleset import NFT
from .whose import CTRPORT, OPERATOR, command_of, is_ours, owner_of, place_of

#: How much of a rule is shown.
_LONGEST = 160
_BEGINNINGS = {
    Outcome.WORKS: "works: ",
    Outcome.FAILS: "does not work, because ",
    Outcome.UNKNOWN: "cannot be told, because ",
}


def sentence(inquiry: Inquiry, facts: Facts, judgement: Judgement) -> tuple[str, str]:
    """Return the whole sentence, and the mend that is in it. Not safe to print: rules and names of others are in it."""
    words = _Words(inquiry, facts, judgement)
    because, mend = words.doubt() if judgement.otherwise is not None else words.of(judgement.fate)
    return f"{_BEGINNINGS[judgement.outcome]}{because}" + (f": {mend}" if mend else ""), mend


class _Words:
    """What there is to say of one judgement: why, and what to do about it."""

    def __init__(self, inquiry: Inquiry, facts: Facts, judgement: Judgement) -> None:
        self._facts = facts
        self._judgement = judgement
        self._packet = inquiry.packet
        self._origin = inquiry.origin
        self._port = f"{inquiry.packet.destination.port}/{inquiry.packet.protocol}"

    def of(self, fate: Fate) -> tuple[str, str]:
        return _SAID[fate.cause](self, fate)

    def doubt(self) -> tuple[str, str]:
        doubt, one, other = self._judgement.doubt, self._judgement.fate, self._judgement.otherwise
        if doubt is None or other is None:  # pragma: no cover - two cases differ by what was taken for granted
            return "it depends on what cannot be seen", ""
        for each in (one, other):
            if each.cause is Cause.UNTOLD and each.at == doubt.at:
                return self.untold(each)
        what, matches = f"it depends on {self._rule(doubt.at)}, which cannot be judged here", "it matches"
        if doubt.at.rule is None:
            what = f"it depends on the device that the chain {place_of(doubt.at)} is for, which nft does not tell"
            matches = f"that is {self._packet.in_device}"
        if_so, if_not = (self._in_short(each, doubt) for each in ((one, other) if doubt.matched else (other, one)))
        return f"{what}; if {matches}, {if_so}, and if not, {if_not}", ""

    def _in_short(self, fate: Fate, doubt: Doubt) -> str:
        if fate.outcome is Outcome.WORKS:
            return "it works"
        if fate.at is not None and fate.at == doubt.at:
            return "it is stopped there"
        return self.of(fate)[0]

    # Names

    def _rule(self, at: At | None) -> str:
        """Name a rule, or a policy, so that it is found."""
        if at is None:
            return "a rule"
        whose = owner_of(at, self._facts.chain)
        by = f" of {whose}" if whose else ""
        if at.rule is None:
            return f"the policy DROP of {place_of(at)}{by}"
        text = at.rule.text if len(at.rule.text) <= _LONGEST else f"{at.rule.text[: _LONGEST - 3]}..."
        handle = f" (handle {at.rule.handle})" if at.rule.handle is not None else ""
        return f"the rule '{text}'{handle} in {place_of(at)}{by}"

    def _who(self, fate: Fate) -> str:
        return f"container {fate.who.name}" if fate.who is not None else "the container"

    def _declared(self) -> str:
        return str(self._judgement.declared) if self._judgement.declared is not None else f"port {self._port}"

    def _taker(self, fate: Fate) -> str:
        """Name who gets the packet instead of ctrport."""
        sender = translator(fate)
        if sender is not None:
            return owner_of(sender, self._facts.chain) or f"somebody else, by {self._rule(sender)},"
        return self._facts.holder(fate.socket) if fate.socket is not None else "somebody else"

    # Works

    def container(self, fate: Fate) -> tuple[str, str]:
        place = fate.case.packet.destination
        source = fate.case.packet.source.address
        as_whom = "" if source == self._packet.source.address else f", which sees {source} as its client"
        sender = translator(fate)
        by = ""
        if sender is not None and not is_ours(sender):
            by = f", sent there by {owner_of(sender, self._facts.chain) or self._rule(sender)} and not by ctrport"
        return f"{self._packet.source.address} reaches {place} in {self._who(fate)}{by}{as_whom}", ""

    def program(self, fate: Fate) -> tuple[str, str]:
        holder = self._facts.holder(fate.socket) if fate.socket is not None else "a program"
        return f"{self._packet.source.address} reaches {holder}, which is the node's own and not ctrport's", ""

    # Nobody can tell

    def untold(self, fate: Fate) -> tuple[str, str]:
        return f"nobody knows here what {self._rule(fate.at)} does with it", ""

    def beyond(self, fate: Fate) -> tuple[str, str]:
        place, gateway, device = fate.case.packet.destination, fate.words["gateway"], fate.words["device"]
        return f"it leaves for {place} through {gateway} by {device}, and what becomes of it there is not seen here", ""

    def stranger(self, fate: Fate) -> tuple[str, str]:
        address, device = fate.words["address"], fate.words["device"]
        return f"it leaves for {address} by {device}, and nobody on this node has that address", ""

    def ipvs(self, fate: Fate) -> tuple[str, str]:
        return (
            f"IPVS has port {self._port}, as kube-proxy in IPVS mode, and where it sends it is not seen",
            "`ipvsadm -Ln`",
        )

    def unseen(self, fate: Fate) -> tuple[str, str]:
        return f"nothing that was seen is in its way, but {fate.words['unseen']}", ""

    def table_full(self, fate: Fate) -> tuple[str, str]:
        count, most = fate.words["count"], fate.words["most"]
        what = f"connection tracking has as many flows as it may ({count} of {most}), and may drop what is new"
        return what, "`sysctl -w net.netfilter.nf_conntrack_max=` more"

    def sockets_unseen(self, fate: Fate) -> tuple[str, str]:
        return f"it comes to {self._who(fate)}, and who listens there on {self._packet.protocol} is not seen", ""

    # On the way there

    def dropped(self, fate: Fate) -> tuple[str, str]:
        done = "rejects" if fate.cause is Cause.REJECTED else "drops"
        return f"{self._rule(fate.at)} {done} it{self._lost(fate)}", self._way_past(fate.at)

    def answer_dropped(self, fate: Fate) -> tuple[str, str]:
        what = "the answer" if fate.cause is Cause.ANSWER_DROPPED else "what comes behind the first packet"
        return f"{self._rule(fate.at)} stops {what}{self._lost(fate)}", self._way_past(fate.at)

    def isolated(self, fate: Fate) -> tuple[str, str]:
        place = self._packet.destination
        why = f"{place.address} is on one of ctrport's `networks`, which let in what is published and nothing else"
        return why, f"publish the port, and use an address of the node ({self._rule(fate.at)} drops it)"

    def _lost(self, fate: Fate) -> str:
        """Say it where FORWARD stops what ctrport has sent on, and would have let in if all of its rules were there."""
        at, sender = fate.at, translator(fate)
        if at is None or sender is None or at.chain.name != "FORWARD" or at.table.kept_by == NFT:
            return ""
        if not is_ours(sender) or sender.table.kept_by != at.table.kept_by:
            return ""
        forward = f"{self._facts.chain}-FORWARD"
        jumps = [rule for rule in at.chain.rules if rule.tag is not None and owner(rule.tag) == "jump"]
        if not any(rule.text.endswith(f"-j {forward}") for rule in jumps):
            return f", and ctrport's jump to {forward} is not in there"
        turn = fate.case.packet.flow.turn
        passed = (each for each in fate.case.trail if isinstance(each, Passed) and each.packet.flow.turn is turn)
        if any(each.into == forward for each in passed):
            return ", and ctrport's rule that would let it in is not there"
        return ""

    def _way_past(self, at: At | None) -> str:
        """Return what to do about a rule that stops it."""
        if at is None:
            return ""
        if self._lost(self._judgement.fate):
            return "systemctl restart ctrport"
        if at.table.kept_by == NFT:
            table = f"{at.table.family} {at.table.name} {at.chain.name}"
            if at.rule is None or at.table.name == "firewalld":
                return f"let it through there, as with `nft insert rule {table} ct status dnat accept`"
            return f"`nft delete rule {table} handle {at.rule.handle}`, or let it through before that rule"
        command = f"{command_of(at)} -t {at.table.name}"
        whose = owner_of(at, self._facts.chain).partition(" (")[0]
        if at.rule is None:
            return f"`{command} -P {at.chain.name} ACCEPT`, or a rule there that lets it through"
        if at.chain.name == USER_CHAIN or owner_of(at, self._facts.chain) == OPERATOR:
            return f"that chain is yours: `{command} -S {at.chain.name}` shows it"
        if whose not in ("", CTRPORT):
            return f"that is for {whose} to change (`{command} -S {at.chain.name}` shows it)"
        if at.chain.name == "FORWARD" and self._stands_before_ours(at):
            return "it stands before ctrport's jump: delete it, or set `firewall.position: first`"
        return f"`{command} -S {at.chain.name}` shows it; delete it, or let this port through before it"

    def _stands_before_ours(self, at: At) -> bool:
        after = False
        for rule in at.chain.rules:
            after = after or rule is at.rule
            if after and rule.tag is not None:
                return True
        return False

    def no_route(self, fate: Fate) -> tuple[str, str]:
        address = fate.case.packet.destination.address
        why = _NO_ROUTES.get(fate.words["error"], fate.words["error"])
        return f"the node has no way for packets to {address} ({why})", f"`ip route get {address}`"

    def forwarding(self, fate: Fate) -> tuple[str, str]:
        setting = fate.words["setting"]
        mend = f"`sysctl -w {setting}=1`, and the same in a file below /etc/sysctl.d"
        return f"the node does not forward IPv{self._packet.family.value} ({setting} is 0)", mend

    def rp_filter(self, fate: Fate) -> tuple[str, str]:
        device, back, mode = fate.words["device"], fate.words["back"], fate.words["mode"]
        source = fate.case.packet.source.address
        there = f"the node's route to {source} is by {back}" if back else f"the node has no route to {source}"
        why = f"rp_filter ({mode}) drops what comes from {source} by {device}, as {there}"
        loosely = f", or `sysctl -w net.ipv4.conf.{device}.rp_filter=2`" if mode == "1" else ""
        return why, f"mend the route (`ip route get {source}`){loosely}"

    def route_localnet(self, fate: Fate) -> tuple[str, str]:
        device = fate.words["device"]
        if not self._packet.source.address.is_loopback:
            return f"what comes in by {device} does not get to 127.0.0.0/8, which is the node's own", ""
        why = f"net.ipv4.conf.{device}.route_localnet is 0, so that nothing leaves 127.0.0.1 by {device}"
        return why, "`systemctl restart ctrport` switches it on, with its guard in raw"

    def hairpin(self, fate: Fate) -> tuple[str, str]:
        port = fate.words["port"]
        why = f"the bridge sends nothing back through the port that it came by, {port} of {self._who(fate)}"
        return f"{why} (hairpin mode is off, bridge-nf-call-iptables on)", "`systemctl restart ctrport` switches it on"

    # At the node itself

    def nobody(self, fate: Fate) -> tuple[str, str]:
        what = f"nothing is published on port {self._port}, and no program of the node listens there"
        return what, "add it to `publish` of the configuration, `ctrport check`, `systemctl reload ctrport`"

    def not_installed(self, fate: Fate) -> tuple[str, str]:
        declared = self._judgement.declared
        if declared is not None and declared.missing:
            return (
                f"the rules of {self._declared()} are not in the kernel, and no daemon runs",
                "systemctl start ctrport",
            )
        what = f"{self._declared()} is active for the daemon, and no rule of it is met in the kernel"
        return what, "`ctrport plan` shows what is missing; systemctl restart ctrport"

    def untracked(self, fate: Fate) -> tuple[str, str]:
        what = f"{self._rule(fate.at)} has connection tracking leave it alone"
        if fate.outcome is Outcome.UNKNOWN:
            return f"{what}, and what becomes of the answer then is not known here", ""
        return f"{what}, and what is not tracked is not translated", self._way_past(fate.at)

    def not_active(self, fate: Fate) -> tuple[str, str]:
        declared = self._judgement.declared
        assert declared is not None
        state = "in conflict" if declared.state == "conflict" else declared.state
        return f"{declared} is {state}: {declared.reason}", _mend_of(declared.reason)

    def sources(self, fate: Fate) -> tuple[str, str]:
        what = f"{self._packet.source.address} is not among the `sources` of {self._declared()}"
        return what, "add it there, if it is to be let in"

    def interface(self, fate: Fate) -> tuple[str, str]:
        device = self._packet.in_device
        comes = f"it comes in by {device}" if device else "what the node itself sends comes in by no device"
        return f"{comes}, and the `interface` of {self._declared()} is another", "correct `interface`, or leave it out"

    def host_address(self, fate: Fate) -> tuple[str, str]:
        declared = self._judgement.declared
        mapping = None if declared is None else declared.bound or declared.mapping
        address = self._packet.destination.address
        if mapping is None or mapping.any_host_ip:
            return f"{self._declared()} does not serve {address}", "use another address of the node"
        what = f"{self._declared()} is published on {mapping.host_ip} alone, and not on {address}"
        return what, f"use {mapping.host_ip}, or leave the address out of the mapping"

    def another_family(self, fate: Fate) -> tuple[str, str]:
        family = f"IPv{self._packet.family.value}"
        what = f"the container of {self._declared()} has no {family} address"
        return what, f"give its network an {family} range, or use an address of the other family"

    def protocol(self, fate: Fate) -> tuple[str, str]:
        declared = self._judgement.declared
        other = declared.mapping.protocol if declared is not None else ""
        what = f"port {self._packet.destination.port} is published for {other} ({self._declared()}) and not for"
        return f"{what} {self._packet.protocol}", f"publish it for {self._packet.protocol}, too, or use {other}"

    def loopback6(self, fate: Fate) -> tuple[str, str]:
        return "the kernel sends nothing on that was sent to ::1", "use 127.0.0.1, or another address of the node"

    def localhost(self, fate: Fate) -> tuple[str, str]:
        return (
            "firewall.localhost is false, so that nothing is published on 127.0.0.1",
            "use another address of the node",
        )

    def taken(self, fate: Fate) -> tuple[str, str]:
        declared = self._judgement.declared
        told = declared is not None and declared.state not in ("active", "conflict")
        state = f" ({declared.state}: {declared.reason})" if declared is not None and told else ""
        what = f"{self._taker(fate)} has port {self._port}, and {self._declared()} does not get it{state}"
        return what, "give one of them another port, or take the other away"

    # In the container

    def gone(self, fate: Fate) -> tuple[str, str]:
        place, its = fate.case.packet.destination, fate.words["owner"]
        now = f", which {self._who(fate)} has now" if fate.who is not None else ", which no container has"
        return f"the rule of {its} still leads to {place}{now}", "systemctl restart ctrport"

    def paused(self, fate: Fate) -> tuple[str, str]:
        key = min(fate.who.keys, default=None) if fate.who is not None else None
        mend = f"`ctr --namespace {key.namespace} tasks resume {key.id}`" if key is not None else ""
        return f"{self._who(fate)} is paused", mend

    def not_listening(self, fate: Fate) -> tuple[str, str]:
        ports = fate.words["ports"]
        what = f"nobody in {self._who(fate)} listens on {fate.case.packet.destination.ports}/{self._packet.protocol}"
        others = f" (but on {ports})" if ports else ""
        return f"{what}{others}", f"start the program, or correct the container port{self._look(fate)}"

    def loopback_only(self, fate: Fate) -> tuple[str, str]:
        at = fate.words["at"]
        what = f"the program in {self._who(fate)} listens on port {fate.case.packet.destination.ports} of {at} only"
        return what, f"let it listen on 0.0.0.0 or ::{self._look(fate)}"

    def _look(self, fate: Fate) -> str:
        return f" (`nsenter -t {fate.who.pid} -n ss -ltnup`)" if fate.who is not None else ""

    # On the way back

    def no_way_back(self, fate: Fate) -> tuple[str, str]:
        receiver = fate.case.packet.source.address
        if fate.who is None:
            return f"the node has no route back to {receiver}", f"`ip route get {receiver}`"
        look = f"`nsenter -t {fate.who.pid} -n ip route get {receiver}`"
        if "gateway" in fate.words:
            what = f"{self._who(fate)} answers {receiver} through {fate.words['gateway']}, which is not this node"
            return what, f"let its default route lead here, or set `firewall.masquerade: all` ({look})"
        return f"{self._who(fate)} has no route to {receiver} for its answer", f"give it a default route ({look})"

    def own_address(self, fate: Fate) -> tuple[str, str]:
        source = fate.case.packet.source.address
        what = f"it comes to {self._who(fate)} from {source}, which no host takes from elsewhere than itself"
        return what, "`ctrport plan` shows whether the rule is missing that masquerades it; systemctl restart ctrport"

    def past_node(self, fate: Fate) -> tuple[str, str]:
        receiver = fate.case.packet.source.address
        what = f"{self._who(fate)} answers {receiver} on their own link, past the node, from an address it did not ask"
        return what, "`ctrport plan` shows whether the rule is missing that masquerades it; systemctl restart ctrport"


_SAID: dict[Cause, Callable[[_Words, Fate], tuple[str, str]]] = {
    Cause.CONTAINER: _Words.container,
    Cause.PROGRAM: _Words.program,
    Cause.UNTOLD: _Words.untold,
    Cause.BEYOND: _Words.beyond,
    Cause.STRANGER: _Words.stranger,
    Cause.IPVS: _Words.ipvs,
    Cause.UNSEEN: _Words.unseen,
    Cause.DROPPED: _Words.dropped,
    Cause.REJECTED: _Words.dropped,
    Cause.ISOLATED: _Words.isolated,
    Cause.NO_ROUTE: _Words.no_route,
    Cause.FORWARDING: _Words.forwarding,
    Cause.RP_FILTER: _Words.rp_filter,
    Cause.ROUTE_LOCALNET: _Words.route_localnet,
    Cause.HAIRPIN: _Words.hairpin,
    Cause.NOBODY: _Words.nobody,
    Cause.NOT_INSTALLED: _Words.not_installed,
    Cause.UNTRACKED: _Words.untracked,
    Cause.NOT_ACTIVE: _Words.not_active,
    Cause.SOURCES: _Words.sources,
    Cause.INTERFACE: _Words.interface,
    Cause.HOST_ADDRESS: _Words.host_address,
    Cause.ANOTHER_FAMILY: _Words.another_family,
    Cause.PROTOCOL: _Words.protocol,
    Cause.LOOPBACK6: _Words.loopback6,
    Cause.LOCALHOST: _Words.localhost,
    Cause.TAKEN: _Words.taken,
    Cause.GONE: _Words.gone,
    Cause.PAUSED: _Words.paused,
    Cause.NOT_LISTENING: _Words.not_listening,
    Cause.LOOPBACK_ONLY: _Words.loopback_only,
    Cause.TABLE_FULL: _Words.table_full,
    Cause.SOCKETS_UNSEEN: _Words.sockets_unseen,
    Cause.NO_WAY_BACK: _Words.no_way_back,
    Cause.OWN_ADDRESS: _Words.own_address,
    Cause.PAST_NODE: _Words.past_node,
    Cause.ANSWER_DROPPED: _Words.answer_dropped,
    Cause.LATER_DROPPED: _Words.answer_dropped,
}

#: What the kernel means by the errors by which it does not route.
_NO_ROUTES = {
    "ENETUNREACH": "it has no route",
    "EHOSTUNREACH": "its route says unreachable",
    "EACCES": "its route says prohibited",
    "EINVAL": "it refuses them, as for a route that is a blackhole",
}

#: What to do about a publication that is not active, by how its reason begins.
_MENDS = {
    "no running container matches": "start it, or correct `match` (`ctr --namespace NAMESPACE tasks list`)",
    "it has only a loopback address": "start it with `ctr run --cni`",
    "the node does not forward": "`sysctl -w net.ipv4.ip_forward=1` (net.ipv6.conf.all.forwarding=1)",
    "the host has no route": "its network is not set up on this node",
}


def _mend_of(reason: str) -> str:
    return next((mend for begins, mend in _MENDS.items() if reason.startswith(begins)), "")
