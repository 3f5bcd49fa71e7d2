"""Meshes, processes, chips, and what the compiler is told."""
