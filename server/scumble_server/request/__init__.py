"""A request as data."""
