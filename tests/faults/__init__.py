"""What a node suffers, for long: the daemon killed again and again, and containers that come and go without end."""
