"""Ranks watch each other: when one is killed, fails, hangs or loses its host, all end, and say why."""
