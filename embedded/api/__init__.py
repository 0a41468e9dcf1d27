"""CRI, the API between kubelet and containerd, as far as pods need it: generated from proto/ by bin/generate-stubs."""
