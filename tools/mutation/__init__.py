"""Mistakes put into copies of the code on purpose, to see which of them the tests notice."""
