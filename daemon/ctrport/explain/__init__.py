"""What becomes of a packet to a port of this node: who gets it, and if nobody does, because of what.

    question (what is asked)  ->  snapshot (what of the node counts)  ->  walk (the packet's way)  ->  verdict (words)

The walk is pure. It knows the packet, the rules and what else is in ``Facts``, and goes the way that the kernel takes
it: hook by hook, each rule either matched, not matched, or not to be judged. What it lacks it asks for (``facts.Ask``);
``snapshot`` looks, and the walk begins anew. Nothing is changed on the node, and no packet is sent.
"""
