"""Adapters to other projects; each is imported only when used."""
