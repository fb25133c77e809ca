"""Students in the formats of other tools; each module writes one of them and reads it back for comparison."""
