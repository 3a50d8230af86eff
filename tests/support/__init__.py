"""Helpers of the tests: tiny models, files that people have, hostile files, stand-ins."""
