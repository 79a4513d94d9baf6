"""Passes that make a given model smaller and faster. None is implemented yet; see README.md for what is."""

from __future__ import annotations

__all__: list[str] = []
