"""The matrix: every row of the packet table under every setting, with real packets on embedded nodes."""
