"""Reads prompts: grammars, tokens, chunks."""
