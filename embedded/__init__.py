"""An embedded node: a Kubernetes-like node built of Linux namespaces, for node tests, demo and benchmarks."""
