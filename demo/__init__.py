"""The demonstration: a real Redis, published on a node made of namespaces."""
