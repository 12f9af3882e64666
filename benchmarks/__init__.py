"""Measurements of the project, run from the repository's root; never imported by the packages."""
