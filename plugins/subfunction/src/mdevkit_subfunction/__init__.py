"""A simulated multi-function network card with an eswitch, divided into sub-functions: see the README."""
