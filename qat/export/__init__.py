"""Students in the formats of other tools: a package each, which declares a format, writes it and reads it back."""
