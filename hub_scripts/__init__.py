"""End-to-end scripts that run from the project's root; what several of them share is imported from here."""
