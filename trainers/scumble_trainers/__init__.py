"""The offline trainers: pictures become adapters, and the base its weights."""
