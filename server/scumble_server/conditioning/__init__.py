"""Turns the prompts and adapters of one request into what its rows carry."""
