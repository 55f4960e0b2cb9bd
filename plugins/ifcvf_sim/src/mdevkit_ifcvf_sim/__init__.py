"""A simulated Intel IFC VF card, and the parent driver that knows it by its registers alone: see the README."""
