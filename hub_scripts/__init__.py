"""End-to-end scripts that are run from the project's root, and modules that several of them share."""
