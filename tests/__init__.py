"""Tests that cross distributions: real guests, real clients, architecture rules."""
