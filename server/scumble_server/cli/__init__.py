"""`scumble serve`, and the server that other commands start for themselves."""
