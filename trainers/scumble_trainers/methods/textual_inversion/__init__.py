"""Textual inversion (Gal et al., 2208.01618): new words for a frozen text encoder."""
