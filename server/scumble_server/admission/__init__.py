"""The edge: what a request may and must be, checked before any work is done for it."""
