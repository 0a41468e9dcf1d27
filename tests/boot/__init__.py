"""The unit under a real systemd, in a booted Debian: what ``make boot`` runs."""
