"""Measurements of ctrport beside what others do for the same end, on a node made of namespaces."""
