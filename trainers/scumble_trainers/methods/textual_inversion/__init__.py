"""Textual inversion (Gal et al., 2208.01618): new words for a text encoder that stays as it is."""
