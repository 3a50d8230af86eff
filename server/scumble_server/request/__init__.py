"""What a request asks for, as data."""
