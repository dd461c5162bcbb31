"""Forks of the training scripts; a package, so that none of the same name elsewhere takes its place."""
