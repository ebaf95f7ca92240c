"""Tests of kvcompress: seeded tiny models made on the spot, no network."""
