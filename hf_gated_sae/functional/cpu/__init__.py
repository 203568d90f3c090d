"""What exists only for speed on a CPU; `functional` decides when it is used."""
