"""containerd's gRPC API, as far as the daemon calls it: generated from proto/ by bin/generate-stubs, never edited."""
